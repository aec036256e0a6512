"""What of a batch a model reads, and which of its positions are real or read by a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Position = Literal["first", "last", "every"]
"""Which positions of a row a head reads: the first, the last real one, or every real one."""


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a model reads.

    Args:
        batch: tensors by name, as `batches` serves them.

    Returns:
        The same tensors without `labels` and `index`. Where rows are packed, positions begin anew
        with each document, which is how the model library tells documents apart, but only where
        no mask is given, so the mask is left out too.
    """
    unread = ("labels", "index", *(("attention_mask",) if _packed(batch) else ()))
    return {k: v for k, v in batch.items() if k not in unread}


def _packed(batch: Mapping[str, Tensor]) -> bool:
    """Whether positions begin anew behind a real one, not only behind padding on the left."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or mask is None:
        return False
    return bool(((positions[:, 1:] == 0) & mask[:, :-1].bool()).any())


def rows_of(batch: Mapping[str, Tensor]) -> int:
    """Rows of a batch, B.

    Args:
        batch: tensors by name, all with rows as their first axis.

    Returns:
        The length of the first tensor's first axis.
    """
    return len(next(iter(batch.values())))


def by_row(x: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """What passes in a block, row by row; some models lay the rows of a batch end to end (OPT).

    Args:
        x: [B, L, N] or [B * L, N].
        batch: the batch it is of.

    Returns:
        [B, L, N], a view.
    """
    return x if x.dim() == 3 else x.view(rows_of(batch), -1, x.shape[-1])


def real_positions(batch: Mapping[str, Tensor], length: int) -> Tensor:
    """Mask of the positions that are not padding; images have none.

    Args:
        batch: a batch with `attention_mask` [B, L], or of images without one.
        length: positions L of a row, read only where the batch has no mask.

    Returns:
        bool [B, L], all true without a mask.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        first = next(iter(batch.values()))
        return torch.ones(len(first), length, dtype=torch.bool, device=first.device)
    return mask.bool()


def at_real(h_BLD: Tensor, real_BL: Tensor) -> Tensor:
    """What stands at the real positions.

    Args:
        h_BLD: what passes in a block [B, L, D].
        real_BL: bool, for one length of all blocks. A block that reads another number of positions
            (in a UNet, which has no padding) has none but real ones.

    Returns:
        [N, D] in row order.
    """
    return h_BLD[real_BL] if h_BLD.shape[1] == real_BL.shape[1] else h_BLD.flatten(0, 1)


def read_at(h_BLD: Tensor, batch: Mapping[str, Tensor], position: Position) -> Tensor:
    """What a head reads of the last block's output.

    Args:
        h_BLD: output of a block [B, L, D].
        batch: the batch it is of.
        position: which positions the head reads.

    Returns:
        [N, D] in row order: N = B rows, or all their real positions with `every`.
    """
    if position == "first":
        return h_BLD[:, 0]
    real_BL = real_positions(batch, h_BLD.shape[1])
    if position == "every":
        return h_BLD[real_BL]
    places = torch.arange(h_BLD.shape[1], device=h_BLD.device)
    last_B = (real_BL * places).argmax(1)
    return h_BLD[torch.arange(len(h_BLD), device=h_BLD.device), last_B]
