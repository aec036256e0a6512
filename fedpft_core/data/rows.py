"""Reading rows: the columns of a file, or built-in data, as inputs and label cells.

What a label cell means is the task's business; here it only has to be there.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpft_core.data import files
from fedpft_core.data.examples import Input
from fedpft_core.data.faults import Faults, RowFault
from fedpft_core.data.folders import is_folder, read_classes
from fedpft_core.data.images import check as check_image
from fedpft_core.disk import plain
from fedpft_core.errors import UserError

BUILTIN_DOCSTRINGS = "builtin:docstrings"
"""Name of the embedded text-classification data; see :mod:`fedpft_core.data.builtin`."""

MOST_PIXELS = 64_000_000
"""Pixels of the largest image that is read, 192 MB once it is decoded."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what."""

    text: str = "text"
    """The text; unused for images."""
    text_pair: str = ""
    """The second text of a pair; "" for none."""
    image: str = ""
    """Images: bytes, ``{"bytes": …}`` or a path relative to the data file's folder; "" for text.
    Of a folder of images any name."""
    label: str = "label"
    """What is to be learned; unused for generation."""
    task: str = ""
    """What is done with it, one of `config.TASKS`; "" where the columns tell."""
    separator: str = ","
    """What stands between several labels in one text."""
    response: str = ""
    """The response to the text, for generation; "" where the text itself is to be learned."""
    messages: str = ""
    """Conversations, for generation: a list of messages, each with role and content."""
    source: str = ""
    """Where a row is from, for sharing rows out among simulated clients; "" where that is not
    known. In generation subsets are drawn by it as well."""
    max_bad: float = 0.0
    """Rows that may be left out because they cannot be used: a share below 1, or a number."""

    def faults(self, key: str) -> Faults:
        """Where rows of one file are noted that cannot be used.

        Args:
            key: configuration key that named the file; "" on a node, whose own setting it is then.

        Returns:
            None noted yet.
        """
        return Faults(self.max_bad, "data.max-bad-rows" if key else "max-bad-rows")


@dataclass(frozen=True)
class Table:
    """Rows as read: label cells not yet looked at."""

    inputs: tuple[Input, ...]
    cells: tuple[Any, ...]
    """One label cell a row; an empty text only where a row may have no label."""
    where: str
    """Key and file, put in front of messages."""
    names: tuple[str, ...] = ()
    """Label names in their order where the source knows them; empty for files."""
    separator: str = ","
    """What stands between several labels in one text."""
    sources: tuple[str, ...] = ()
    """Where each row is from; empty where that is not known."""
    numbers: tuple[int, ...] = ()
    """Where each row stands in its source, from 0; empty where none was left out."""
    faults: Faults = field(default_factory=Faults, compare=False)
    """The rows that were left out."""

    def row(self, i: int) -> int:
        """What messages call a row.

        Args:
            i: its number here, from 0.

        Returns:
            Its number in its source, from 1.
        """
        return (self.numbers[i] if self.numbers else i) + 1

    def keep(self, check: Callable[[int], object]) -> Table:
        """Leave out the rows that a task cannot use.

        Args:
            check: raises `RowFault` for those, given a row's number here, from 0.

        Returns:
            The other rows.

        Raises:
            UserError: they are more than may be.
        """
        place = {self.row(i) - 1: i for i in range(len(self.cells))}
        total = len(place) + len(self.faults.bad)
        kept = self.faults.each(total, lambda number: (check(place[number]), number)[1])
        if len(kept) == len(place):
            return self
        rows = [place[number] for number in kept]
        return replace(
            self,
            inputs=tuple(self.inputs[i] for i in rows),
            cells=tuple(self.cells[i] for i in rows),
            sources=tuple(self.sources[i] for i in rows) if self.sources else (),
            numbers=tuple(kept),
        )

    @property
    def said(self) -> str:
        """What was left out, in words; empty where nothing was."""
        return self.faults.said(len(self.cells) + len(self.faults.bad))


def read_table(path: str | Path, columns: Columns, key: str = "") -> Table:
    """All rows of one file, in file order.

    Args:
        path: .csv, .tsv, .json, .jsonl or .parquet file; or a folder with a folder of images for
            each class, whose name then is the label cell.
        columns: which of its columns to read.
        key: configuration key to name in messages; "" for none.

    Returns:
        The rows, without label names.

    Raises:
        UserError: missing file or column, no rows, empty cell, or malformed content; names the
            file and, where there is one, the row (from 1).
    """
    where = f"{key}: {path}" if key else str(path)
    faults = columns.faults(key)
    if is_folder(path):
        content, classes = read_classes(Path(path), where)
        kept = faults.each(
            len(content),
            lambda i: (
                image_bytes(content[i], Path(path), f"{where}: image {i + 1}"), classes[i], i
            ),
        )  # fmt: skip
        return _table(kept, where, columns, faults)
    texts = [columns.text, columns.text_pair] if columns.text_pair else [columns.text]
    names = [columns.image] if columns.image else texts
    wanted = [*names, columns.label, *([columns.source] if columns.source else [])]
    found = files.read_columns(path, wanted, key, faults)
    cells, folder = found[columns.label], Path(path).parent

    def read(i: int) -> tuple[Input, Any, int]:
        at = f"{where}: row {i + 1}"
        _check_label(cells[i], columns, at)
        one: Input
        if columns.image:
            one = image_bytes(found[columns.image][i], folder, at)
        elif columns.task == "tokens":
            one = _words(found[columns.text][i], columns.text, at)
        else:
            parts = tuple(text_in(found[name][i], name, at) for name in names)
            one = parts if columns.text_pair else parts[0]
        return one, cells[i], i

    table = _table(faults.each(len(cells), read), where, columns, faults)
    if not columns.source:
        return table
    numbers = table.numbers or range(len(table.cells))
    return replace(table, sources=tuple(str(found[columns.source][i]) for i in numbers))


def _table(
    kept: Sequence[tuple[Input, Any, int]], where: str, columns: Columns, faults: Faults
) -> Table:
    inputs, cells, numbers = zip(*kept, strict=True) if kept else ((), (), ())
    return Table(
        inputs, cells, where, separator=columns.separator,
        numbers=numbers if faults.bad else (), faults=faults,
    )  # fmt: skip


def _check_label(value: Any, columns: Columns, at: str) -> None:
    blank = isinstance(value, str) and columns.task == "multi-label"
    if value is None or value != value or not (blank or cell_text(value)):
        raise RowFault(f"{at} has no label in column {columns.label!r}.", "without label")
    if not _is_text(cell_text(value)):
        raise RowFault(
            f"{at} holds half of a character in column {columns.label!r}.", "with broken text"
        )


def read_split(source: str, split: str, columns: Columns, cache_dir: Path | None) -> Table:
    """The rows of one split of a task.

    Args:
        source: a file, or the name of built-in data.
        split: "train", "validation" or "test".
        columns: which columns of a file to read.
        cache_dir: where built-in data is cached; None for the default folder.

    Returns:
        All rows of a file, or those of that split of built-in data, with its label names.

    Raises:
        UserError: see :func:`read_table`; or there is no such built-in data.
    """
    key = f"data.{split}"
    if source == BUILTIN_DOCSTRINGS:
        from fedpft_core.data import builtin

        rows = builtin.docstring_rows(cache_dir)
        chosen = [i for i, name in enumerate(rows.split) if name == split]
        return Table(
            tuple(rows.text[i] for i in chosen),
            tuple(rows.label[i] for i in chosen),
            f"{key}: {source}",
            builtin.KINDS,
        )
    if source.startswith("builtin:"):
        raise UserError(f"{key} is {source!r}; the only built-in data is {BUILTIN_DOCSTRINGS!r}.")
    return read_table(source, columns, key)


def cell_text(value: Any) -> str:
    """A cell as text without surrounding blanks; a whole number without its decimal point.

    Args:
        value: a cell of any type.

    Returns:
        The text: "3" for 3.0 and for " 3 " alike.
    """
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    # One spelling for what looks and means the same: é as one character or as two.
    return unicodedata.normalize("NFC", str(value).strip())


def _is_text(value: str) -> bool:
    """Whether it has UTF-8: JSON can write half of a character, which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_in(value: Any, column: str, at: str) -> str:
    """The cell of a column of texts.

    Args:
        value: the cell.
        column: its name, for messages.
        at: key, file and row, put in front of messages.

    Returns:
        The same text.

    Raises:
        RowFault: the cell is empty, or no text; names the row and not what is in it.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowFault(f"{at} has no text in column {column!r}.", "without text")
    if not isinstance(value, str):
        raise RowFault(
            f"{at} holds {type(value).__name__} instead of text in column {column!r}.",
            "with no text but another type",
        )
    if not _is_text(value):
        raise RowFault(f"{at} holds half of a character in column {column!r}.", "with broken text")
    return value


def _words(value: Any, column: str, at: str) -> Input:
    if not isinstance(value, list | tuple):
        raise RowFault(
            f"{at} holds {type(value).__name__} instead of a list of words in column {column!r}.",
            "with no list of words",
        )
    if not value:
        raise RowFault(f"{at} has no words in column {column!r}.", "without words")
    if not all(isinstance(word, str) and word.strip() for word in value):
        raise RowFault(
            f"{at} has a word that is no text in column {column!r}.", "with a word that is no text"
        )
    return tuple(value)


def image_bytes(value: Any, folder: Path, where: str) -> bytes:
    """The encoded image in a cell: bytes, ``{"bytes": …, "path": …}``, or a path.

    Args:
        value: the cell.
        folder: what relative paths are relative to.
        where: file and row, put in front of messages.

    Returns:
        The image file's content, not decoded.

    Raises:
        RowFault: the cell is empty or of another type, the image file cannot be read, the bytes
            are no image or not a whole one, its pixels have no known range (32-bit numbers), or it
            has more than `MOST_PIXELS` of them.
    """
    content = _image_content(value, folder, where)
    check_image(content, where, MOST_PIXELS)
    return content


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
            raise RowFault(
                f"{where}: the image file {path} cannot be read ({error.strerror or error}).",
                "with an image file that cannot be read",
            ) from error
        if content:
            return content
        raise RowFault(f"{where}: the image file {path} is empty.", "with an empty image file")
    if value is None or not value:
        raise RowFault(f"{where}: there is no image.", "without image")
    raise RowFault(
        f"{where}: an image is bytes, a dictionary with bytes, or a path, not "
        f"{type(value).__name__}.",
        "with no image but another type",
    )
