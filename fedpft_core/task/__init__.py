"""Tasks: one file a kind, and a look-up by name.

`make` gives the task that a package or a node config names, `load_task` the one that a run's
configuration names, with its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import DataSettings, check_settings, columns_of, split_rows
from fedpft_core.errors import UserError
from fedpft_core.task.base import Metric, Score, Task, TaskData, mean_score
from fedpft_core.task.classify import Classify, confusion

KINDS = {"text": Classify, "pair": Classify, "image": Classify}
"""Kinds of task by the name they have in packages."""


def make(name: str, labels: Iterable[str] = ()) -> Task:
    """The task of this kind with these labels.

    Args:
        name: one of `KINDS`.
        labels: names of what the head puts out; empty where they are not known yet.

    Returns:
        A frozen value, equal to another made from the same.

    Raises:
        UserError: there is no such kind.
    """
    if name not in KINDS:
        raise UserError(f"{name!r} is no kind of task; there are {', '.join(KINDS)}.")
    return KINDS[name](name, tuple(labels))


def kind_of(columns: Columns) -> str:
    """The kind of task that rows with these columns are for.

    Args:
        columns: a named image column decides first, then a named column of second texts.

    Returns:
        `image`, `pair` or `text`.
    """
    return "image" if columns.image else "pair" if columns.text_pair else "text"


def load_task(data: DataSettings, seed: int, cache_dir: Path | None = None) -> TaskData:
    """Load the task that a run's configuration names, with its rows.

    Args:
        data: settings; see :class:`DataSettings` and :func:`split_rows`.
        seed: run seed, for the validation split and the subsets.
        cache_dir: where built-in data is cached; None for the default folder.

    Returns:
        The task, its training, validation and test rows, and the name they came by.

    Raises:
        UserError: anything wrong in a file or setting, naming the key, file and row.
    """
    check_settings(data)
    kind = kind_of(columns_of(data))
    task, read = KINDS[kind].open(kind, data, cache_dir)
    return TaskData(data.train or data.test, task, split_rows(data, seed, read, task.strata))


__all__ = [
    "KINDS",
    "Metric",
    "Score",
    "Task",
    "TaskData",
    "confusion",
    "kind_of",
    "load_task",
    "make",
    "mean_score",
]
