"""The middle between the smallest and the largest of each value; weights are ignored."""

from __future__ import annotations

from torch import Tensor

from fedpft_core.aggregation import Replies
from fedpft_core.tensors import Tensors


def aggregate(replies: Replies) -> Tensors:
    """The midrange of every value.

    Args:
        replies: the clients' adapters, at least one.

    Returns:
        The next adapter, float32.
    """
    return replies.coordinatewise(middle)


def middle(values: Tensor) -> Tensor:
    """The mean of the smallest and the largest reply.

    Args:
        values: float32 [replies, n].

    Returns:
        float32 [n].
    """
    return (values.amin(0) + values.amax(0)) / 2
