"""Exact mean of LoRA's products, cut to rank r; the head is averaged.

The mean of A and the mean of B do not multiply to the mean of B A. Here that mean is formed from
the clients' stacked factors, and the best approximation of rank r taken of it. What that leaves out
is reported as `discarded`: the share of the squared singular values, over all layers.
"""

from __future__ import annotations

import torch

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._product import pairs, stack, truncate
from fedpft_core.aggregation._weights import shares
from fedpft_core.aggregation.average import aggregate as average
from fedpft_core.tensors import Tensors


def aggregate(replies: Replies) -> Tensors:
    """Average products layer by layer, and everything else as it is.

    Args:
        replies: at least one; `replies.weights` is what each weighs. Memory is one layer of all.

    Returns:
        Float32 tensors by FM name, of the ranks that the clients were sent.
    """
    out = average(replies)
    parts = shares(replies.weights)
    lost = total = 0.0
    for name_a, name_b in pairs(out):
        factors = zip(parts, replies.stacked(name_b), replies.stacked(name_a), strict=True)
        b, a = stack(list(factors))
        b, a, (left_out, all_of_it) = truncate(b, a, len(out[name_a]))
        out[name_a], out[name_b] = a.to(torch.float32), b.to(torch.float32)
        lost, total = lost + left_out, total + all_of_it
    replies.figures["discarded"] = lost / total if total else 0.0
    return out
