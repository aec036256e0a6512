"""Training, validation and test rows of a run: what is cut from what, and how many stay."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedpft_core.data.examples import Examples
from fedpft_core.data.faults import check_limit
from fedpft_core.data.folders import is_folder
from fedpft_core.data.rows import BUILTIN_DOCSTRINGS, Columns
from fedpft_core.errors import UserError


class DataSettings(Protocol):
    """The configuration attributes that a task's rows depend on (all under the key ``data.``)."""

    @property
    def train(self) -> str:
        """Training rows: a file or built-in data; "" where the clients alone hold any."""
        ...

    @property
    def validation(self) -> str:
        """Validation rows, likewise; "" where they are cut from the training rows."""
        ...

    @property
    def test(self) -> str:
        """Test rows, likewise; "" only where the training rows are built in."""
        ...

    @property
    def text_column(self) -> str:
        """The column with the text."""
        ...

    @property
    def text_pair_column(self) -> str:
        """The column with the second text of a pair; "" for single texts."""
        ...

    @property
    def image_column(self) -> str:
        """The column with images; "" for texts."""
        ...

    @property
    def label_column(self) -> str:
        """The column with what is to be learned."""
        ...

    @property
    def task(self) -> str:
        """What is learned of a row, one of `config.TASKS`; "" for a class."""
        ...

    @property
    def label_separator(self) -> str:
        """What stands between several labels in one text."""
        ...

    @property
    def response_column(self) -> str:
        """The column with the response to the text, for generation."""
        ...

    @property
    def messages_column(self) -> str:
        """The column with conversations, for generation."""
        ...

    @property
    def source_column(self) -> str:
        """The column that says where a row is from, for generation."""
        ...

    @property
    def labels(self) -> str:
        """Label names, or the file that has them; "" for those of the training rows."""
        ...

    @property
    def validation_share(self) -> float:
        """Share of the training rows cut off for validation, in [0, 0.5)."""
        ...

    @property
    def max_bad_rows(self) -> float:
        """Rows of a file that may be left out: below 1 a share, from 1 on a number."""
        ...

    @property
    def max_train_rows(self) -> int:
        """Training rows used at most; 0 for all."""
        ...

    @property
    def max_test_rows(self) -> int:
        """Test rows used at most; 0 for all."""
        ...


def columns_of(data: DataSettings) -> Columns:
    """Which columns the files of a run's configuration have.

    Args:
        data: the run's ``data.`` keys.

    Returns:
        The names of the columns.
    """
    # A folder has no columns: that it is one says that it has images.
    of_folder = "image" if is_folder(data.train) or is_folder(data.test) else ""
    return Columns(
        data.text_column, data.text_pair_column, data.image_column or of_folder, data.label_column,
        task=data.task, separator=data.label_separator, response=data.response_column,
        messages=data.messages_column, source=data.source_column, max_bad=data.max_bad_rows,
    )  # fmt: skip


def check_settings(data: DataSettings) -> None:
    """Refuse settings that no rows can come of.

    Args:
        data: the run's ``data.`` keys.

    Raises:
        UserError: names the key: no training or test rows, a share or a number of rows out of
            range, or columns that exclude each other or that built-in data has not.
    """
    if not data.train and not data.test:
        raise UserError(
            f"data.train and data.test are empty; name files or {BUILTIN_DOCSTRINGS!r}."
        )
    share = float(data.validation_share)
    if not 0.0 <= share < 0.5:
        raise UserError(f"data.validation-share is {share:g}; it must be in [0, 0.5).")
    check_limit(data.max_bad_rows, "data.max-bad-rows")
    for limit_key, limit in (
        ("data.max-train-rows", data.max_train_rows),
        ("data.max-test-rows", data.max_test_rows),
    ):
        if limit < 0:
            raise UserError(f"{limit_key} is {limit}; it must be 0 (all rows) or more.")
    if data.image_column and data.text_pair_column:
        raise UserError("data.image-column and data.text-pair-column cannot both be set.")
    if data.image_column and (data.response_column or data.messages_column):
        raise UserError(
            "data.image-column cannot be set with data.response-column or data.messages-column."
        )
    if data.task == "text-to-image" and not _images(data):
        raise UserError(
            "data.image-column is empty, but data.task = text-to-image has images and, in "
            "data.text-column, their prompts."
        )
    if not data.label_separator:
        raise UserError("data.label-separator is empty; name what stands between labels.")
    if data.task == "tokens":
        for key, value in (
            ("data.image-column", data.image_column),
            ("data.text-pair-column", data.text_pair_column),
        ):
            if value:
                raise UserError(f"{key} is {value!r}, but data.task = tokens has lists of words.")
    if data.task not in ("", "classify") and BUILTIN_DOCSTRINGS in (
        data.train,
        data.validation,
        data.test,
    ):
        raise UserError(
            f"data.task is {data.task!r}, but {BUILTIN_DOCSTRINGS} has one class a row; name files."
        )
    if BUILTIN_DOCSTRINGS in (data.train, data.validation, data.test):
        for key, value in (
            ("data.image-column", data.image_column),
            ("data.text-pair-column", data.text_pair_column),
        ):
            if value:
                raise UserError(f"{key} is {value!r}, but {BUILTIN_DOCSTRINGS} has single texts.")
    if not data.test and data.train != BUILTIN_DOCSTRINGS:
        raise UserError("data.test is empty; name a file with test rows.")


def _images(data: DataSettings) -> bool:
    """Whether the rows have images."""
    return bool(data.image_column) or is_folder(data.train) or is_folder(data.test)


def owned_split(data: DataSettings) -> tuple[str, str]:
    """(source, split) of the rows that tell the label names.

    Without training rows (they lie with the clients) those are the test rows.

    Args:
        data: settings that :func:`check_settings` has passed.

    Returns:
        A file or the name of built-in data, and "train" or "test".
    """
    return (data.train, "train") if data.train else (data.test, "test")


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of examples."""

    train: Examples
    """Rows shared out among the clients."""
    validation: Examples
    """Rows the server may use for choices; empty if none were asked for."""
    test: Examples
    """Rows for reporting only."""
    left_out: tuple[str, ...] = ()
    """What of each file cannot be used, a sentence each, with nothing that stands in it."""


def split_rows(
    data: DataSettings,
    seed: int,
    read: Callable[[str, str], Examples],
    strata: Callable[[Examples], np.ndarray],
) -> Splits:
    """Read the three splits that the configuration names, and cut off what it asks for.

    ``data.train`` may be "" where the clients alone hold training rows: then there are none here.
    ``data.test`` may be "" only when ``data.train`` is built in (its own test split is used);
    the same holds for ``data.validation``, which otherwise is cut from the training rows
    (``data.validation-share`` of each stratum, chosen by ``seed``). The subsets for
    ``data.max-train-rows`` and ``data.max-test-rows`` keep the strata's shares; the former is taken
    after validation has been cut off, so it does not change which rows validate.

    Args:
        data: settings that :func:`check_settings` has passed.
        seed: run seed, used for the validation split and the subsets, each independently.
        read: called with (source, split), gives that source's rows of that split.
        strata: the stratum of each row, integers of shape (rows,).

    Returns:
        The three sets of examples.

    Raises:
        UserError: whatever `read` raises.
    """
    sources: dict[str, Examples] = {}

    def noted(source: str, split: str) -> Examples:
        sources[split] = read(source, split)
        return sources[split]

    train = noted(*owned_split(data))
    if not data.train:
        train = train.select([])
    test = noted(data.test or data.train, "test")
    if data.validation or data.train == BUILTIN_DOCSTRINGS:
        validation = noted(data.validation or data.train, "validation")
    else:
        share = float(data.validation_share)
        count = round(share * len(train))
        if share > 0 and len(train) > 1:
            count = max(count, 1)
        held_out = stratified_subset(strata(train), count, _rng(seed, "validation"))
        validation = train.select(held_out)
        train = train.select(np.setdiff1d(np.arange(len(train)), held_out))
    if 0 < data.max_train_rows < len(train):
        stream = _rng(seed, "train rows")
        train = train.select(stratified_subset(strata(train), data.max_train_rows, stream))
    if 0 < data.max_test_rows < len(test):
        stream = _rng(seed, "test rows")
        test = test.select(stratified_subset(strata(test), data.max_test_rows, stream))
    left_out = tuple(
        f"data.{split}: {rows.left_out} (data.max-bad-rows = {data.max_bad_rows:g})"
        for split, rows in sources.items()
        if rows.left_out
    )
    return Splits(train, validation, test, left_out)


def stratified_subset(strata: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose rows so that every stratum keeps its share.

    Each stratum is shuffled and its j-th row (from 0) of n gets the rank (j + ½) / n; the ``count``
    lowest ranks win, ties decided at random. So shares differ from exact proportion by a row or
    so, and a larger count extends a smaller one's choice.

    Args:
        strata: the stratum of each row, integers of shape (rows,).
        count: how many rows; at most ``len(strata)``.
        rng: source of randomness.

    Returns:
        int64, shape (count,): row numbers in ascending order.
    """
    strata = np.asarray(strata)
    rank = np.empty(len(strata), dtype=np.float64)
    for stratum in np.unique(strata):
        rows = rng.permutation(np.flatnonzero(strata == stratum))
        rank[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    order = np.lexsort((rng.permutation(len(strata)), rank))
    return np.sort(order[:count]).astype(np.int64)


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own per purpose, so that one choice never shifts another."""
    return np.random.default_rng([zlib.crc32(f"data: {purpose}".encode()), seed])
