"""Class statistics taken from the sub-FM's features to the FM's.

Clients know the features phi_S that the sub-FM has; the product reads the FM's, phi_T. On rows
that both models can read, labels or not, the owner fits phi_T ~ M phi_S + m and takes the sums
over: mu_T = M mu_S + m, S_T = M S_S M^T + E, with E the covariance of what the map leaves over. So
no weight is mapped, only sums are, and where the map is poor the covariance says so.

Shape letters: N rows, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpft_core.head.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Map:
    """y ~ (x - mean_x) turn + mean_y for features x of one model and y of another.

    Attributes:
        turn: float64 [D, D].
        mean_x: float64 [D].
        mean_y: float64 [D].
        error_before: mean squared distance of x from y over the variance of y.
        error_after: the same of x mapped.
        one: float64 [D], u with u x ~ 1: what takes the place of a bias in a layer without one.
    """

    turn: Tensor
    mean_x: Tensor
    mean_y: Tensor
    error_before: float
    error_after: float
    one: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Features [N, D] of the one model, as the other would have them."""
        return (x - self.mean_x) @ self.turn + self.mean_y


def fit(x: Tensor, y: Tensor, ridge: float, prior: Tensor | None = None) -> Map:
    """Least squares with a pull towards what is known before: with few rows little is turned.

    Args:
        x: float64 [N, D], features of the rows in the one model.
        y: float64 [N, D], features of the same rows in the other.
        ridge: weight of |turn - prior|^2 as a share of the mean squared norm of a feature, > 0.
        prior: float64 [D, D], such as the turn of a map fitted on other rows; None for the
            identity.

    Returns:
        The map from x to y.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    a, b = x - mean_x, y - mean_y
    gram = a.T @ a
    one = torch.eye(len(gram), dtype=gram.dtype)
    # A feature that never moves has no say; were they all such, the identity would be the answer.
    pull = ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny) * one
    known = pull if prior is None else pull @ prior
    turn = torch.linalg.solve(gram + pull, a.T @ b + known)
    spread = b.square().sum().clamp_min(torch.finfo(gram.dtype).tiny)
    before = float((x - y).square().sum() / spread)
    after = float((a @ turn - b).square().sum() / spread)
    return Map(turn, mean_x, mean_y, before, after, steadiest(gram + pull, mean_x))


def steadiest(spread: Tensor, mean: Tensor) -> Tensor:
    """The linear functional that is 1 at the mean of some features and varies least around it.

    Args:
        spread: float64 [D, D], the features' covariance up to a factor, positive definite.
        mean: float64 [D], their mean.

    Returns:
        u [D] with u mean = 1 and u' spread u least; zeros where the mean is zero.
    """
    u = torch.linalg.solve(spread, mean)
    size = mean @ u
    return u / size if size > 0 else torch.zeros_like(u)


def taken(found: Statistics, way: Map, x: Tensor, y: Tensor) -> Statistics:
    """The statistics that the same rows would have in the other model, as far as the map knows.

    Args:
        found: statistics of the clients' rows in the one model.
        way: the map to the other, fitted on x and y.
        x: float64 [N, D], the features it was fitted on.
        y: float64 [N, D], those it was fitted to; what it leaves over is their covariance.

    Returns:
        Statistics with the same counts.
    """
    n = found.counts.to(torch.float64)
    rows = max(found.rows, 1)
    mu = way(found.means())
    left = y - way(x)
    within = way.turn.T @ found.within() @ way.turn + left.T @ left / max(len(left), 1)
    outer = within * rows + (mu.T * n) @ mu
    return Statistics(found.counts, mu * n[:, None], (outer + outer.T) / 2)
