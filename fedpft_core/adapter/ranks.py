"""Adapters of a lower rank: the first components of LoRA's factors, and the rest put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpft_core.tensors import Tensors


def narrowed(tensors: Mapping[str, Tensor], rank: int) -> Tensors:
    """An adapter with the first so many components of LoRA's factors.

    Args:
        tensors: by FM name.
        rank: components kept, at least 1.

    Returns:
        The tensors by name; those that are no factors of LoRA's are the same.
    """
    out: Tensors = {}
    for name, t in tensors.items():
        if name.endswith("lora_A.weight"):
            t = t[:rank].contiguous()
        elif name.endswith("lora_B.weight"):
            t = t[:, :rank].contiguous()
        out[name] = t
    return out


def widened(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensors:
    """An adapter of a lower rank with the components that it lacks taken from another.

    Args:
        tensors: by FM name, as :func:`narrowed` gives them.
        start: of the rank wanted, by the same names.

    Returns:
        The tensors by name, of the shapes of `start`.
    """
    out: Tensors = {}
    for name, t in tensors.items():
        if name.endswith("lora_A.weight"):
            t = torch.cat([t, start[name][len(t) :]])
        elif name.endswith("lora_B.weight"):
            t = torch.cat([t, start[name][:, t.shape[1] :]], dim=1)
        out[name] = t
    return out
