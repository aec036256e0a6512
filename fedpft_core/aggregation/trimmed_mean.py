"""Coordinate-wise mean without the largest and smallest values, federation.attackers on each side.

Each client has one vote: weights are not looked at.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._selection import minority
from fedpft_core.tensors import Tensors

withstands = minority


def aggregate(replies: Replies) -> Tensors:
    """The trimmed mean of every value.

    Source: Yin et al., arXiv:1803.01498, algorithm 1, option II.

    Args:
        replies: at least one. `replies.hostile` values are cut off on each side, or as many as
            leave one.

    Returns:
        Float32 tensors by FM name.
    """
    cut = min(replies.hostile, withstands(len(replies)))
    return replies.coordinatewise(partial(trimmed, cut=cut))


def trimmed(values: Tensor, cut: int) -> Tensor:
    """The mean of each column without `cut` values at either end.

    Args:
        values: float32 [replies, n].
        cut: fewer than half of the replies.

    Returns:
        float32 [n], the mean taken in float64.
    """
    return values.sort(dim=0).values[cut : len(values) - cut].double().mean(0).float()
