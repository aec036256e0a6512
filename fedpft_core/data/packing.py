"""Packing the rows of a batch: several documents a row, none of which sees another.

Rows of uneven length waste a step on padding. A packed batch has the same documents in fewer rows.
`position_ids` begin at 0 with each document; a decoder of the model library that is given them and
no attention mask lets each position read only those before it in its own document (a block-diagonal
causal mask). Losses are those of the unpacked batch, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpft_core.data.encoded import UNLEARNED


def pack(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the documents of a batch into as few rows as they need.

    The longest come first, and each goes into the first row with room for it (first fit
    decreasing). Rows are as long as the longest document.

    Args:
        batch: `input_ids`, `attention_mask` and perhaps `labels`, each int64 [B, L], padded on the
            right.

    Returns:
        The same names, int64 [b, L] with b <= B, and `position_ids`. The first token of a document
        is never learned: what stands before it is another. The given batch, without its `index`,
        where packing saves no row.
    """
    length = batch["attention_mask"].sum(1).tolist()
    width = batch["input_ids"].shape[1]
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(length)), key=lambda i: -length[i]):
        fits = next((r for r, left in enumerate(room) if left >= length[i]), len(rows))
        if fits == len(rows):
            rows.append([])
            room.append(width)
        rows[fits].append(i)
        room[fits] -= length[i]
    named = {k: v for k, v in batch.items() if k != "index"}
    if len(rows) == len(length):
        return named
    # Padding is one more document, at each row's end.
    ends = [[length[i] for i in row] + [left] for row, left in zip(rows, room, strict=True)]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in ends]
    out = {"position_ids": torch.stack(positions).to(batch["input_ids"].device)}
    for name, value in named.items():
        filler = UNLEARNED if name == "labels" else 0
        made = value.new_full((len(rows), width), filler)
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                made[r, at : at + length[i]] = value[i, : length[i]]
                at += length[i]
        out[name] = made
    if "labels" in out:
        out["labels"] = out["labels"].masked_fill(out["position_ids"] == 0, UNLEARNED)
    return out


__all__ = ["pack"]
