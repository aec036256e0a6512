"""Logistic regression over all clients' rows, by slopes that they sum (head.descent).

From the head that class statistics give, the loss over all rows is descended, with Nesterov's
momentum, in coordinates in which the features have unit covariance; that is known from the
statistics. There the curvature of the cross-entropy is nowhere above 1/2 (Boehning 1992), so that a
step of 2 needs no search, and a dozen exchanges do what a thousand would in the features' own
coordinates. The way is the one that all rows in one place would take, whatever the partition.

A discriminant is right when classes are Gaussian and alike; with many classes it is far from the
best linear head. But few rows are soon learnt by heart: the head that is taken is the one on the
way, the start among them, with the least loss on labelled rows that no client has.

Shape letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpft_core.head.discriminant import Head, doubt
from fedpft_core.head.slope import Slope
from fedpft_core.head.statistics import Statistics
from fedpft_core.tensors import Tensors

PATIENCE = 3
"""Exchanges without a lower loss after which the descent ends."""

_STEP = 2.0
_RIDGE = 1e-3  # share of the mean variance that is added to every direction's


@dataclass(frozen=True)
class Descent:
    """Where a descent has come to.

    Attributes:
        head: the one with the least loss.
        taken: the exchange after which it was reached; 0 = the start.
        exchanges: how many there were.
        before: loss of the start on the rows that judge; None where there was no descent.
    """

    head: Head
    taken: int = 0
    exchanges: int = 0
    before: float | None = None


def descend(
    start: Head,
    found: Statistics,
    slope: Callable[[Tensors], Slope],
    features: Tensor,
    labels: Tensor,
    most: int,
) -> Descent:
    """Descend the cross-entropy over all clients' rows.

    Args:
        start: the head that the statistics give.
        found: class statistics of all rows.
        slope: asks the clients; given `weight` float64 [C, D] and `bias` [C], the sum over their
            rows.
        features: float64 [N, D] of the rows that judge, at least one.
        labels: int64 [N].
        most: exchanges at most.

    Returns:
        The best head on the way; shrinkage and scale are those of the start.
    """
    mean = found.sums.sum(0) / found.rows
    covariance = found.outer / found.rows - torch.outer(mean, mean)
    level = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    root = torch.linalg.cholesky(
        covariance + _RIDGE * level * torch.eye(len(mean), dtype=torch.float64)
    )

    def turned(weight: Tensor, bias: Tensor) -> Tensor:
        """The head over the features of unit covariance and mean 0, biases last."""
        return torch.cat([weight @ root, (bias + weight @ mean)[:, None]], dim=1)

    def back(line: Tensor) -> Tensors:
        weight = torch.linalg.solve_triangular(root, line[:, :-1], upper=False, left=False)
        return {"weight": weight.contiguous(), "bias": line[:, -1] - weight @ mean}

    def loss(head: Tensors) -> float:
        scores = features @ head["weight"].T + head["bias"]
        return float(F.cross_entropy(scores, labels, label_smoothing=doubt(len(labels))))

    best: Tensors = {"weight": start.weight, "bias": start.bias}
    before = least = loss(best)
    taken = done = 0
    here = last = turned(start.weight, start.bias)
    momentum = 1.0
    while done < most and done - taken < PATIENCE:
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = here + (momentum - 1) / faster * (here - last)
        got = slope(back(ahead))
        sums = got.slope / max(float(got.counts.sum()), 1.0)
        weights = sums[:, :-1] - torch.outer(sums[:, -1], mean)
        weights = torch.linalg.solve_triangular(root, weights.T, upper=False).T
        last, momentum = here, faster
        here = ahead - _STEP * torch.cat([weights, sums[:, -1:]], dim=1)
        done += 1
        now = back(here)
        found_loss = loss(now)
        if found_loss < least:
            best, least, taken = now, found_loss, done
    head = replace(start, weight=best["weight"], bias=best["bias"], loss=least)
    return Descent(head, taken, done, before)
