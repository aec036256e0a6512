"""What a closed form of a head is asked, and the sums over rows that it follows from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, Self

from torch import Tensor

from fedpft_core.head.discriminant import Head
from fedpft_core.head.mapped import Map
from fedpft_core.head.statistics import Layout
from fedpft_core.tensors import Tensors


class Sums(Protocol):
    """Sums over rows that add up over clients; `Statistics` and `Moments` are such."""

    @property
    def rows(self) -> int:
        """What is summed over: rows, or whatever the task judges."""

    @property
    def groups(self) -> int:
        """Classes that have any; 0 where there are no classes."""

    @property
    def width(self) -> int:
        """D, the features of a row."""

    def plus(self, other: Self) -> Self:
        """The sums of both.

        Args:
            other: of the same form.

        Returns:
            New sums.
        """

    def part(self, share: float) -> Self:
        """The same means and covariances, over a part of the rows.

        Args:
            share: in (0, 1].

        Returns:
            New sums; these where the share is 1.
        """

    def tensors(self) -> Tensors:
        """As they travel.

        Returns:
            Tensors by name.
        """


class Summing(Protocol):
    """What is summed over rows: how, how it travels, and what no rows can have."""

    def of(self, features: Tensor, answers: Tensor) -> Any:
        """The sums of some rows.

        Args:
            features: float64 [N, D].
            answers: of the same N, as the task has them.

        Returns:
            Their sums.
        """

    def numbers(self, width: int) -> int:
        """How many numbers of 8 bytes the sums are.

        Args:
            width: D.

        Returns:
            As they travel.
        """
        return sum(math.prod(shape) for _, shape in self.layout(width).values())

    def layout(self, width: int) -> Layout:
        """Types and shapes of the sums.

        Args:
            width: D.

        Returns:
            As they travel, by the name of the tensor.
        """

    def bounds(self, rows: int, most: int, longest: float, label: float) -> dict[str, float]:
        """How far from zero a number of each tensor can be.

        Args:
            rows: that are summed, at most.
            most: the most answers that a row can have.
            longest: largest L2 norm that a feature vector can have.
            label: how far from zero a number to be learned can be.

        Returns:
            By the name of the tensor; those that hold whole numbers are not there.

        Raises:
            ValueError: it is not known how large the numbers to be learned can be.
        """

    def read(self, tensors: Mapping[str, Tensor], width: int) -> Any:
        """Sums as they came.

        Args:
            tensors: by name.
            width: D.

        Returns:
            The sums.

        Raises:
            ReplyError: they are no such sums.
        """

    def check(self, found: Any, announced: int, longest: float, most: int) -> None:
        """Refuse sums that no rows can have.

        Args:
            found: as `read` gives them.
            announced: rows that the client said it trains on.
            longest: largest L2 norm that a feature vector can have.
            most: the most answers that a row can have.

        Raises:
            ReplyError: naming the first thing that is wrong.
        """


class Form(Summing, Protocol):
    """How the head of one kind of task follows from sums."""

    def group_rows(self, labels: Tensor) -> list[int]:
        """How many rows each group has whose features the sums tell apart from the others'.

        Args:
            labels: of a client's rows, first axis rows, as the task encodes them.

        Returns:
            A number for each group, 0 included; empty where the sums know no groups.
        """

    def fit(self, found: Any, fixed: float | None, features: Tensor, answers: Tensor) -> Head:
        """The head that sums give.

        Args:
            found: of the rows to learn from.
            fixed: the shrinkage to take; None chooses it.
            features: float64 [N, D] of labelled rows to choose by, maybe none.
            answers: of the same N.

        Returns:
            The head.
        """

    def line(self, found: Any, shrinkage: float) -> tuple[Tensor, Tensor]:
        """The linear layer of `fit` at a given shrinkage, and nothing else.

        Args:
            found: of the rows to learn from.
            shrinkage: above 0.

        Returns:
            Weights float64 [C, D] and bias [C], unscaled.
        """

    def losses(self, scores: Tensor, answers: Tensor) -> Tensor:
        """The loss that `fit` chooses by, row by row; scores that have a scale get the best one.

        Args:
            scores: float64 [N, C] of labelled rows, unscaled.
            answers: of the same N.

        Returns:
            float64 [N].
        """

    def taken(self, found: Any, way: Map, x: Tensor, y: Tensor) -> Any:
        """The sums that the same rows would have in another model.

        Args:
            found: in the one model.
            way: from its features to the other's, fitted on x and y.
            x: float64 [N, D].
            y: float64 [N, D].

        Returns:
            Sums over as many rows.
        """

    def slopes(self, head: Mapping[str, Tensor], width: int) -> Summing | None:
        """What is summed where the slope of the loss at a head is wanted.

        Args:
            head: `weight` float64 [C, D] and `bias` float64 [C].
            width: D.

        Returns:
            Its sums; None where a head of this kind is not tuned by slopes.

        Raises:
            ReplyError: it is no such head.
        """
