"""Tasks: one file a kind, and a look-up by name.

`make` gives the task that a package or a node config names, `load_task` the one that a run's
configuration names, with its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import DataSettings, check_settings, columns_of, split_rows
from fedpft_core.errors import UserError
from fedpft_core.task.base import Metric, Score, Task, TaskData, Writer, mean_score
from fedpft_core.task.classify import Classify
from fedpft_core.task.generate import Generate

KINDS: dict[str, Any] = {
    "text": Classify, "pair": Classify, "image": Classify, "generate": Generate,
}  # fmt: skip
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
    task: Task = KINDS[name](name, tuple(labels))
    return task


def kind_of(columns: Columns, task: str = "") -> str:
    """The kind of task that rows with these columns are for.

    Args:
        columns: where no task is named, a named column of responses or messages decides first, then
            one of images, then one of second texts.
        task: `generate`, or "" where the columns tell.

    Returns:
        `generate`, `image`, `pair` or `text`.
    """
    if task or columns.response or columns.messages:
        return task or "generate"
    return "image" if columns.image else "pair" if columns.text_pair else "text"


def sketch(data: DataSettings, reads: str, labels: Iterable[str] = ("a", "b")) -> Task:
    """The task of a run's configuration without its rows, to know a model's shape by.

    Args:
        data: the run's settings of its rows.
        reads: what the model reads, `text` or `image`.
        labels: names that stand for those of the rows, where the task has any.

    Returns:
        A task of the kind that the settings name, or a classification of what the model reads.
    """
    kind = kind_of(columns_of(data), data.task)
    return make(kind) if kind == "generate" else make(reads, labels)


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
    kind = kind_of(columns_of(data), data.task)
    task, read = KINDS[kind].open(kind, data, cache_dir)
    return TaskData(data.train or data.test, task, split_rows(data, seed, read, task.strata))


__all__ = [
    "KINDS",
    "Metric",
    "Score",
    "Task",
    "TaskData",
    "Writer",
    "kind_of",
    "load_task",
    "make",
    "mean_score",
    "sketch",
]
