"""What tasks share whose rows are read from tables: files, or built-in data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns, Table, read_split, read_table
from fedpft_core.data.splits import DataSettings, columns_of, owned_split


@dataclass(frozen=True)
class TableTask:
    """A task that reads its rows from tables.

    Attributes:
        name: what packages call this kind of task; it begins with what a row is: `text`, `pair`
            or `image`.
        labels: names of what the head puts out; empty where they are not known yet, or mean
            nothing.
    """

    name: str
    labels: tuple[str, ...] = ()

    named = True
    """Whether labels have names."""

    @property
    def reads(self) -> str:
        """What its rows are to a model."""
        return "image" if self.name.startswith("image") else "text"

    def settled(self, table: Table, setting: str = "") -> Self:
        """The task with its labels.

        Args:
            table: the rows that tell them where no setting does.
            setting: the value of ``data.labels``; "" for none.

        Returns:
            A task of the same name; this one stays as it is.

        Raises:
            UserError: the labels cannot be used.
        """
        raise NotImplementedError  # each task has its own

    def examples(self, table: Table) -> Examples:
        """Rows as they are learned.

        Args:
            table: rows as read.

        Returns:
            The rows in their order; labels are looked up by the task's names.

        Raises:
            UserError: a row's label cannot be used.
        """
        raise NotImplementedError  # each task has its own

    @classmethod
    def open(
        cls, name: str, data: DataSettings, cache_dir: Path | None
    ) -> tuple[Self, Callable[[str, str], Examples]]:
        """The task of a run's configuration, and a reader of (source, split).

        Labels are those that ``data.labels`` lists, or else those of the rows.

        Args:
            name: of this kind of task.
            data: the run's settings of its rows.
            cache_dir: where built-in data is cached; None for the default folder.

        Returns:
            The task with its labels, and a function that gives the rows of a source's split.

        Raises:
            UserError: the rows or their labels cannot be used.
        """
        columns, tables = columns_of(data), dict[tuple[str, str], Table]()

        def table(source: str, split: str) -> Table:
            if (source, split) not in tables:
                tables[source, split] = cls.usable(read_split(source, split, columns, cache_dir))
            return tables[source, split]

        task = cls(name).settled(table(*owned_split(data)), data.labels)
        return task, lambda *where: task._told(table(*where))

    def read(self, path: str | Path, columns: Columns, key: str = "") -> Examples:
        """All rows of one file.

        Args:
            path: .csv, .tsv, .json, .jsonl or .parquet file.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            The rows in file order, with the task's labels, or their own where it has none.

        Raises:
            UserError: the file cannot be read, or a row's label cannot be used.
        """
        table = self.usable(read_table(path, columns, key))
        return (self if self.labels else self.learned(table))._told(table)

    def learn(self, path: str | Path, columns: Columns, key: str = "") -> Self:
        """The same task with the labels that a file's rows have.

        Args:
            path: as `read` takes it.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            A task whose labels are sorted; this one stays as it is.

        Raises:
            UserError: the file cannot be read, or has no rows.
        """
        return self.learned(self.usable(read_table(path, columns, key)))

    @staticmethod
    def usable(table: Table) -> Table:
        """The rows whose label cells are of the kind that the task reads.

        Args:
            table: rows as read.

        Returns:
            The table without the others; here every cell will do.

        Raises:
            UserError: more rows than may be cannot be used.
        """
        return table

    def _told(self, table: Table) -> Examples:
        """The rows as they are learned, and what was left out of their source."""
        sources = np.unique(table.sources, return_inverse=True)[1] if table.sources else None
        return replace(self.examples(table), left_out=table.said, sources=sources)

    def learned(self, table: Table) -> Self:
        """The task with the labels that some rows have, be it one alone.

        Args:
            table: rows as read.

        Returns:
            A task of the same name; this one stays as it is.

        Raises:
            UserError: there are no rows, or their labels cannot be used.
        """
        raise NotImplementedError  # each task has its own
