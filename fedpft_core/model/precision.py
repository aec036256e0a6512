"""Float types of a model's frozen weights: half as many bytes, with an adapter in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Values of `model.dtype`."""

HALF = (torch.bfloat16, torch.float16)


def widened(t: Tensor) -> Tensor:
    """A tensor in at least float32, for sums and means.

    Args:
        t: of any float type.

    Returns:
        The tensor itself, unless it is in half precision.
    """
    return t.to(torch.promote_types(t.dtype, torch.float32))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Bring a model's parameters to a float type, in place.

    Buffers stay: tables of rotary positions are float32 in whatever type a model is loaded.

    Args:
        model: any.
        dtype: a float type.

    Returns:
        The same model.
    """
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def widen_trained(model: nn.Module, names: tuple[str, ...]) -> None:
    """Bring what is trained to float32 where the rest is in half precision, in place.

    LoRA's layers convert what they read by themselves; modules that are trained whole are made to.

    Args:
        model: a model with its adapter.
        names: paths of the modules that are trained whole, in the bare task model.
    """
    if not any(p.dtype in HALF for p in model.parameters()):
        return
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    bare: Any = model.get_base_model()  # type: ignore[operator]  # of PEFT's wrapper
    for name in names:
        bare.get_submodule(name).register_forward_pre_hook(_widen_inputs)


def _widen_inputs(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        widened(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given
    )


class Masters:
    """What an optimiser steps on: parameters, and float32 copies of those in half precision.

    A step of a rate of 1e-3 and less would be lost in the rounding of bfloat16.

    Args:
        params: live parameters.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self._pairs = [(p, p.detach().float()) for p in params if p.dtype in HALF]
        copies = {id(p): copy for p, copy in self._pairs}
        self.params = [copies.get(id(p), p) for p in params]

    def take_gradients(self) -> None:
        """Give the copies the gradients of their parameters, which lose them."""
        for p, copy in self._pairs:
            assert p.grad is not None
            copy.grad, p.grad = p.grad.float(), None

    @torch.no_grad()
    def give_back(self) -> None:
        """Round the copies into their parameters."""
        for p, copy in self._pairs:
            p.copy_(copy)
