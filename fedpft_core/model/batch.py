"""What of a batch a model reads, and which of its positions are real."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a model reads."""
    return {k: v for k, v in batch.items() if k not in ("labels", "index")}


def real_positions(batch: Mapping[str, Tensor], length: int) -> Tensor:
    """Mask [B, L] of positions that are not padding; images have none."""
    mask = batch.get("attention_mask")
    if mask is None:
        first = next(iter(batch.values()))
        return torch.ones(len(first), length, dtype=torch.bool, device=first.device)
    return mask.bool()
