"""Sums over rows with numbers to learn: what a client sends for a linear head of regression.

phi(x) is what the head's last linear layer reads for row x, dropout off, and y its K numbers. A
client sends N, the sums of phi, y, phi phi^T, y phi^T and y^2. With a centred scatter
S = sum phi phi^T - N mu mu^T and the centred cross sums, ridge regression follows from these
alone, and so does its error on the very rows. For labels that are 0 or 1 (several may hold at
once), the sum of y counts each label's rows, and the cross sums are its feature sums.

They are sums, so that those of all clients add up to those of the pooled rows whatever the
partition.

Shape letters: N rows, D features, K numbers a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.head.mapped import Map
from fedpft_core.head.statistics import Layout, check_layout, packed, unpacked
from fedpft_core.tensors import Tensors

_SLACK = 1e-9  # share of the largest sum that rounding may leave where there is nothing
_OVER = 1e-6  # share by which what the features explain may exceed what there is


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows.

    Attributes:
        count: N, int64 [1]; float64 where a client counts in part.
        features: sum of phi, float64 [D].
        labels: sum of y, float64 [K].
        squares: sum of y^2, float64 [K].
        cross: sum of y phi^T, float64 [K, D].
        outer: sum of phi phi^T, float64 [D, D], symmetric.
    """

    count: Tensor
    features: Tensor
    labels: Tensor
    squares: Tensor
    cross: Tensor
    outer: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor) -> Moments:
        """The sums of some rows.

        Args:
            features: float64 [N, D].
            labels: float [N] or [N, K].

        Returns:
            Their sums in float64; zeros for N = 0.
        """
        y = labels.to(features)
        y = y[:, None] if y.ndim == 1 else y
        outer = features.T @ features
        # A matrix product need not be symmetric to the last bit; what is sent is one triangle.
        outer = torch.triu(outer) + torch.triu(outer, 1).T
        count = torch.tensor([len(features)])
        return Moments(count, features.sum(0), y.sum(0), y.square().sum(0), y.T @ features, outer)

    @property
    def rows(self) -> int:
        """N, the rows summed over."""
        return int(self.count)

    @property
    def groups(self) -> int:
        """0: rows fall into no classes."""
        return 0

    @property
    def width(self) -> int:
        """D, the features of a row."""
        return len(self.features)

    def scatter(self) -> Tensor:
        """Covariance of the features over all rows.

        Returns:
            float64 [D, D], symmetric; zeros without rows.
        """
        n = max(float(self.count), 1.0)
        mu = self.features / n
        spread = self.outer / n - torch.outer(mu, mu)
        return (spread + spread.T) / 2

    def covariance(self) -> Tensor:
        """Covariance of each number with the features.

        Returns:
            float64 [K, D].
        """
        n = max(float(self.count), 1.0)
        return self.cross / n - torch.outer(self.labels / n, self.features / n)

    def variance(self) -> Tensor:
        """Variance of each number, not below 0.

        Returns:
            float64 [K].
        """
        n = max(float(self.count), 1.0)
        return (self.squares / n - (self.labels / n).square()).clamp_min(0)

    def plus(self, other: Moments) -> Moments:
        """The sums of both sets of rows.

        Args:
            other: over as many features and numbers.

        Returns:
            New sums.
        """
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def part(self, share: float) -> Moments:
        """The same means and covariances, over a part of the rows.

        Args:
            share: in (0, 1].

        Returns:
            The sums, their count float64; those given where the share is 1.
        """
        if share == 1:
            return self
        return Moments(*(getattr(self, f.name).double() * share for f in fields(self)))

    def tensors(self) -> Tensors:
        """As they travel: D(D+1)/2 + KD + D + 2K numbers in float64 and N.

        Returns:
            By the names of the attributes; `outer` [D(D+1)/2] is its upper triangle row by row.
        """
        whole = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        return whole | {"outer": packed(self.outer)}

    @staticmethod
    def layout(numbers: int, width: int) -> Layout:
        """Types and shapes of what travels.

        Args:
            numbers: K.
            width: D.

        Returns:
            By the name of the tensor.
        """
        return {
            "count": (torch.int64, [1]),
            "features": (torch.float64, [width]),
            "labels": (torch.float64, [numbers]),
            "squares": (torch.float64, [numbers]),
            "cross": (torch.float64, [numbers, width]),
            "outer": (torch.float64, [width * (width + 1) // 2]),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], numbers: int, width: int) -> Moments:
        """The inverse of :meth:`tensors`.

        Args:
            tensors: as they came.
            numbers: K.
            width: D.

        Returns:
            The sums.

        Raises:
            ReplyError: a tensor is missing, too much, or of another type or shape.
        """
        check_layout(tensors, Moments.layout(numbers, width), "statistics")
        return Moments(**dict(tensors) | {"outer": unpacked(tensors["outer"], width)})


def check(found: Moments, announced: int, longest: float, binary: bool) -> None:
    """Refuse sums that no rows of the sub-FM can have.

    Args:
        found: what a client sent.
        announced: the rows that the client said it trains on.
        longest: largest L2 norm that a feature vector of this sub-FM can have.
        binary: whether each number of a row is 0 or 1.

    Raises:
        ReplyError: naming the first thing that is wrong: a number that is not finite, another
            count than the announced rows, norms that features cannot have, labels that are neither
            0 nor 1, a negative scatter, or labels that the features explain by more than there is.
    """
    if not all(bool(getattr(found, f.name).isfinite().all()) for f in fields(found)):
        raise ReplyError("statistics have values that are not finite")
    if found.rows != announced:
        raise ReplyError(f"statistics are of {found.rows} rows, not of the {announced} announced")
    total = float(found.outer.diagonal().sum())
    if total > announced * longest**2:
        raise ReplyError(
            f"the features' mean square, {total / announced:.3g}, is more than the "
            f"{longest**2:.3g} that the sub-FM's features can have"
        )
    if binary:
        whole = bool((found.labels == found.labels.round()).all())
        within = bool(((found.labels >= 0) & (found.labels <= announced)).all())
        if not (whole and within and torch.equal(found.labels, found.squares)):
            raise ReplyError("label counts are not whole numbers between 0 and the rows announced")
    variance = found.squares / announced - (found.labels / announced).square()
    most = found.squares / announced
    if bool((variance < -_SLACK * most.clamp_min(torch.finfo(torch.float64).tiny)).any()):
        raise ReplyError("statistics are those of no rows (the labels' variance is negative)")
    # With features, labels and 1 side by side in one vector, the scatter of that vector has no
    # negative direction. What rounding leaves is a share of the largest entries.
    floor = _SLACK * max(total / announced, torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(found.scatter())
    if float(values[0]) < -floor:
        raise ReplyError("statistics are those of no rows (a scatter is negative)")
    explained = ((found.covariance() @ vectors).square() / (values.clamp_min(0) + floor)).sum(1)
    if bool((explained > variance.clamp_min(0) * (1 + _OVER) + _SLACK * most).any()):
        raise ReplyError("statistics are those of no rows (labels vary less than their features)")


def taken(found: Moments, way: Map, x: Tensor, y: Tensor) -> Moments:
    """The sums that the same rows would have in the other model, as far as the map knows.

    What the map leaves over has nothing to do with the labels, as far as the map knows.

    Args:
        found: sums of the clients' rows in the one model.
        way: the map to the other, fitted on x and y.
        x: float64 [N, D], the features it was fitted on.
        y: float64 [N, D], those it was fitted to; what it leaves over is their covariance.

    Returns:
        Sums over as many rows.
    """
    n = max(found.rows, 1)
    mu = way((found.features / n)[None])[0]
    left = y - way(x)
    spread = way.turn.T @ found.scatter() @ way.turn + left.T @ left / max(len(left), 1)
    outer = (spread + torch.outer(mu, mu)) * n
    cross = (found.covariance() @ way.turn) * n + torch.outer(found.labels, mu)
    return Moments(found.count, mu * n, found.labels, found.squares, cross, (outer + outer.T) / 2)
