"""FLTrust: changes count by how far they point where the server's own change points.

The server trains an adapter of its own on its validation rows, from the same start. A reply that
points away from it counts nothing, the others by the cosine, and each is taken as long as the
server's own.
"""

from __future__ import annotations

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._geometry import combine, gram
from fedpft_core.tensors import Tensors

NEEDS_OWN = True


def withstands(replies: int) -> int:
    """How many hostile replies the rule stands: all but one.

    Args:
        replies: how many there are.

    Returns:
        One fewer.
    """
    return max(0, replies - 1)


def aggregate(replies: Replies) -> Tensors:
    """Start + sum_i t_i (|d_0| / |d_i|) d_i / sum_i t_i, with t_i = max(0, cos(d_i, d_0)).

    Source: Cao et al., arXiv:2012.13995, algorithm 2.

    Args:
        replies: at least one, with `replies.settings.own`.

    Returns:
        Float32 tensors by FM name; the start itself where no reply points the server's way.

    Raises:
        ValueError: the server has no update of its own.
    """
    if replies.settings.own is None:
        raise ValueError("fltrust needs an update of the server's own")
    inner = gram(replies, [replies.settings.own()])
    norms = inner.diagonal().clamp_min(0).sqrt().tolist()
    own, theirs = norms[-1], norms[:-1]
    trust = [
        max(0.0, float(inner[i, -1]) / (own * norm)) if own * norm else 0.0
        for i, norm in enumerate(theirs)
    ]
    total = sum(trust)
    if not total:
        return combine(replies, [0.0] * len(theirs))
    return combine(
        replies,
        [t / total for t in trust],
        [own / norm if norm else 0.0 for norm in theirs],
    )
