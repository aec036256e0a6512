"""Exact mean of LoRA's products at the sum of the clients' ranks (one-shot only).

Nothing is left out: the server's FM, and the sub-FM beside it, get an adapter whose rank is that of
all clients together, at the same scaling; the head is averaged. The rank grows with every merge, so
that only one can be made.
"""

from __future__ import annotations

import torch

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._product import pairs, stack
from fedpft_core.aggregation._weights import shares
from fedpft_core.aggregation.average import aggregate as average
from fedpft_core.tensors import Tensors

GROWS = True


def aggregate(replies: Replies) -> Tensors:
    """Stack the factors of every layer, B's weighted; average everything else.

    Source: FLoRA, arXiv:2409.05976, section 3.2.

    Args:
        replies: at least one; `replies.weights` is what each weighs. Memory is the result.

    Returns:
        Float32 tensors by FM name; LoRA's have the ranks of all replies together.
    """
    out = average(replies)
    parts = shares(replies.weights)
    layers = pairs(out)
    # Components that a client of a lower rank does not have are zero in all of its B.
    ranks = [1] * len(replies)
    for _, name_b in layers:
        for i, b in enumerate(replies.stacked(name_b)):
            used = b.any(dim=0).nonzero()
            ranks[i] = max(ranks[i], int(used.max()) + 1 if len(used) else 1)
    for name_a, name_b in layers:
        factors = [
            (part, b[:, :rank], a[:rank])
            for part, b, a, rank in zip(
                parts, replies.stacked(name_b), replies.stacked(name_a), ranks, strict=True
            )
        ]
        b, a = stack(factors)
        out[name_a], out[name_b] = a.to(torch.float32), b.to(torch.float32)
    return out
