"""Mean of replies in which only LoRA's B and the head were trained, so that it is the exact mean.

A stays as it was drawn; half of LoRA's bytes are sent back.
Source: FFA-LoRA, arXiv:2403.12313, section 4.
"""

from __future__ import annotations

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation.average import aggregate as average
from fedpft_core.tensors import Tensors

AVERAGES = True


def factors(round: int) -> str:
    """Clients train B in every round.

    Args:
        round: the round's number, from 1.

    Returns:
        `b`.
    """
    return "b"


def aggregate(replies: Replies) -> Tensors:
    """The weighted mean; with one A for all, the mean of the products is the product of the means.

    Args:
        replies: at least one, with the A that was sent.

    Returns:
        Float32 tensors by FM name.
    """
    return average(replies)
