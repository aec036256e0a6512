"""Coordinate-wise median, which a minority of odd replies cannot move far.

Every value of the next adapter is the median of that value over the replies; of an even number
the mean of the middle two. Each client has one vote: how many examples it has is ignored.
After Yin et al., Byzantine-Robust Distributed Learning (arXiv:1803.01498), algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._selection import minority
from fedpft_core.tensors import Tensors

withstands = minority


def aggregate(replies: Replies) -> Tensors:
    """The median of each value over the replies.

    Source: Yin et al., arXiv:1803.01498, algorithm 1.

    Args:
        replies: at least one. Their examples are not looked at.

    Returns:
        Float32 tensors by FM name.
    """
    return replies.coordinatewise(median)


def median(values: Tensor) -> Tensor:
    """The median of each column; the mean of the middle two is taken in float64.

    Args:
        values: float32 [replies, n].

    Returns:
        float32 [n].
    """
    ordered = values.sort(dim=0).values
    n = len(ordered)
    return ordered[(n - 1) // 2 : n // 2 + 1].double().mean(0).float()
