"""Mean of replies in which LoRA's B and A are trained in turn, B in odd rounds, beside the head.

Whatever the round, one factor is the same for all, so that the mean is exact, and both move.
Source: RoLoRA, arXiv:2502.01755, section 3.
"""

from __future__ import annotations

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation.average import aggregate as average
from fedpft_core.tensors import Tensors

AVERAGES = True


def factors(round: int) -> str:
    """Clients train B first, since A has no gradient while B is zero.

    Args:
        round: the round's number, from 1.

    Returns:
        `b` in odd rounds, `a` in even ones.
    """
    return "b" if round % 2 else "a"


def aggregate(replies: Replies) -> Tensors:
    """The weighted mean; with one factor the same for all it is that of the products.

    Args:
        replies: at least one, with one factor as it was sent.

    Returns:
        Float32 tensors by FM name.
    """
    return average(replies)
