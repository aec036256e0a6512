"""How many hostile replies rules stand, and Krum's score: how near a reply's neighbours are."""

from __future__ import annotations

import torch
from torch import Tensor


def minority(replies: int) -> int:
    """How many hostile replies a rule stands that no minority can move far: fewer than half.

    Args:
        replies: how many there are.

    Returns:
        The largest number below half of them.
    """
    return max(0, (replies - 1) // 2)


def krum_withstands(replies: int) -> int:
    """How many hostile replies Krum stands: n >= 2 f + 3.

    Source: Blanchard et al., arXiv:1703.02757, proposition 4.2.

    Args:
        replies: n, how many there are.

    Returns:
        f; 0 for too few.
    """
    return max(0, (replies - 3) // 2)


def krum_scores(distances: Tensor, hostile: int) -> Tensor:
    """The sum of the squares of a reply's distances to its n - f - 2 nearest others.

    Source: Blanchard et al., arXiv:1703.02757, section 4.

    Args:
        distances: squares of distances, float64 [N, N], zeros on the diagonal.
        hostile: f, how many replies are taken to be hostile.

    Returns:
        float64 [N]; the smaller, the more neighbours a reply has.
    """
    n = len(distances)
    near = min(max(n - hostile - 2, 1), n - 1)
    if near < 1:
        return torch.zeros(n, dtype=torch.float64)
    others = distances.clone().fill_diagonal_(torch.inf)
    return others.sort(dim=1).values[:, :near].sum(dim=1)


def ranked(scores: Tensor) -> list[int]:
    """Positions by score, the smallest first; of equal ones the first.

    Args:
        scores: float64 [N].

    Returns:
        N positions.
    """
    return [int(i) for i in torch.argsort(scores, stable=True)]
