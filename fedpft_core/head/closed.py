"""Heads in closed form by the task's kind: what is summed, and the head that follows from sums.

A task names its form (`Task.closed_form`); nothing else tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedpft_core.head import binary, discriminant, mapped, moments, ridge, statistics
from fedpft_core.head.discriminant import Head
from fedpft_core.head.form import Form
from fedpft_core.head.mapped import Map
from fedpft_core.head.moments import Moments
from fedpft_core.head.slope import Slopes
from fedpft_core.head.statistics import Layout, Statistics
from fedpft_core.task import Task


class _Solved(Form):
    """A form whose heads a module of this room solves for."""

    solver: ClassVar[Any]

    def line(self, found: Any, shrinkage: float) -> tuple[Tensor, Tensor]:
        """The linear layer at a given shrinkage.

        Args:
            found: of the rows to learn from.
            shrinkage: above 0.

        Returns:
            Weights and bias, unscaled.
        """
        line: tuple[Tensor, Tensor] = self.solver.line(found, shrinkage)
        return line

    def losses(self, scores: Tensor, answers: Tensor) -> Tensor:
        """What a head is chosen by, for each row.

        Args:
            scores: float64 [N, C].
            answers: of the same N.

        Returns:
            float64 [N].
        """
        losses: Tensor = self.solver.losses(scores, answers)
        return losses


@dataclass(frozen=True)
class Classes(_Solved):
    """One of C classes for each answer: the shrunken linear discriminant.

    Attributes:
        count: C.
        one_a_row: whether every row has one answer and no more.
    """

    count: int
    one_a_row: bool = True

    solver: ClassVar[Any] = discriminant

    def of(self, features: Tensor, answers: Tensor) -> Statistics:
        """Counts and sums by class.

        Args:
            features: float64 [N, D].
            answers: of the same N.

        Returns:
            Their sums.
        """
        return Statistics.of(features, answers, self.count)

    def group_rows(self, labels: Tensor) -> list[int]:
        """Rows that have each class, of which there is a sum of its own.

        Args:
            labels: int64 [rows] or [rows, L].

        Returns:
            A number for each class.
        """
        rows = labels.reshape(len(labels), -1)
        return [int((rows == c).any(1).sum()) for c in range(self.count)]

    def layout(self, width: int) -> Layout:
        """A triangle, and a vector and a count for each class.

        Args:
            width: D.

        Returns:
            Types and shapes by name.
        """
        return Statistics.layout(self.count, width)

    def bounds(self, rows: int, most: int, longest: float, label: float) -> dict[str, float]:
        """Each answer adds a feature vector; counts are whole.

        Args:
            rows: that are summed, at most.
            most: the most answers that a row can have.
            longest: largest L2 norm that a feature vector can have.
            label: not looked at.

        Returns:
            Bounds by name.
        """
        n = rows if self.one_a_row else rows * max(most, 1)
        return {"sums": n * longest, "outer": n * longest * longest}

    def read(self, tensors: Mapping[str, Tensor], width: int) -> Statistics:
        """Class statistics as they came.

        Args:
            tensors: by name.
            width: D.

        Returns:
            The sums.

        Raises:
            ReplyError: they are no such sums.
        """
        return Statistics.from_tensors(tensors, self.count, width)

    def check(self, found: Statistics, announced: int, longest: float, most: int) -> None:
        """Refuse class statistics that no rows can have.

        Args:
            found: as `read` gives them.
            announced: rows that the client said it trains on.
            longest: largest L2 norm that a feature vector can have.
            most: the most answers that a row can have.

        Raises:
            ReplyError: naming the first thing that is wrong.
        """
        statistics.check(found, announced, longest, 0 if self.one_a_row else most)

    def fit(
        self, found: Statistics, fixed: float | None, features: Tensor, answers: Tensor
    ) -> Head:
        """The discriminant, shrunk and scaled to suit the labelled rows.

        Args:
            found: of the rows to learn from.
            fixed: the shrinkage to take; None chooses it.
            features: float64 [N, D] of labelled rows to choose by, maybe none.
            answers: of the same N.

        Returns:
            The head.
        """
        if not len(answers):
            return discriminant.solve(found, fixed)
        shares = (fixed,) if fixed else discriminant.SHARES
        return discriminant.fitted(found, features, answers, shares=shares)

    def taken(self, found: Statistics, way: Map, x: Tensor, y: Tensor) -> Statistics:
        """Class statistics in the other model.

        Args:
            found: in the one model.
            way: from its features to the other's, fitted on x and y.
            x: float64 [N, D].
            y: float64 [N, D].

        Returns:
            Sums over as many rows.
        """
        return mapped.taken(found, way, x, y)

    def slopes(self, head: Mapping[str, Tensor], width: int) -> Slopes:
        """The slope of the cross-entropy.

        Args:
            head: `weight` float64 [C, D] and `bias` float64 [C].
            width: D.

        Returns:
            What is summed.

        Raises:
            ReplyError: it is no such head.
        """
        return Slopes.at(head, self.count, width, self.one_a_row)


@dataclass(frozen=True)
class Values(_Solved):
    """Numbers for each row: ridge regression.

    Attributes:
        count: K.
    """

    count: int

    solver: ClassVar[Any] = ridge
    binary = False

    def of(self, features: Tensor, answers: Tensor) -> Moments:
        """First and second moments.

        Args:
            features: float64 [N, D].
            answers: of the same N.

        Returns:
            Their sums.
        """
        return Moments.of(features, answers)

    def group_rows(self, labels: Tensor) -> list[int]:
        """No groups: the sums are over all rows.

        Args:
            labels: not looked at.

        Returns:
            Nothing.
        """
        return []

    def layout(self, width: int) -> Layout:
        """A triangle, a vector for each number and one more, and sums and counts.

        Args:
            width: D.

        Returns:
            Types and shapes by name.
        """
        return Moments.layout(self.count, width)

    def bounds(self, rows: int, most: int, longest: float, label: float) -> dict[str, float]:
        """Each row adds a feature vector, alone and times its numbers.

        Args:
            rows: that are summed, at most.
            most: not looked at.
            longest: largest L2 norm that a feature vector can have.
            label: how far from zero a number to be learned can be.

        Returns:
            Bounds by name.

        Raises:
            ValueError: `label` is not known.
        """
        if not label > 0:
            raise ValueError("it is not known how large the numbers to be learned can be")
        return {
            "features": rows * longest, "outer": rows * longest * longest, "labels": rows * label,
            "squares": rows * label * label, "cross": rows * label * longest,
        }  # fmt: skip

    def read(self, tensors: Mapping[str, Tensor], width: int) -> Moments:
        """Moments as they came.

        Args:
            tensors: by name.
            width: D.

        Returns:
            The sums.

        Raises:
            ReplyError: they are no such sums.
        """
        return Moments.from_tensors(tensors, self.count, width)

    def check(self, found: Moments, announced: int, longest: float, most: int) -> None:
        """Refuse moments that no rows can have.

        Args:
            found: as `read` gives them.
            announced: rows that the client said it trains on.
            longest: largest L2 norm that a feature vector can have.
            most: the most answers that a row can have.

        Raises:
            ReplyError: naming the first thing that is wrong.
        """
        moments.check(found, announced, longest, self.binary)

    def fit(self, found: Moments, fixed: float | None, features: Tensor, answers: Tensor) -> Head:
        """Ridge regression, its share chosen by the labelled rows.

        Args:
            found: of the rows to learn from.
            fixed: the shrinkage to take; None chooses it.
            features: float64 [N, D] of labelled rows to choose by, maybe none.
            answers: of the same N.

        Returns:
            The head.
        """
        return ridge.fitted(found, features, answers, fixed)

    def taken(self, found: Moments, way: Map, x: Tensor, y: Tensor) -> Moments:
        """Moments in the other model.

        Args:
            found: in the one model.
            way: from its features to the other's, fitted on x and y.
            x: float64 [N, D].
            y: float64 [N, D].

        Returns:
            Sums over as many rows.
        """
        return moments.taken(found, way, x, y)

    def slopes(self, head: Mapping[str, Tensor], width: int) -> None:
        """None: ridge regression has no better slope to follow, and labels are not tuned so.

        Args:
            head: not looked at.
            width: not looked at.
        """
        return


@dataclass(frozen=True)
class Labels(Values):
    """Labels that may hold at once, each 0 or 1: a discriminant for each."""

    solver: ClassVar[Any] = binary
    binary = True

    def bounds(self, rows: int, most: int, longest: float, label: float) -> dict[str, float]:
        """Sums of labels and of their squares are counts, which are whole.

        Args:
            rows: that are summed, at most.
            most: not looked at.
            longest: largest L2 norm that a feature vector can have.
            label: not looked at.

        Returns:
            Bounds by name.
        """
        found = super().bounds(rows, most, longest, 1.0)
        return {name: found[name] for name in ("features", "outer", "cross")}

    def group_rows(self, labels: Tensor) -> list[int]:
        """Rows with each label, then rows without it: the sums tell both apart.

        Args:
            labels: [rows, K], each 0 or 1.

        Returns:
            Twice K numbers.
        """
        having = (labels > 0).sum(0).tolist()
        return [*having, *(len(labels) - n for n in having)]

    def fit(self, found: Moments, fixed: float | None, features: Tensor, answers: Tensor) -> Head:
        """Log odds, shrunk and scaled to suit the labelled rows.

        Args:
            found: of the rows to learn from.
            fixed: the shrinkage to take; None chooses it.
            features: float64 [N, D] of labelled rows to choose by, maybe none.
            answers: of the same N.

        Returns:
            The head.
        """
        if not len(answers):
            return binary.solve(found, fixed)
        shares = (fixed,) if fixed else discriminant.SHARES
        return binary.fitted(found, features, answers, shares)


FORMS: dict[str, Callable[[int], Form]] = {
    "classes": Classes,
    "token-classes": lambda count: Classes(count, one_a_row=False),
    "values": lambda count: Values(max(count, 1)),
    "labels": Labels,
}
"""Forms by the name that tasks have for them, made from the number of labels."""


def form_of(task: Task) -> Form | None:
    """How the head of a task follows from sums.

    Args:
        task: with its labels.

    Returns:
        Its form; None where the head cannot be had so.
    """
    return FORMS[task.closed_form](len(task.labels)) if task.closed_form else None
