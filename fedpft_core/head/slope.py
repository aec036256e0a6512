"""The slope of the cross-entropy in a linear head: what clients send for a descent by the server.

For features phi of a row with class y, and class probabilities p that a head gives it, the slope of
its cross-entropy in the head's weights and biases is (p - e_y) (phi, 1)^T. Clients send the sum
over their rows. These sums add up to the slope over all rows in one place, so that a descent by
them is logistic regression on the pooled rows, however they are shared out: nothing is averaged
that was tuned apart.

Shape letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpft_core.errors import ReplyError
from fedpft_core.head.form import Summing
from fedpft_core.head.statistics import Layout, check_layout
from fedpft_core.tensors import Tensors

_SLACK = 1e-9  # share of the largest possible sum that rounding may leave


@dataclass(frozen=True, eq=False)
class Slope:
    """Sums over rows.

    Attributes:
        counts: N, int64 [1]; float64 where a client counts in part.
        slope: float64 [C, D + 1], that of the biases last.
    """

    counts: Tensor
    slope: Tensor

    @property
    def rows(self) -> int:
        """N, the rows summed over."""
        return int(self.counts.sum())

    @property
    def groups(self) -> int:
        """No classes are told apart."""
        return 0

    @property
    def width(self) -> int:
        """D, the features of a row."""
        return self.slope.shape[1] - 1

    def plus(self, other: Slope) -> Slope:
        """The sums of both.

        Args:
            other: of as many classes and features.

        Returns:
            New sums.
        """
        return Slope(self.counts + other.counts, self.slope + other.slope)

    def part(self, share: float) -> Slope:
        """The same mean over a part of the rows.

        Args:
            share: in (0, 1].

        Returns:
            New sums, the count float64; these where the share is 1.
        """
        return self if share == 1 else Slope(self.counts.double() * share, self.slope * share)

    def tensors(self) -> Tensors:
        """As they travel.

        Returns:
            `counts` and `slope`.
        """
        return {"counts": self.counts, "slope": self.slope}


@dataclass(frozen=True, eq=False)
class Slopes(Summing):
    """What is summed at one head.

    Attributes:
        weight: float64 [C, D].
        bias: float64 [C].
        one_a_row: whether every row has one answer and no more.
    """

    weight: Tensor
    bias: Tensor
    one_a_row: bool = True

    @staticmethod
    def at(head: Mapping[str, Tensor], classes: int, width: int, one_a_row: bool) -> Slopes:
        """At a head that a server has sent.

        Args:
            head: `weight` and `bias`.
            classes: C.
            width: D.
            one_a_row: whether every row has one answer and no more.

        Returns:
            What is summed.

        Raises:
            ReplyError: it is no such head.
        """
        f64 = torch.float64
        want: Layout = {"weight": (f64, [classes, width]), "bias": (f64, [classes])}
        check_layout(head, want, "the head")
        if not all(bool(torch.isfinite(t).all()) for t in head.values()):
            raise ReplyError("the head has a number that is not finite")
        return Slopes(head["weight"], head["bias"], one_a_row)

    def of(self, features: Tensor, answers: Tensor) -> Slope:
        """The slope over some rows.

        Args:
            features: float64 [N, D].
            answers: int64 [N].

        Returns:
            Its sums; zeros for N = 0.
        """
        off = torch.softmax(features @ self.weight.T + self.bias, dim=1)
        off = off - F.one_hot(answers, len(self.bias))
        slope = torch.cat([off.T @ features, off.sum(0)[:, None]], dim=1)
        return Slope(torch.tensor([len(answers)]), slope)

    def layout(self, width: int) -> Layout:
        """A vector and a number for each class, and a count.

        Args:
            width: D.

        Returns:
            Types and shapes by name.
        """
        shape = [len(self.bias), width + 1]
        return {"counts": (torch.int64, [1]), "slope": (torch.float64, shape)}

    def bounds(self, rows: int, most: int, longest: float, label: float) -> dict[str, float]:
        """Each answer adds its features and 1, each times at most 1.

        Args:
            rows: that are summed, at most.
            most: the most answers that a row can have.
            longest: largest L2 norm that a feature vector can have.
            label: not looked at.

        Returns:
            Bounds by name.
        """
        n = rows if self.one_a_row else rows * max(most, 1)
        return {"slope": n * max(longest, 1.0)}

    def read(self, tensors: Mapping[str, Tensor], width: int) -> Slope:
        """Slopes as they came.

        Args:
            tensors: by name.
            width: D.

        Returns:
            The sums.

        Raises:
            ReplyError: they are no such sums.
        """
        check_layout(tensors, self.layout(width), "statistics")
        return Slope(tensors["counts"], tensors["slope"])

    def check(self, found: Slope, announced: int, longest: float, most: int) -> None:
        """Refuse slopes that no rows can have.

        Args:
            found: as `read` gives them.
            announced: rows that the client said it trains on.
            longest: largest L2 norm that a feature vector can have.
            most: the most answers that a row can have.

        Raises:
            ReplyError: naming the first thing that is wrong.
        """
        n = int(found.counts[0])
        if self.one_a_row and n != announced:
            raise ReplyError(f"a slope over {n} rows, but {announced} were announced")
        if not self.one_a_row and not 0 <= n <= announced * max(most, 1):
            raise ReplyError(f"a slope over {n} answers of {announced} rows")
        if not bool(torch.isfinite(found.slope).all()):
            raise ReplyError("a slope with a number that is not finite")
        # A row's is (p - e_y) times its features: |p - e_y| is at most the root of two.
        if float(found.slope[:, :-1].norm()) > n * longest * 2**0.5 * (1 + _SLACK):
            raise ReplyError("a slope longer than features can make it")
        biases = found.slope[:, -1]
        off = abs(float(biases.sum())) > _SLACK * max(n, 1)
        if off or float(biases.abs().max()) > n * (1 + _SLACK):
            raise ReplyError("slopes of the biases that probabilities cannot have")


__all__ = ["Slope", "Slopes"]
