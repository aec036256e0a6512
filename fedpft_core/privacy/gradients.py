"""Gradients of single rows, for layers that are linear: LoRA's factors and heads are.

A linear layer's weight gradient is the sum over positions of output gradient times input; kept
apart by row, it is the gradient of each row's loss. Hooks see both while one backward pass of the
summed loss runs.

Source: Goodfellow 2015 (arXiv:1510.01799); Opacus does the same (arXiv:2109.12298).

Shape letters: B rows, T positions of a row, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn


class RowGradients:
    """Gathers the gradients of each row while it is open; use as a context."""

    def __init__(self, model: nn.Module) -> None:
        """Find the layers.

        Args:
            model: those of its parameters that require gradients are gathered.

        Raises:
            ValueError: a parameter that is trained belongs to no linear layer.
        """
        self.names: dict[int, str] = {}  # by id of the parameter
        self.layers: list[nn.Linear] = []
        for path, module in model.named_modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
            if own and not isinstance(module, nn.Linear):
                raise ValueError(f"{path} is trained and is no linear layer")
            if own:
                self.layers.append(module)
                self.names |= {id(p): f"{path}.{n}" for n, p in own.items()}
        self.rows = 0
        self.found: dict[str, Tensor] = {}  # float32 [B, *shape of the parameter], by name
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RowGradients:
        for layer in self.layers:
            self._handles.append(layer.register_forward_hook(self._forward))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, rows: int) -> None:
        """Forget what was gathered.

        Args:
            rows: B, of the batch that comes.
        """
        self.rows = rows
        self.found = {}

    def taken(self) -> dict[str, Tensor]:
        """What was gathered since `begin`.

        Returns:
            By name of the parameter, float32 [B, *its shape].

        Raises:
            ValueError: a trained parameter got no gradient, which would silently not be trained.
        """
        missing = sorted(set(self.names.values()) - self.found.keys())
        if missing:
            raise ValueError(f"{missing[0]} has no gradient by row")
        return self.found

    def _forward(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(partial(self._backward, layer, args[0].detach()))

    def _backward(self, layer: nn.Module, read: Tensor, back: Tensor) -> None:
        back = back.detach()
        if read.shape[0] != self.rows:
            raise ValueError("a layer's first axis is not that of the rows")
        read_BTI = read.reshape(self.rows, -1, read.shape[-1]).float()
        back_BTO = back.reshape(self.rows, -1, back.shape[-1]).float()
        parts = {"weight": lambda: torch.einsum("bto,bti->boi", back_BTO, read_BTI)}
        parts["bias"] = lambda: back_BTO.sum(1)
        for part, made in parts.items():
            p = getattr(layer, part)
            if p is not None and p.requires_grad:
                name = self.names[id(p)]
                got = made()
                self.found[name] = self.found[name] + got if name in self.found else got


def clipped_sum(gradients: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """The sum of the rows' gradients, each scaled down to a norm.

    Args:
        gradients: [B, ...] by name.
        bound: largest L2 norm of a row's gradient, over all names together.

    Returns:
        The sum over rows, by name. A row whose gradient is not finite counts as zero.
    """
    squares = sum(g.reshape(len(g), -1).double().square().sum(1) for g in gradients.values())
    assert isinstance(squares, Tensor)
    norms = squares.sqrt()
    factors = torch.where(norms > bound, bound / norms, torch.ones_like(norms)).float()
    fine = norms.isfinite()
    out = {}
    for name, g in gradients.items():
        g = torch.where(fine.reshape(-1, *[1] * (g.dim() - 1)), g, torch.zeros_like(g))
        out[name] = torch.einsum("b,b...->...", torch.where(fine, factors, 0), g)
    return out
