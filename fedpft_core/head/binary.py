"""A linear head for labels that may hold at once: a shrunken linear discriminant for each label.

For label k with share p, means mu_1 of the rows that have it and mu_0 of those that have not, and
covariance S_k within the two, W_k = S_k^-1 (mu_1 - mu_0) and b_k = -1/2 (mu_1 + mu_0)^T W_k +
log(p / (1 - p)) are the log odds of equal-covariance Gaussians: what a sigmoid reads. S_k is the
covariance of all rows less p (1 - p) (mu_1 - mu_0)(mu_1 - mu_0)^T, so that one matrix is solved
for all labels (Sherman and Morrison). Shrinkage and temperature are those of `discriminant`.

Shape letters: N rows, D features, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpft_core.head.discriminant import SHARES, Head, doubt, least_loss, oracle_shrinkage, suited
from fedpft_core.head.mapped import steadiest
from fedpft_core.head.moments import Moments

_LEAST_SHARE = 1e-9


def solve(found: Moments, shrinkage: float | None = None) -> Head:
    """The discriminants of some sums.

    A label that no row has, or that every row has, gets the log odds of half a row alone.

    Args:
        found: sums over at least one row, each number 0 or 1.
        shrinkage: share of the identity, more than 0 and at most 1; None computes it.

    Returns:
        The head, unscaled.

    Raises:
        ValueError: there is no row.
    """
    weight, bias, share, covariance, level = _solved(found, shrinkage)
    eye = torch.eye(len(covariance), dtype=torch.float64)
    mean = found.features / found.rows
    steady = steadiest(covariance + _LEAST_SHARE * level * eye, mean)
    return Head(weight.contiguous(), bias, steady, share)


def line(found: Moments, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weights and biases of :func:`solve`, to the bit, for half of the work.

    Args:
        found: sums over at least one row, each number 0 or 1.
        shrinkage: share of the identity, more than 0 and at most 1.

    Returns:
        Weights float64 [K, D] and biases [K], unscaled.

    Raises:
        ValueError: there is no row.
    """
    weight, bias, *_ = _solved(found, shrinkage)
    return weight, bias


def _solved(
    found: Moments, shrinkage: float | None
) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    """Weights, biases, the share taken, the features' covariance, and their mean variance."""
    if not found.rows:
        raise ValueError("there are no rows to fit a head to")
    n, have = found.rows, found.labels
    covariance = found.scatter()
    share = oracle_shrinkage(covariance, n) if shrinkage is None else shrinkage
    lack = n - have
    known = ((have > 0) & (lack > 0))[:, None]
    one = found.cross / have.clamp_min(1)[:, None]
    zero = (found.features - found.cross) / lack.clamp_min(1)[:, None]
    apart = torch.where(known, one - zero, 0.0)
    level = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(covariance), dtype=torch.float64)
    mixed = (1 - share) * covariance + max(share, _LEAST_SHARE) * level * eye
    solved = torch.linalg.solve(mixed, apart.T).T
    between = (1 - share) * (have / n) * (lack / n)
    # Above 0 but for rounding: the covariance within has no negative direction.
    left = (1 - between * (solved * apart).sum(1)).clamp_min(_LEAST_SHARE)
    weight = solved / left[:, None]
    bias = ((have + 0.5) / (lack + 0.5)).log() - 0.5 * (weight * (one + zero)).sum(1)
    return weight, bias, share, covariance, level


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each row, at the factor of the scores that suits the rows best.

    Args:
        scores: float64 [N, K].
        labels: float [N, K], 0 or 1.

    Returns:
        float64 [N], means over the labels, which are smoothed where rows are few, as in
        :func:`fitted`.
    """
    unsure = doubt(len(labels))
    y = labels.to(scores) * (1 - unsure) + unsure / 2
    each = partial(F.binary_cross_entropy_with_logits, target=y)
    factor = suited(lambda tried: float(each(scores * tried)))
    return each(scores * factor, reduction="none").mean(1)


def fitted(
    found: Moments, features: Tensor, labels: Tensor, shares: Sequence[float] = SHARES
) -> Head:
    """The discriminants whose shrinkage and scale suit some labelled rows best.

    Args:
        found: sums over the rows to learn from.
        features: float64 [N, D] of the rows to judge by, which are no part of `found`.
        labels: float [N, K], 0 or 1.
        shares: shrinkage tried beside the computed one.

    Returns:
        The head with the least mean binary cross-entropy on those rows; the computed one where
        there are no rows.
    """
    if not len(labels):
        return solve(found)
    unsure = doubt(len(labels))
    y = labels.to(features) * (1 - unsure) + unsure / 2

    def loss(scores: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, y)

    return least_loss(partial(solve, found), loss, features, shares)
