"""Krum: the one reply that lies closest to its neighbours, as it is."""

from __future__ import annotations

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._geometry import combine, gram, squared_distances
from fedpft_core.aggregation._selection import krum_scores, krum_withstands, ranked
from fedpft_core.tensors import Tensors

withstands = krum_withstands


def aggregate(replies: Replies) -> Tensors:
    """The reply with the smallest sum of distances to its nearest others.

    Source: Blanchard et al., arXiv:1703.02757, section 4.

    Args:
        replies: at least one. `replies.hostile` of them are taken to be hostile, or as many as
            Krum stands among so many.

    Returns:
        Float32 tensors by FM name.
    """
    hostile = min(replies.hostile, withstands(len(replies)))
    best = ranked(krum_scores(squared_distances(gram(replies)), hostile))[0]
    return combine(replies, [float(i == best) for i in range(len(replies))])
