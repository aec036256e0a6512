"""Who is whose neighbour: in a circle of random order the next few on both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence


def degree_for(count: int) -> int:
    """Neighbours of each client, where nothing else is asked for.

    Args:
        count: clients.

    Returns:
        All others up to 16, then four times the binary logarithm: 28 for 100, 40 for 1,000.
    """
    return min(count - 1, max(16, 4 * math.ceil(math.log2(max(count, 2)))))


def neighbours(order: Sequence[int], degree: int) -> dict[int, tuple[int, ...]]:
    """A graph of one degree that stays whole when a few are gone.

    Source: the Harary graph of Bell et al. 2020, section 3.

    Args:
        order: the clients in a random order.
        degree: neighbours of each; an odd number is rounded up, and with too few others all are.

    Returns:
        By client its neighbours, ascending; a is b's whenever b is a's.
    """
    n, half = len(order), (degree + 1) // 2
    if 2 * half >= n - 1:
        return {a: tuple(sorted(b for b in order if b != a)) for a in order}
    steps = [s for s in range(-half, half + 1) if s]
    return {a: tuple(sorted(order[(i + s) % n] for s in steps)) for i, a in enumerate(order)}


def threshold_for(degree: int, share: float) -> int:
    """Shares needed to rebuild a secret.

    Args:
        degree: neighbours who hold one each.
        share: the part of them that is needed.

    Returns:
        More than half of them, so that the server cannot tell one half that a client has answered
        and the other that it has not; at most all.
    """
    return min(degree, max(degree // 2 + 1, math.ceil(share * degree)))
