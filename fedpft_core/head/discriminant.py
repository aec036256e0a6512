"""A linear head in closed form: the shrunken linear discriminant of class statistics.

With class means mu_c, covariance S within classes and shares p_c, the discriminant's scores are
linear in the features: W_c = S^-1 (mu_c - mu), b_c = -1/2 (mu_c + mu)^T W_c + log p_c. They are
the class posteriors of equal-covariance Gaussians up to a constant, so that tuning can go on from
them with cross-entropy. (The mean mu of all rows is taken off for the sake of rounding; scores of
one row all move by the same number.)

Two things are corrected. S is noisy where rows are few: it is shrunk towards a multiple of the
identity, by the oracle-approximating share of Chen et al. (2010, "Shrinkage Algorithms for MMSE
Covariance Estimation"), which needs nothing but S and N, or by a share that is given. And features
are not Gaussian: on 77 classes the scores are right but ten times too sure. Where there are
labelled rows to judge by, share and temperature are those with the least cross-entropy on them.
Few rows are soon all right, and would then ask for scores without bounds: below `FEW` of them, the
answer of each is believed only as far as Laplace's rule of succession allows.

Shape letters: N rows, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpft_core.head.mapped import steadiest
from fedpft_core.head.statistics import Statistics

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Shrinkage shares tried where there are rows to judge by, beside the one computed."""

TEMPERATURES = tuple(float(t) for t in torch.logspace(0, -2, 17, dtype=torch.float64))
"""Factors of the scores tried likewise: from 1 down to 1/100."""

FEW = 30
"""Labelled rows below which the answers to judge by are smoothed."""

_LEAST_FACTOR, _MOST_FACTOR = 1e-2, 10.0
_FINE = 1e-4  # of the factor's logarithm
_LEAST_SHARE = 1e-9
_LEAST_LEVEL = 1e-3


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer, and how it was found.

    Attributes:
        weight: float64 [C, D].
        bias: float64 [C].
        shrinkage: share of the identity in the covariance.
        scale: factor of the scores.
        loss: mean cross-entropy on the rows it was judged by, whose answers are smoothed where they
            are few; None without any.
        one: float64 [D], u with u x ~ 1: what takes the place of a bias in a layer without one.
    """

    weight: Tensor
    bias: Tensor
    one: Tensor
    shrinkage: float
    scale: float = 1.0
    loss: float | None = None


def oracle_shrinkage(covariance: Tensor, rows: int) -> float:
    """The share of the identity that approximates the best one (Chen et al. 2010, equation 23).

    Args:
        covariance: float64 [D, D].
        rows: N, the rows it was estimated from.

    Returns:
        A share in [0, 1]; 1 where the covariance is a multiple of the identity or zero.
    """
    d = len(covariance)
    trace = float(covariance.diagonal().sum())
    square = float(covariance.square().sum())
    above = (1 - 2 / d) * square + trace**2
    below = (rows + 1 - 2 / d) * (square - trace**2 / d)
    return min(1.0, above / below) if below > 0 else 1.0


def solve(found: Statistics, shrinkage: float | None = None) -> Head:
    """The discriminant of some class statistics.

    A class nobody has gets the mean of all rows and the share of half a row; a feature that never
    moves has no say.

    Args:
        found: statistics of at least one row.
        shrinkage: share of the identity, more than 0 and at most 1; None computes it.

    Returns:
        The head, unscaled.

    Raises:
        ValueError: there is no row.
    """
    weight, bias, share, mixed = _solved(found, shrinkage)
    mu, overall = found.means(), found.sums.sum(0) / found.rows
    # Over all rows: along this direction classes must not differ either.
    shares = found.counts.to(torch.float64)[:, None] / found.rows
    between = (mu - overall).T @ (shares * (mu - overall))
    one = steadiest(mixed + between, overall)
    return Head(weight.contiguous(), bias, one, share)


def line(found: Statistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weights and bias of :func:`solve`, to the bit, for half of the work.

    Args:
        found: statistics of at least one row.
        shrinkage: share of the identity, more than 0 and at most 1.

    Returns:
        Weights float64 [C, D] and bias [C], unscaled.

    Raises:
        ValueError: there is no row.
    """
    weight, bias, _, _ = _solved(found, shrinkage)
    return weight, bias


def _solved(found: Statistics, shrinkage: float | None) -> tuple[Tensor, Tensor, float, Tensor]:
    """Weights, bias, the share taken, and the covariance within classes, shrunken by it."""
    if not found.rows:
        raise ValueError("there are no rows to fit a head to")
    covariance = found.within()
    share = oracle_shrinkage(covariance, found.rows) if shrinkage is None else shrinkage
    mu, overall = found.means(), found.sums.sum(0) / found.rows
    # One row a class leaves no spread within classes; that of all rows then sets the level.
    spread = found.outer.diagonal() / found.rows - overall.square()
    level = covariance.diagonal().mean().clamp_min(_LEAST_LEVEL * spread.mean())
    level = level.clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(covariance), dtype=torch.float64)
    # Not less than rounding leaves of a direction without any spread.
    mixed = (1 - share) * covariance + max(share, _LEAST_SHARE) * level * eye
    weight = torch.linalg.solve(mixed, (mu - overall).T).T
    prior = (found.counts + 0.5) / (found.rows + 0.5 * len(found.counts))
    bias = prior.log() - 0.5 * (weight * (mu + overall)).sum(1)
    return weight, bias, share, mixed


def scores(head: Head, features: Tensor) -> Tensor:
    """Class scores of some rows.

    Args:
        head: the linear layer.
        features: float64 [N, D].

    Returns:
        float64 [N, C].
    """
    return features @ head.weight.T + head.bias


def doubt(rows: int) -> float:
    """How far the answers of some rows are smoothed before a head is judged by them.

    By the rule of succession, a head that is right on all of N rows is wrong on the next one with
    probability 1 / (N + 2).

    Args:
        rows: N.

    Returns:
        The share of the uniform distribution in each answer; 0 from `FEW` rows on.
    """
    return 1 / (rows + 2) if rows < FEW else 0.0


def suited(loss: Callable[[float], float]) -> float:
    """The factor of some scores with the least loss, which is convex in it.

    Finer than `TEMPERATURES`: of two heads the one that the grid suits better must not seem better.

    Args:
        loss: mean loss of the rows at a factor.

    Returns:
        A factor from 1/100 to 10.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda power: loss(math.exp(power)), method="bounded",
        bounds=(math.log(_LEAST_FACTOR), math.log(_MOST_FACTOR)), options={"xatol": _FINE},
    )  # fmt: skip
    return math.exp(float(found.x))


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, at the factor of the scores that suits the rows best.

    Args:
        scores: float64 [N, C].
        labels: int64 [N], at least one.

    Returns:
        float64 [N]; the answers are smoothed where they are few, as in :func:`fitted`.
    """
    each = partial(F.cross_entropy, target=labels, label_smoothing=doubt(len(labels)))
    factor = suited(lambda tried: float(each(scores * tried)))
    return each(scores * factor, reduction="none")


def fitted(
    found: Statistics,
    features: Tensor,
    labels: Tensor,
    shares: Sequence[float] = SHARES,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Head:
    """The discriminant whose shrinkage and scale suit some labelled rows best.

    Args:
        found: statistics of the rows to learn from.
        features: float64 [N, D] of the rows to judge by, which are no part of `found`.
        labels: int64 [N].
        shares: shrinkage tried beside the computed one.
        temperatures: scales tried.

    Returns:
        The head with the least mean cross-entropy on those rows; the computed one where there are
        no rows.
    """
    if not len(labels):
        return solve(found)

    def loss(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=doubt(len(labels)))

    return least_loss(partial(solve, found), loss, features, shares, temperatures)


def least_loss(
    solved: Callable[[float | None], Head],
    loss: Callable[[Tensor], Tensor],
    features: Tensor,
    shares: Sequence[float] = SHARES,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Head:
    """The head of all shrinkages and scales tried whose scores suit some rows best.

    Args:
        solved: gives the unscaled head at a shrinkage; at None at the computed one.
        loss: of the rows' scores [N, C], a scalar.
        features: float64 [N, D] of the rows.
        shares: shrinkage tried beside the computed one.
        temperatures: scales tried, at least one.

    Returns:
        The first head, scaled, of those with the least loss.
    """
    best: Head | None = None
    for share in (None, *shares):
        head = solved(share)
        raw = scores(head, features)
        for scale in temperatures:
            found = float(loss(raw * scale))
            if best is None or best.loss is None or found < best.loss:
                best = replace(
                    head,
                    weight=head.weight * scale,
                    bias=head.bias * scale,
                    scale=scale,
                    loss=found,
                )
    assert best is not None
    return best
