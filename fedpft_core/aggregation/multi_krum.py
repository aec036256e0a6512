"""Multi-Krum: the mean of the replies left when those far from all others are left out."""

from __future__ import annotations

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._geometry import combine, gram, squared_distances
from fedpft_core.aggregation._selection import krum_scores, krum_withstands, ranked
from fedpft_core.tensors import Tensors

withstands = krum_withstands


def aggregate(replies: Replies) -> Tensors:
    """The plain mean of the n - f replies with the smallest Krum scores; each has one vote.

    Source: Blanchard et al., arXiv:1703.02757, section 5.

    Args:
        replies: at least one. `replies.hostile` of them are taken to be hostile, or as many as
            Krum stands among so many.

    Returns:
        Float32 tensors by FM name.
    """
    n = len(replies)
    hostile = min(replies.hostile, withstands(n))
    kept = set(ranked(krum_scores(squared_distances(gram(replies)), hostile))[: n - hostile])
    return combine(replies, [(i in kept) / len(kept) for i in range(n)])
