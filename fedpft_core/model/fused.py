"""Layers that hold several projections side by side, taken apart and put together again.

GPT-2 has query, key and value in one layer, ModernBERT has gate and up too. Everything else takes
a projection for a layer of its own: neurons are cut out of it, LoRA is put on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Fused:
    """A layer of a block and what it holds, in the order of its outputs, all of one size.

    Attributes:
        path: the layer's, relative to the block.
        parts: names of the projections.
    """

    path: str
    parts: tuple[str, ...]


class Apart(nn.Module):
    """Projections of the same input, one layer each, whose outputs are laid side by side.

    Args:
        linear: the layer that holds them all, one after the other.
        parts: their names, in the order of its outputs.
    """

    def __init__(self, linear: nn.Linear, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts
        size = linear.out_features // len(parts)
        for i, name in enumerate(parts):
            part = nn.utils.skip_init(
                nn.Linear, linear.in_features, size, bias=linear.bias is not None,
                device=linear.weight.device, dtype=linear.weight.dtype,
            )  # fmt: skip
            own = slice(i * size, (i + 1) * size)
            with torch.no_grad():
                part.weight.copy_(linear.weight[own])
                if linear.bias is not None:
                    part.bias.copy_(linear.bias[own])
            part.requires_grad_(linear.weight.requires_grad)
            self.add_module(name, part)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """What the one layer gives.

        Args:
            x: inputs [..., D].

        Returns:
            Outputs of the parts [..., sum of their sizes].
        """
        return torch.cat([self.get_submodule(name)(x) for name in self.parts], -1)


@dataclass(frozen=True)
class Joined:
    """An adapter as the layers of the vanilla model take it.

    Attributes:
        tensors: by the names of the vanilla model.
        targets: full paths of the layers that carry LoRA's factors.
        ranks: rank of those whose rank is not the adapter's, by path.
    """

    tensors: dict[str, Tensor]
    targets: tuple[str, ...]
    ranks: dict[str, int]


def joined(
    tensors: Mapping[str, Tensor], targets: tuple[str, ...], layers: tuple[Fused, ...]
) -> Joined:
    """LoRA's factors of parts as factors of the layer that holds them all.

    With factors A_i [r, D] and B_i [n, r] of k parts, the layer's are A, all A_i one below the
    other [k r, D], and B, block-diagonal [k n, k r]: B A is B_i A_i in the rows of part i, to the
    bit, so that nothing is lost. Scaled by alpha / r as before, alpha grows with the rank.

    Args:
        tensors: the adapter by FM name.
        targets: full paths of what carries LoRA's factors.
        layers: the layers of a block that were taken apart.

    Returns:
        The adapter of the vanilla model; without such layers among the targets, the same.
    """
    left = dict(tensors)
    ranks: dict[str, int] = {}
    out: list[str] = []
    for target in targets:
        whole, _, part = target.rpartition(".")
        layer = next((f for f in layers if whole.endswith(f".{f.path}") and part in f.parts), None)
        if layer is None:
            out.append(target)
        elif part == layer.parts[0]:
            paths = [f"{whole}.{name}" for name in layer.parts]
            a = [left.pop(path + _A) for path in paths]
            b = [left.pop(path + _B) for path in paths]
            left[whole + _A], left[whole + _B] = torch.cat(a), torch.block_diag(*b)
            ranks[whole] = sum(len(factor) for factor in a)
            out.append(whole)
    return Joined(left, tuple(out), ranks)


def renamed(adapter: Joined, paths: Mapping[str, str]) -> Joined:
    """An adapter by the names that the vanilla model has for its blocks.

    Args:
        adapter: by the names that they have here.
        paths: the vanilla model's path of each block, by the path here.

    Returns:
        The same tensors.
    """

    def new(name: str) -> str:
        whole, number, rest = name.split(".", 2)
        return f"{paths[f'{whole}.{number}']}.{rest}"

    return Joined(
        {new(name): t for name, t in adapter.tensors.items()},
        tuple(map(new, adapter.targets)),
        {new(path): rank for path, rank in adapter.ranks.items()},
    )


def per_rank(ranks: Mapping[str, int], alpha: float, rank: int) -> dict[str, float]:
    """The alpha of layers with another rank that leaves updates scaled as they were.

    Args:
        ranks: by path.
        alpha: the adapter's.
        rank: the adapter's.

    Returns:
        By path.
    """
    found = {path: alpha * own / rank for path, own in ranks.items()}
    assert all(math.isfinite(value) for value in found.values())
    return found


__all__ = ["Apart", "Fused", "Joined", "joined", "per_rank", "renamed"]
