"""A client's frozen base in 8 bits: linear layers of a sub-FM's blocks in a quarter of the memory.

A layer keeps whole numbers and a scale for each row or column (:mod:`fedpft_core.wire.rounding`),
makes its float weight anew for each product, forward and backward, and lets it go. (The layers of
torchao 0.18 keep it until the backward pass, which is all of the memory that was to be saved.)
Where the server has rounded the weights to 8 bits already (`wire.package = int8`), nothing is lost,
and what is trained is the same to the bit. Embeddings, norms, biases, head and LoRA stay floats.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fedpft_core.errors import UserError
from fedpft_core.model.families import Family
from fedpft_core.model.names import in_modules
from fedpft_core.tensors import Tensors
from fedpft_core.wire import rounding

BASES = ("float", "int8")
"""What a client can hold its frozen base in."""


class NotHeldError(UserError):
    """A model whose base cannot be held in 8 bits."""


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b, of which W is kept in 8 bits for the backward pass as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(q, scale)
        ctx.dtype = dtype
        return nn.functional.linear(x, _floats(q, scale, dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, scale = ctx.saved_tensors
        back = grad.reshape(-1, len(q)) @ _floats(q, scale, ctx.dtype)
        return back.reshape(*grad.shape[:-1], q.shape[1]), None, None, None, None


def _floats(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return rounding.of_int8(q, scale).to(dtype)


class Int8Linear(nn.Linear):
    """A frozen linear layer in 8 bits, which PEFT takes for a linear layer.

    Args:
        weight: [D_out, D_in], which is rounded unless 8 bits hold it as it is.
        bias: [D_out], kept as it is; None for none.
        dtype: float type of the weight that products are made with.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not Linear's, which would make the weight a parameter
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        q, scale = _int8(weight.detach())
        # Not in the state dict, whose names are those of the model in floats.
        self.register_buffer("q", q, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in floats [D_out, D_in], made anew at each call."""
        return _floats(self.get_buffer("q"), self.get_buffer("scale"), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: inputs [..., D_in].

        Returns:
            Outputs [..., D_out], to the bit those of a layer with `weight`.
        """
        made: Tensor = _Product.apply(
            x, self.get_buffer("q"), self.get_buffer("scale"), self.bias, self.dtype
        )
        return made


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales, along the axis that loses nothing where there is one."""
    rows = rounding.to_int8(weight, 0)
    if _holds(rows, weight):
        return rows
    columns = rounding.to_int8(weight, 1)
    return columns if _holds(columns, weight) else rows


def _holds(form: tuple[Tensor, Tensor], weight: Tensor) -> bool:
    return torch.equal(rounding.of_int8(*form), weight.float())


@contextmanager
def hollow() -> Iterator[None]:
    """For the duration, models made in this thread have no memory for weights of linear layers.

    Yields:
        Nothing. What :func:`put` does not replace has to be given memory by :func:`filled_up`.
    """
    from transformers.pytorch_utils import Conv1D

    thread = threading.get_ident()

    def emptied(module: nn.Module, name: str, param: Any) -> Any:
        # A second registration is another layer's weight, which ties the two.
        fresh = name == "weight" and name not in module._parameters
        if threading.get_ident() != thread or not fresh or param is None:
            return None
        return _meta(param) if isinstance(module, nn.Linear | Conv1D) else None

    handle = hooks.register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        handle.remove()


def _meta(param: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)


def put(
    model: nn.Module, family: Family, modules: tuple[str, ...], weights: Mapping[str, Tensor] | None
) -> Tensors:
    """Put the frozen linear layers of a model's blocks into 8 bits, in place.

    Args:
        model: a bare sub-FM.
        family: where it keeps its blocks.
        modules: paths of the modules that are trained whole, which stay.
        weights: weights by name; None for those that the model has.

    Returns:
        The weights that are still to be loaded.

    Raises:
        NotHeldError: there is no such layer.
        ValueError: a weight is lacking or of another shape.
    """
    left = dict(weights or {})
    inside = {id(part) for block in family.block_list(model) for part in block.modules()}
    count = 0
    for path, layer in list(model.named_modules()):
        # Subclasses compute their weight in a way of their own.
        if type(layer) is not nn.Linear or id(layer) not in inside:
            continue
        if in_modules(f"{path}.weight", modules):
            continue
        weight = layer.weight if weights is None else left.pop(f"{path}.weight", None)
        if weight is None or weight.shape != layer.weight.shape:
            raise ValueError(f"the weight of {path} is lacking, or of another shape")
        made = Int8Linear(weight, layer.bias, layer.weight.dtype)
        model.set_submodule(path, made.train(layer.training))
        del weight, layer
        give_back()
        count += 1
    if not count:
        text = f"base = int8 is for linear layers in blocks, and a {family.name} model has none"
        raise NotHeldError(f"{text}.", public=text)
    return left


def give_back() -> None:
    """Hand memory that has been freed back to the system, where the C library can.

    It keeps what lies between pieces in use for itself: here as much as the floats were.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def filled_up(model: nn.Module) -> nn.Module:
    """Give parameters that :func:`hollow` has left without memory zeros, in place.

    Args:
        model: any.

    Returns:
        The same model; parameters that were one are one.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                zeros = torch.zeros(p.shape, dtype=p.dtype)
                made.setdefault(id(p), nn.Parameter(zeros, requires_grad=p.requires_grad))
                module._parameters[name] = made[id(p)]
    return model


__all__ = ["BASES", "Int8Linear", "NotHeldError", "filled_up", "give_back", "hollow", "put"]
