"""Largest changes of each reply, of which those with the elected sign are averaged (TIES).

Of every reply's change of the adapter the share federation.density of values, those of largest
magnitude, is kept. For every value the sign of the weighted sum is elected, and the weighted mean
is over the replies that agree with it.
Source: Yadav et al., arXiv:2306.01708, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fedpft_core.aggregation import Replies
from fedpft_core.tensors import Tensors


def aggregate(replies: Replies) -> Tensors:
    """Two passes over the replies: elect the signs, then average what agrees with them.

    Args:
        replies: at least one; `replies.weights` is what each weighs. Memory is a few adapters.

    Returns:
        Float32 tensors by FM name.
    """
    start = {k: t.double() for k, t in replies.start.items()}
    elected = {k: torch.zeros_like(t) for k, t in start.items()}
    for change, weight in _trimmed(replies, start):
        for k, t in change.items():
            elected[k] += weight * t
    total = {k: torch.zeros_like(t) for k, t in start.items()}
    weights = {k: torch.zeros_like(t) for k, t in start.items()}
    for change, weight in _trimmed(replies, start):
        for k, t in change.items():
            agrees = (t != 0) & (t.sign() == elected[k].sign())
            total[k] += torch.where(agrees, weight * t, 0.0)
            weights[k] += torch.where(agrees, weight, 0.0)
    return {
        k: (t + total[k] / torch.where(weights[k] > 0, weights[k], 1.0)).to(torch.float32)
        for k, t in start.items()
    }


def _trimmed(replies: Replies, start: Tensors) -> Iterator[tuple[Tensors, float]]:
    """The largest changes of each reply, float64, the others zero; and its weight."""
    for adapter, weight in replies:
        change = {k: adapter[k].double() - t for k, t in start.items()}
        size = torch.cat([t.abs().flatten() for t in change.values()])
        keep = max(1, round(replies.settings.density * len(size)))
        least = size.kthvalue(len(size) - keep + 1).values
        yield {k: torch.where(t.abs() >= least, t, 0.0) for k, t in change.items()}, weight
