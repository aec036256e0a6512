"""Mean of the changes, each no longer than the round's median change; the head's norm apart.

A client cannot win by scaling, and it is not left out: rare rows keep their say.
"""

from __future__ import annotations

import torch

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._geometry import combine, gram
from fedpft_core.aggregation._selection import minority
from fedpft_core.aggregation._weights import shares
from fedpft_core.tensors import Tensors

withstands = minority


def aggregate(replies: Replies) -> Tensors:
    """Start + sum_i w_i min(1, m / |d_i|) d_i, with m the median of the norms |d_i|.

    Source: Sun et al., arXiv:1911.07963, section 4, with the bound taken from the round.

    Args:
        replies: at least one; `replies.weights` is what each weighs.

    Returns:
        Float32 tensors by FM name. A change that is too long is shortened on the line from the
        start, so with distances of the product its bound is met to first order.
    """
    norms = gram(replies).diagonal().clamp_min(0).sqrt()
    bound = float(norms.quantile(0.5))
    tiny = torch.finfo(torch.float64).tiny
    scales = (bound / norms.clamp_min(tiny)).clamp_max(1.0)
    return combine(replies, shares(replies.weights), scales.tolist())
