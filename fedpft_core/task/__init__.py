"""Tasks: one file a kind, and a look-up by name.

`make` gives the task that a package or a node config names, `load_task` the one that a run's
configuration names, with its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpft_core import registry
from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import DataSettings, check_settings, columns_of, split_rows
from fedpft_core.errors import UserError
from fedpft_core.task.base import Task, TaskData
from fedpft_core.task.capabilities import Headless, Painter, Writer
from fedpft_core.task.classify import Classify, confusion
from fedpft_core.task.generate import Generate
from fedpft_core.task.multi import MultiLabel
from fedpft_core.task.regress import Regress
from fedpft_core.task.score import Metric, Score, mean_score
from fedpft_core.task.text_to_image import TextToImage
from fedpft_core.task.tokens import Tokens

_Kind = (
    type[Classify] | type[Regress] | type[MultiLabel] | type[Tokens] | type[Generate]
    | type[TextToImage]
)  # fmt: skip

KINDS: dict[str, _Kind] = {
    "text": Classify,
    "pair": Classify,
    "image": Classify,
    "text-regression": Regress,
    "pair-regression": Regress,
    "image-regression": Regress,
    "text-labels": MultiLabel,
    "pair-labels": MultiLabel,
    "image-labels": MultiLabel,
    "tokens": Tokens,
    "generate": Generate,
    "text-to-image": TextToImage,
}
"""Kinds of task by the name they have in packages: what a row is, and what is done with it."""

_SUFFIX = {"": "", "classify": "", "regress": "-regression", "multi-label": "-labels"}


_ROWS = ("text", "pair", "image")


def class_of(name: str) -> _Kind | None:
    """What a kind of task is made of, one of a plugin too.

    Args:
        name: one of `KINDS`, or for the plugin `ordinal` one of `text-ordinal`, `pair-ordinal` and
            `image-ordinal`.

    Returns:
        The class; None where there is no such kind.

    Raises:
        UserError: it is a plugin's, which cannot be imported or holds no task.
    """
    if name in KINDS:
        return KINDS[name]
    rows, _, rest = name.partition("-")
    if rows not in _ROWS or rest not in registry.names("task"):
        return None
    found: _Kind = registry.held("task", rest)
    return found


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
    found = class_of(name)
    if found is None:
        raise UserError(f"{name!r} is no kind of task; there are {', '.join(KINDS)}.")
    return found(name, tuple(labels))


def kind_of(columns: Columns) -> str:
    """The kind of task that rows with these columns are for.

    Args:
        columns: its task, and what a row is: a named image column decides first, then a named
            column of second texts. Where no task is named, responses or messages are generation's.

    Returns:
        One of `KINDS`, or a kind of a plugin.
    """
    said = not columns.task and (columns.response or columns.messages)
    if columns.task == "generate" or said:
        return "generate"
    if columns.task in ("tokens", "text-to-image"):
        return columns.task
    rows = "image" if columns.image else "pair" if columns.text_pair else "text"
    return rows + _SUFFIX.get(columns.task, f"-{columns.task}")


def of_model(reads: str, architecture: str, config: Any) -> Task:
    """The task that a model of the library is for.

    Args:
        reads: what it reads, `text`, `image` or `captioned image`.
        architecture: the name of its class.
        config: its Hugging Face config: the problem that it names decides, and one output without
            a name of the problem is a number, as the library has it.

    Returns:
        The task, with the names of the head's outputs.
    """
    labels: Mapping[int, str] = getattr(config, "id2label", None) or {}
    if reads == "captioned image":
        return make("text-to-image")
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return make("generate")
    if architecture.endswith("ForTokenClassification"):
        return make("tokens", labels.values())
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or (problem is None and len(labels) == 1):
        return make(f"{reads}-regression")
    suffix = "-labels" if problem == "multi_label_classification" else ""
    return make(f"{reads}{suffix}", labels.values())


def sample(reads: str, columns: Columns, labels: Iterable[str] = ()) -> Task:
    """A task like that of a run, for which no rows have been read.

    Args:
        reads: what the model reads, `text` or `image`; it decides where the columns say otherwise.
        columns: of the run's files.
        labels: names where they are known; else two that stand for the head's.

    Returns:
        The task.
    """
    if reads == "captioned image":
        return make("text-to-image")
    image = (columns.image or "image") if reads == "image" else ""
    name = kind_of(replace(columns, image=image))
    kind = class_of(name)
    return make(name, (tuple(labels) or ("a", "b")) if kind is not None and kind.named else ())


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
    found = class_of(kind)
    if found is None:
        raise UserError(f"data.task = {data.task}: there is no such task for these rows.")
    task, read = found.open(kind, data, cache_dir)
    return TaskData(data.train or data.test, task, split_rows(data, seed, read, task.strata))


__all__ = [
    "KINDS",
    "Headless",
    "Metric",
    "Painter",
    "Score",
    "Task",
    "TaskData",
    "Writer",
    "class_of",
    "confusion",
    "kind_of",
    "load_task",
    "make",
    "mean_score",
    "of_model",
    "sample",
]
