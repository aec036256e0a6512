"""What tasks share that train no head: the model's outputs are made by layers that stay frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import DataSettings, columns_of
from fedpft_core.model.batch import Position
from fedpft_core.model.families import Family
from fedpft_core.task.score import Score


@dataclass(frozen=True)
class HeadlessTask:
    """A task without labels and without a head of its own.

    Attributes:
        name: what packages call this kind of task.
        labels: none.
    """

    name: str
    labels: tuple[str, ...] = ()

    refits = False
    named = False
    closed_form = ""
    baselines = ("zero-shot",)

    def read(self, path: str | Path, columns: Columns, key: str = "") -> Examples:
        """All rows of one file.

        Args:
            path: of the file.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            The rows in file order.

        Raises:
            UserError: anything wrong in the file, naming it and, where there is one, the row.
        """
        raise NotImplementedError  # each task has its own

    @classmethod
    def open(
        cls, name: str, data: DataSettings, cache_dir: Path | None
    ) -> tuple[Self, Callable[[str, str], Examples]]:
        """The task of a run's configuration, and a reader of (source, split).

        Args:
            name: of this kind of task.
            data: the run's settings of its rows.
            cache_dir: unused; there is no built-in data for these tasks.

        Returns:
            The task, and a function that gives the rows of a source's split.
        """
        task, columns, found = cls(name), columns_of(data), dict[str, Examples]()

        def rows(source: str, split: str) -> Examples:
            if source not in found:
                found[source] = task.read(source, columns, f"data.{split}")
            return found[source]

        return task, rows

    def head(self, family: Family) -> tuple[str, ...]:
        """Nothing is trained whole.

        Args:
            family: of the model.

        Returns:
            No paths.
        """
        return ()

    def position(self, family: Family) -> Position:
        """Every position counts: it tells the next token, or is denoised.

        Args:
            family: of the model.

        Returns:
            `every`.
        """
        return "every"

    def learn(self, path: str | Path, columns: Columns, key: str = "") -> Self:
        """The task itself: there are no labels to learn from a file.

        Args:
            path: unused.
            columns: unused.
            key: unused.

        Returns:
            This task.
        """
        return self

    def histogram(self, examples: Examples) -> dict[str, int]:
        """There are no labels to count.

        Args:
            examples: rows of this task.

        Returns:
            Nothing.
        """
        return {}

    def fit_baseline(
        self, name: str, train: tuple[Any, np.ndarray], test: tuple[Any, np.ndarray], seed: int
    ) -> Score:
        """There is none that is fitted: the zero-shot model is scored as it is.

        Args:
            name: unused.
            train: unused.
            test: unused.
            seed: unused.

        Returns:
            Nothing.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{name} is not fitted")


__all__ = ["HeadlessTask"]
