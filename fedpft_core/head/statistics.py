"""Class statistics of features: what clients send so that the server can set the head at once.

phi(x) is what the head's last linear layer reads for row x, dropout off. A client with rows
(x_i, y_i) sends, per class c, the number n_c of its rows and the sum s_c of their features, and
the sum Q of phi phi^T over all its rows. These are sums, so that those of all clients add up to
those of the pooled rows whatever the partition; order matters to the last bit only, and the server
adds in the order of the clients' names.

Shape letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors

Layout = dict[str, tuple[torch.dtype, list[int]]]
"""Types and shapes of tensors, by name."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over rows, by class.

    Attributes:
        counts: rows of each class, int64 [C]; float64 where a client counts in part.
        sums: sum of the features of each class's rows, float64 [C, D].
        outer: sum of phi phi^T over all rows, float64 [D, D], symmetric.
    """

    counts: Tensor
    sums: Tensor
    outer: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor, classes: int) -> Statistics:
        """The statistics of some rows.

        Args:
            features: float64 [N, D].
            labels: int64 [N], each at least 0 and less than `classes`.
            classes: C.

        Returns:
            Their statistics; zeros for N = 0.
        """
        sums = features.new_zeros(classes, features.shape[1])
        sums.index_add_(0, labels, features)
        outer = features.T @ features
        # A matrix product need not be symmetric to the last bit; what is sent is one triangle.
        outer = torch.triu(outer) + torch.triu(outer, 1).T
        return Statistics(torch.bincount(labels, minlength=classes), sums, outer)

    @property
    def rows(self) -> int:
        """N, the rows summed over."""
        return int(self.counts.sum())

    @property
    def groups(self) -> int:
        """Classes that have any row."""
        return int((self.counts > 0).sum())

    @property
    def width(self) -> int:
        """D, the features of a row."""
        return self.sums.shape[1]

    def plus(self, other: Statistics) -> Statistics:
        """The statistics of both sets of rows.

        Args:
            other: of as many classes and features.

        Returns:
            New statistics.
        """
        return Statistics(
            self.counts + other.counts, self.sums + other.sums, self.outer + other.outer
        )

    def means(self) -> Tensor:
        """Mean feature of each class.

        Returns:
            float64 [C, D]; a class nobody has gets the mean of all rows.
        """
        found = self.sums / torch.where(self.counts > 0, self.counts, 1)[:, None]
        overall = self.sums.sum(0) / max(self.rows, 1)
        return torch.where(self.counts[:, None] > 0, found, overall)

    def within(self) -> Tensor:
        """Covariance within classes, (Q - sum_c n_c mu_c mu_c^T) / N.

        Returns:
            float64 [D, D], symmetric; zeros without rows.
        """
        mu = self.means()
        spread = self.outer - (mu.T * self.counts) @ mu
        return (spread + spread.T) / (2 * max(self.rows, 1))

    def part(self, share: float) -> Statistics:
        """The same means and covariances, over a part of the rows.

        Args:
            share: in (0, 1].

        Returns:
            The statistics, its counts float64; those given where the share is 1.
        """
        if share == 1:
            return self
        return Statistics(self.counts.double() * share, self.sums * share, self.outer * share)

    def tensors(self) -> Tensors:
        """As they travel: D(D+1)/2 + CD numbers in float64 and C counts.

        Returns:
            `counts` and `sums` as they are, and `outer` [D(D+1)/2], its upper triangle row by row.
        """
        return {"counts": self.counts, "sums": self.sums, "outer": packed(self.outer)}

    @staticmethod
    def layout(classes: int, width: int) -> Layout:
        """Types and shapes of what travels.

        Args:
            classes: C.
            width: D.

        Returns:
            By the name of the tensor.
        """
        return {
            "counts": (torch.int64, [classes]),
            "sums": (torch.float64, [classes, width]),
            "outer": (torch.float64, [width * (width + 1) // 2]),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], classes: int, width: int) -> Statistics:
        """The inverse of :meth:`tensors`.

        Args:
            tensors: as they came.
            classes: C.
            width: D.

        Returns:
            The statistics.

        Raises:
            ReplyError: a tensor is missing, too much, or of another type or shape.
        """
        check_layout(tensors, Statistics.layout(classes, width), "class statistics")
        outer = unpacked(tensors["outer"], width)
        return Statistics(tensors["counts"], tensors["sums"], outer)


def check_layout(tensors: Mapping[str, Tensor], want: Layout, what: str) -> None:
    """Refuse tensors that are others than those wanted.

    Args:
        tensors: as they came.
        want: types and shapes.
        what: what the tensors are, for the message.

    Raises:
        ReplyError: a tensor is missing, too much, or of another type or shape.
    """
    if tensors.keys() != want.keys():
        raise ReplyError(f"{what} need {', '.join(want)} and nothing else")
    for name, (dtype, shape) in want.items():
        if tensors[name].dtype != dtype or list(tensors[name].shape) != shape:
            raise ReplyError(f"{what}: {name} has the wrong type or shape")


def packed(matrix: Tensor) -> Tensor:
    """A symmetric matrix as it travels.

    Args:
        matrix: [D, D].

    Returns:
        [D(D+1)/2], its upper triangle row by row.
    """
    upper = torch.triu_indices(len(matrix), len(matrix))
    return matrix[upper[0], upper[1]].contiguous()


def unpacked(triangle: Tensor, width: int) -> Tensor:
    """The inverse of :func:`packed`.

    Args:
        triangle: float64 [D(D+1)/2].
        width: D.

    Returns:
        float64 [D, D], symmetric.
    """
    matrix = torch.zeros(width, width, dtype=torch.float64)
    upper = torch.triu_indices(width, width)
    matrix[upper[0], upper[1]] = triangle
    return matrix + torch.triu(matrix, 1).T


_Sums = TypeVar("_Sums", bound="_Summable")


class _Summable(Protocol):
    def plus(self: _Sums, other: _Sums) -> _Sums: ...


def add(parts: Iterable[_Sums]) -> _Sums:
    """The statistics of all rows together.

    Args:
        parts: at least one, in an order that is the same in every run (by the clients' names), so
            that the sums are the same to the last bit.

    Returns:
        Their sum, in float64.

    Raises:
        ValueError: there is nothing to add.
    """
    total: _Sums | None = None
    for part in parts:
        total = part if total is None else total.plus(part)
    if total is None:
        raise ValueError("there are no class statistics to add")
    return total


def check(found: Statistics, announced: int, longest: float, most: int = 0) -> None:
    """Refuse statistics that no rows of the sub-FM can have.

    Args:
        found: what a client sent.
        announced: the rows that the client said it trains on.
        longest: largest L2 norm that a feature vector of this sub-FM can have.
        most: 0 where every row is one summand; else the most summands (tokens) that a row can be,
            of which there is one at least.

    Raises:
        ReplyError: naming the first thing that is wrong: a number that is not finite, counts that
            are not the announced rows, norms that features cannot have, or sums that belong to no
            rows at all (the scatter within classes is not positive semi-definite).
    """
    if not (bool(found.sums.isfinite().all()) and bool(found.outer.isfinite().all())):
        raise ReplyError("class statistics have values that are not finite")
    largest = announced * max(most, 1)
    if int(found.counts.min()) < 0 or int(found.counts.max()) > largest:
        raise ReplyError("class counts are negative or more than the rows announced")
    if not most and found.rows != announced:
        raise ReplyError(f"class counts sum to {found.rows}, not to the {announced} rows announced")
    if most and not announced <= found.rows <= largest:
        raise ReplyError(
            f"class counts sum to {found.rows}, which {announced} rows of at most {most} tokens "
            "cannot have"
        )
    if bool((found.sums[found.counts == 0] != 0).any()):
        raise ReplyError("class statistics have a sum for a class without rows")
    total = float(found.outer.diagonal().sum())
    if total > found.rows * longest**2:
        raise ReplyError(
            f"the features' mean square, {total / found.rows:.3g}, is more than the "
            f"{longest**2:.3g} that the sub-FM's features can have"
        )
    # Each class's scatter sum_i (phi_i - mu)(phi_i - mu)^T has no negative direction; what
    # rounding leaves is a share of the largest entries, however many rows there are.
    spread = found.within() * found.rows
    lowest = float(torch.linalg.eigvalsh(spread)[0])
    if lowest < -1e-9 * max(total, torch.finfo(torch.float64).tiny):
        raise ReplyError("class statistics are those of no rows (a scatter is negative)")


def projection(width: int, limit: int, seed: int) -> Tensor | None:
    """A random orthonormal map of features to fewer, so that the sums stay small for wide models.

    Args:
        width: D, the features of a row.
        limit: features kept at most, P.
        seed: the run's; client and server draw the same map.

    Returns:
        float64 [D, P], or None where the features are few enough as they are.
    """
    if width <= limit:
        return None
    drawn = torch.randn(
        width, limit, generator=torch_stream(seed, "feature-projection"), dtype=torch.float64
    )
    basis, upper = torch.linalg.qr(drawn)
    # QR leaves the signs to the library that does it.
    return basis * upper.diagonal().sign()
