"""A linear head of regression in closed form: ridge regression from sums over rows.

With the covariance S of the features, covariances c_k of number k with them and means mu and m,
W_k = (S + r l I)^-1 c_k and b_k = m_k - W_k mu, where l is the mean variance of a feature and r the
share. The share is the one with the least squared error on labelled rows where there are any, and
else the one that generalised cross-validation prefers (Golub, Heath and Wahba 1979), which needs
nothing but the sums.

Shape letters: N rows, D features, K numbers a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedpft_core.head.discriminant import Head, scores
from fedpft_core.head.mapped import steadiest
from fedpft_core.head.moments import Moments

SHARES = tuple(float(r) for r in torch.logspace(-5, 1, 19, dtype=torch.float64))
"""Shares tried, of the features' mean variance."""


def solve(found: Moments, share: float | None = None) -> Head:
    """Ridge regression of some sums.

    Args:
        found: sums over at least one row.
        share: pull towards 0 as a share of the features' mean variance, above 0; None takes the
            one of `SHARES` with the least generalised cross-validation error.

    Returns:
        The head.

    Raises:
        ValueError: there is no row.
    """
    if not found.rows:
        raise ValueError("there are no rows to fit a head to")
    return _solved(found, share, *_spectrum(found))


def fitted(found: Moments, features: Tensor, labels: Tensor, share: float | None = None) -> Head:
    """The ridge regression whose share suits some labelled rows best.

    Args:
        found: sums over the rows to learn from.
        features: float64 [N, D] of the rows to judge by, which are no part of `found`.
        labels: float [N] or [N, K].
        share: taken instead of any of `SHARES`; None for none.

    Returns:
        The head with the least mean squared error on those rows, which is its loss; that of
        :func:`solve` where there are no rows.
    """
    if not len(labels):
        return solve(found, share)
    y = labels.to(features).reshape(len(features), -1)
    spectrum = _spectrum(found)
    best: Head | None = None
    for tried in (None, *SHARES) if share is None else (share,):
        head = _solved(found, tried, *spectrum)
        loss = float((scores(head, features) - y).square().mean())
        if best is None or best.loss is None or loss < best.loss:
            best = replace(head, loss=loss)
    assert best is not None
    return best


def line(found: Moments, share: float) -> tuple[Tensor, Tensor]:
    """Weights and bias of :func:`solve` but for rounding, without the eigenvalues.

    Args:
        found: sums over at least one row.
        share: pull towards 0 as a share of the features' mean variance, above 0.

    Returns:
        Weights float64 [K, D] and bias [K].

    Raises:
        ValueError: there is no row.
    """
    if not found.rows:
        raise ValueError("there are no rows to fit a head to")
    spread = found.scatter()
    level = float(spread.diagonal().mean()) or 1.0
    pulled = spread + share * level * torch.eye(len(spread), dtype=torch.float64)
    weight = torch.linalg.solve(pulled, found.covariance().T).T
    mu, mean = found.features / found.rows, found.labels / found.rows
    return weight, mean - weight @ mu


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each row, which :func:`fitted` takes the mean of.

    Args:
        scores: float64 [N, K].
        labels: float [N] or [N, K].

    Returns:
        float64 [N], means over the numbers.
    """
    return (scores - labels.to(scores).reshape(len(scores), -1)).square().mean(1)


def _spectrum(found: Moments) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not below 0, and eigenvectors of the features' covariance."""
    values, vectors = torch.linalg.eigh(found.scatter())
    return values.clamp_min(0), vectors


def _solved(found: Moments, share: float | None, values: Tensor, vectors: Tensor) -> Head:
    # Features that never move leave nothing to pull by; any pull then gives 0.
    level = float(values.mean()) or 1.0
    turned = found.covariance() @ vectors  # [K, D]
    if share is None:
        share = min(SHARES, key=lambda r: _cross_validated(found, turned, values, r * level))
    weight = (turned / (values + share * level)) @ vectors.T
    mu, mean = found.features / found.rows, found.labels / found.rows
    one = steadiest((vectors * (values + share * level)) @ vectors.T, mu)
    return Head(weight.contiguous(), mean - weight @ mu, one, share)


def _cross_validated(found: Moments, turned: Tensor, values: Tensor, pull: float) -> float:
    """Mean over the numbers of the generalised cross-validation error, each over its variance."""
    kept = values / (values + pull)
    # 1 for the mean; at least half a row must be left over.
    free = max(found.rows - 1 - float(kept.sum()), 0.5)
    explained = (turned.square() / (values + pull) * (2 - kept)).sum(1)
    left = (found.variance() - explained).clamp_min(0)
    spread = found.variance().clamp_min(torch.finfo(torch.float64).tiny)
    return float((left / spread).mean()) * (found.rows / free) ** 2
