"""Geometric median: the point with the smallest sum of distances to all replies.

Each client has one vote, and none can pull harder than with the length of one: a reply counts by
its direction alone, however far away it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._geometry import combine, gram
from fedpft_core.aggregation._selection import minority
from fedpft_core.tensors import Tensors

_STEPS = 1000
_CLOSE = 1e-9  # largest change of a coefficient in a last step
_SMOOTH = 1e-6  # least distance that is divided by, as a share of the replies' median norm


withstands = minority


def aggregate(replies: Replies) -> Tensors:
    """The geometric median of the changes, by Weiszfeld's steps on their Gram matrix.

    Every iterate is a mean of the replies, so its distance to each of them follows from their
    inner products; the replies are read twice, whatever number of steps it takes.
    Source: Pillutla et al., arXiv:1912.13445, algorithm 2 (smoothed Weiszfeld).

    Args:
        replies: at least one.

    Returns:
        Float32 tensors by FM name: the mean of the replies with the median's coefficients.
    """
    return combine(replies, coefficients(gram(replies)))


def coefficients(inner: Tensor) -> list[float]:
    """What each point counts in the geometric median of all.

    Args:
        inner: the points' Gram matrix, float64 [N, N].

    Returns:
        N numbers of at least 0 that sum to 1.
    """
    n = len(inner)
    norms = inner.diagonal().clamp_min(0)
    least = _SMOOTH * float(norms.sqrt().median()) + torch.finfo(torch.float64).tiny
    c = torch.full((n,), 1 / n, dtype=torch.float64)
    for _ in range(_STEPS):
        # |x_i - z|^2 for z = sum_j c_j x_j
        towards = inner @ c
        squares = (norms - 2 * towards + c @ towards).clamp_min(0)
        pull = 1 / squares.sqrt().clamp_min(least)
        new = pull / pull.sum()
        moved = float((new - c).abs().max())
        c = new
        if moved < _CLOSE:
            break
    return c.tolist()
