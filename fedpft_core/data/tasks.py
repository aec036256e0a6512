"""Labelled examples and the three splits of a task, from the built-in data or from own files."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedpft_core.data import files
from fedpft_core.disk import plain
from fedpft_core.errors import UserError

BUILTIN_DOCSTRINGS = "builtin:docstrings"
"""Name of the embedded text-classification data; see :mod:`fedpft_core.data.builtin`."""

Input = str | tuple[str, str] | bytes
"""One example's input: a text, a pair of texts, or an encoded image file."""


class DataSettings(Protocol):
    """The configuration attributes that :func:`load_task` reads (all under the key ``data.``)."""

    @property
    def train(self) -> str: ...
    @property
    def validation(self) -> str: ...
    @property
    def test(self) -> str: ...
    @property
    def text_column(self) -> str: ...
    @property
    def text_pair_column(self) -> str: ...
    @property
    def image_column(self) -> str: ...
    @property
    def label_column(self) -> str: ...
    @property
    def labels(self) -> str: ...
    @property
    def validation_share(self) -> float: ...
    @property
    def max_train_rows(self) -> int: ...
    @property
    def max_test_rows(self) -> int: ...


@dataclass(frozen=True)
class Examples:
    """Inputs with their class numbers; row i of one belongs to row i of the other."""

    inputs: tuple[Input, ...]
    """Texts, pairs of texts, or encoded images (all of one kind)."""
    labels: np.ndarray
    """int64, shape (rows,): index into the task's label names."""

    def __post_init__(self) -> None:
        # A read-only copy: examples are shared between clients of one simulation.
        labels = np.array(self.labels, dtype=np.int64)
        if labels.shape != (len(self.inputs),):
            raise ValueError(f"{len(self.inputs)} inputs but labels of shape {labels.shape}")
        labels.flags.writeable = False
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.inputs)

    def select(self, indices: Iterable[int] | np.ndarray) -> Examples:
        """The rows with these numbers, in this order."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return Examples(tuple(self.inputs[i] for i in chosen), self.labels[chosen])


@dataclass(frozen=True)
class Task:
    """A classification task: what the labels mean and three disjoint sets of examples."""

    name: str
    """The ``data.train`` value it came from, for reports."""
    kind: str
    """"text", "pair" or "image": the type of every input."""
    label_names: tuple[str, ...]
    """Class c is called label_names[c]."""
    train: Examples
    """Rows shared out among the clients."""
    validation: Examples
    """Rows the server may use for choices; empty if none were asked for."""
    test: Examples
    """Rows for reporting only."""


def load_task(data: DataSettings, seed: int, cache_dir: Path | None = None) -> Task:
    """Load the train, validation and test examples that the configuration names.

    ``data.train`` may be "" where the clients alone hold training rows: then there are none here.
    ``data.test`` may be "" only when ``data.train`` is built in (its own test split is used);
    the same holds for ``data.validation``, which otherwise is cut from the training rows
    (``data.validation-share`` of each class, chosen by ``seed``). The subsets for
    ``data.max-train-rows`` and ``data.max-test-rows`` keep the class shares; the former is taken
    after validation has been cut off, so it does not change which rows validate.

    Args:
        data: settings; see :class:`DataSettings`.
        seed: run seed, used for the validation split and the subsets, each independently.
        cache_dir: where built-in data is cached; None for the default folder.

    Raises:
        UserError: anything wrong in a file or setting, naming the key, file and row.
    """
    if not data.train and not data.test:
        raise UserError(
            f"data.train and data.test are empty; name files or {BUILTIN_DOCSTRINGS!r}."
        )
    share = float(data.validation_share)
    if not 0.0 <= share < 0.5:
        raise UserError(f"data.validation-share is {share:g}; it must be in [0, 0.5).")
    for limit_key, limit in (
        ("data.max-train-rows", data.max_train_rows),
        ("data.max-test-rows", data.max_test_rows),
    ):
        if limit < 0:
            raise UserError(f"{limit_key} is {limit}; it must be 0 (all rows) or more.")
    kind = _kind(data)
    from_builtin = data.train == BUILTIN_DOCSTRINGS
    if not data.test and not from_builtin:
        raise UserError("data.test is empty; name a file with test rows.")

    # Without training rows (they lie with the clients) the labels are those of the test rows.
    owned = "train" if data.train else "test"
    owned_rows = _read_split(data, data.train or data.test, owned, cache_dir)
    if data.labels:
        names = label_names(data.labels)
    else:
        names = owned_rows.names or _names_from_rows(owned_rows.labels, owned_rows.where)
    if len(names) < 2:
        raise UserError(
            f"{owned_rows.where}: only one label, {names[0]!r}; classification needs two or more."
        )
    train = owned_rows.examples(names)
    if not data.train:
        train = train.select([])
    test = _read_split(data, data.test or data.train, "test", cache_dir).examples(names)
    if data.validation or from_builtin:
        source = data.validation or data.train
        validation = _read_split(data, source, "validation", cache_dir).examples(names)
    else:
        count = round(share * len(train))
        if share > 0 and len(train) > 1:
            count = max(count, 1)
        held_out = stratified_subset(train.labels, count, _rng(seed, "validation"))
        validation = train.select(held_out)
        train = train.select(np.setdiff1d(np.arange(len(train)), held_out))
    if 0 < data.max_train_rows < len(train):
        chosen = stratified_subset(train.labels, data.max_train_rows, _rng(seed, "train rows"))
        train = train.select(chosen)
    if 0 < data.max_test_rows < len(test):
        chosen = stratified_subset(test.labels, data.max_test_rows, _rng(seed, "test rows"))
        test = test.select(chosen)
    return Task(data.train or data.test, kind, names, train, validation, test)


def load_examples(
    path: str | Path,
    *,
    label_names: Sequence[str] | None,
    text_column: str = "text",
    text_pair_column: str = "",
    image_column: str = "",
    label_column: str = "label",
    key: str = "",
) -> Examples:
    """Load one file of labelled rows, for instance an edge node's own data.

    Args:
        path: .csv, .tsv, .json, .jsonl or .parquet file.
        label_names: the names the server knows; a cell is matched as :func:`label_index` says.
            None where they are not known yet: then the names are those of the rows.
        text_column: column with the text; unused for images.
        text_pair_column: column with the second text; "" for none.
        image_column: column with images (bytes, ``{"bytes": …}`` or a path relative to the data
            file's folder); "" for text.
        label_column: column with the label.
        key: configuration key to name in messages; "" for none.

    Returns:
        All rows of the file, in file order.

    Raises:
        UserError: missing file or column, no rows, empty text, malformed content, or a label not
            among ``label_names``; names the file and, where there is one, the row (from 1).
    """
    rows = _read_file(path, text_column, text_pair_column, image_column, label_column, key)
    names = _names_from_rows(rows.labels, rows.where) if label_names is None else label_names
    return rows.examples(tuple(names))


def label_index(value: Any, names: Sequence[str]) -> int | None:
    """The class number that a label cell stands for, or None if it stands for none.

    A cell is first compared with the names, as text without surrounding blanks (``3``, ``3.0`` and
    ``" 3 "`` are all the text "3"). An integer that is no name is an index into ``names``, unless
    all names are integers themselves, where it would be a label nobody has declared.
    """
    return _LabelTable(names).index(value)


def stratified_subset(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose rows so that every class keeps its share.

    Each class is shuffled and its j-th row (from 0) of n gets the rank (j + ½) / n; the ``count``
    lowest ranks win, ties decided at random. So class shares differ from exact proportion by a
    row or so, and a larger count extends a smaller one's choice.

    Args:
        labels: shape (rows,), integers.
        count: how many rows; at most ``len(labels)``.
        rng: source of randomness.

    Returns:
        int64, shape (count,): row numbers in ascending order.
    """
    labels = np.asarray(labels)
    rank = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        rank[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    order = np.lexsort((rng.permutation(len(labels)), rank))
    return np.sort(order[:count]).astype(np.int64)


class _LabelTable:
    """Looks label cells up in the list of names; see :func:`label_index`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.by_name = {_cell_text(name): i for i, name in enumerate(names)}
        self.all_integers = all(_as_integer(name) is not None for name in names)
        if self.all_integers:
            self.by_name = {str(_as_integer(name)): i for i, name in enumerate(names)}

    def index(self, value: Any) -> int | None:
        text = _cell_text(value)
        number = _as_integer(text)
        if self.all_integers:
            return None if number is None else self.by_name.get(str(number))
        if text in self.by_name:
            return self.by_name[text]
        if number is not None and 0 <= number < len(self.by_name):
            return number
        return None


def _cell_text(value: Any) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _as_integer(value: Any) -> int | None:
    """The integer a cell's text writes ("007" and "3.0" do), or None."""
    text = _cell_text(value)
    if text.endswith(".0"):
        text = text[:-2]
    digits = text[1:] if text[:1] in "+-" else text
    # No label is a number of so many digits that Python would refuse to read it.
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 1000 else None


@dataclass(frozen=True)
class _Rows:
    """Rows as read: label cells not yet looked up."""

    inputs: tuple[Input, ...]
    labels: list[Any]
    where: str
    """Key and file, put in front of messages."""
    names: tuple[str, ...] = ()
    """Label names in class order where the source knows them; empty for files."""

    def examples(self, names: Sequence[str]) -> Examples:
        table = _LabelTable(names)
        numbers = np.empty(len(self.labels), dtype=np.int64)
        for i, value in enumerate(self.labels):
            number = table.index(value)
            if number is None:
                shown = ", ".join(repr(name) for name in names[:8])
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                raise UserError(
                    f"{self.where}: row {i + 1} has the unknown label {_cell_text(value)!r}; "
                    f"known are {shown}{more}."
                )
            numbers[i] = number
        return Examples(self.inputs, numbers)


def _kind(data: DataSettings) -> str:
    if data.image_column and data.text_pair_column:
        raise UserError("data.image-column and data.text-pair-column cannot both be set.")
    if BUILTIN_DOCSTRINGS in (data.train, data.validation, data.test):
        for key, value in (
            ("data.image-column", data.image_column),
            ("data.text-pair-column", data.text_pair_column),
        ):
            if value:
                raise UserError(f"{key} is {value!r}, but {BUILTIN_DOCSTRINGS} has single texts.")
    return "image" if data.image_column else "pair" if data.text_pair_column else "text"


def _read_split(data: DataSettings, source: str, split: str, cache_dir: Path | None) -> _Rows:
    key = f"data.{split}"
    if source == BUILTIN_DOCSTRINGS:
        from fedpft_core.data import builtin

        rows = builtin.docstring_rows(cache_dir)
        chosen = [i for i, name in enumerate(rows.split) if name == split]
        return _Rows(
            tuple(rows.text[i] for i in chosen),
            [rows.label[i] for i in chosen],
            f"{key}: {source}",
            builtin.LIBRARIES,
        )
    if source.startswith("builtin:"):
        raise UserError(f"{key} is {source!r}; the only built-in data is {BUILTIN_DOCSTRINGS!r}.")
    return _read_file(
        source,
        data.text_column,
        data.text_pair_column,
        data.image_column,
        data.label_column,
        key,
    )


def _read_file(
    path: str | Path, text: str, text_pair: str, image: str, label: str, key: str
) -> _Rows:
    where = f"{key}: {path}" if key else str(path)
    input_columns = [image] if image else [text, text_pair] if text_pair else [text]
    columns = files.read_columns(path, [*input_columns, label], key)
    labels = columns[label]
    for row, value in enumerate(labels, start=1):
        if value is None or not _cell_text(value) or value != value:
            raise UserError(f"{where}: row {row} has no label in column {label!r}.")
    inputs: list[Input]
    if image:
        folder = Path(path).parent
        inputs = [
            image_bytes(value, folder, f"{where}: row {row}")
            for row, value in enumerate(columns[image], start=1)
        ]
    else:
        texts = [_texts(columns[name], name, where) for name in input_columns]
        inputs = list(zip(*texts, strict=True)) if text_pair else list(texts[0])
    return _Rows(tuple(inputs), labels, where)


def _texts(values: Sequence[Any], column: str, where: str) -> list[str]:
    for row, value in enumerate(values, start=1):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{where}: row {row} has no text in column {column!r}.")
        if not isinstance(value, str):
            raise UserError(
                f"{where}: row {row} holds {type(value).__name__} instead of text in column "
                f"{column!r}."
            )
    return list(values)


def image_bytes(value: Any, folder: Path, where: str) -> bytes:
    """The encoded image in a cell: bytes, ``{"bytes": …, "path": …}``, or a path.

    Args:
        value: the cell.
        folder: what relative paths are relative to.
        where: file and row, put in front of messages.

    Raises:
        UserError: the cell is empty or of another type, the image file cannot be read, or the
            bytes do not begin like an image (the whole is decoded only when it is used).
    """
    from PIL import Image

    content = _image_content(value, folder, where)

    try:
        with Image.open(io.BytesIO(content)):
            return content
    except Exception as error:  # damaged headers make PIL raise a dozen kinds
        raise UserError(
            f"{where}: the {len(content)} bytes are not a known image format."
        ) from error


def _image_content(value: Any, folder: Path, where: str) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray) and value:
        return bytes(value)
    if isinstance(value, str) and value.strip():
        path = folder / value.strip()
        try:
            content = plain.read(path)
        except OSError as error:
            raise UserError(
                f"{where}: the image file {path} cannot be read ({error.strerror or error})."
            ) from error
        if content:
            return content
        raise UserError(f"{where}: the image file {path} is empty.")
    if value is None or not value:
        raise UserError(f"{where}: there is no image.")
    raise UserError(
        f"{where}: an image is bytes, a dictionary with bytes, or a path, not "
        f"{type(value).__name__}."
    )


def label_names(setting: str) -> tuple[str, ...]:
    """``data.labels``: a path to a JSON list of names, or names separated by commas.

    Raises UserError when it names fewer than two, one twice, or an unreadable file.
    """
    if setting.lower().endswith(".json"):
        text = files.read_text(setting, "data.labels")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"data.labels: {setting}: line {error.lineno} is not valid JSON ({error.msg})."
            ) from error
        if not isinstance(values, list) or not all(
            isinstance(value, str | int) and not isinstance(value, bool) for value in values
        ):
            raise UserError(f"data.labels: {setting}: a JSON list of names is needed.")
        names = tuple(_cell_text(value) for value in values)
    else:
        names = tuple(name.strip() for name in setting.split(","))
    if not all(names):
        raise UserError("data.labels: a label name is empty.")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"data.labels: the name {name!r} occurs more than once.")
    if len(names) < 2:
        raise UserError(f"data.labels: {setting!r} is one name; two or more are needed.")
    return names


def _names_from_rows(labels: Sequence[Any], where: str) -> tuple[str, ...]:
    """Sorted unique labels; numerically, and spelt as plain integers, if all are integers."""
    if not labels:
        raise UserError(f"{where}: the file holds no rows.")
    texts = {_cell_text(value) for value in labels}
    numbers = {_as_integer(text) for text in texts}
    if None not in numbers:
        return tuple(str(number) for number in sorted(n for n in numbers if n is not None))
    return tuple(sorted(texts))


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own per purpose, so that one choice never shifts another."""
    return np.random.default_rng([zlib.crc32(f"data: {purpose}".encode()), seed])
