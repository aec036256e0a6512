"""Reading rows: the columns of a file, or built-in data, as inputs and label cells.

What a label cell means is the task's business; here it only has to be there.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpft_core.data import files
from fedpft_core.data.examples import Input
from fedpft_core.data.folders import is_folder, read_classes
from fedpft_core.disk import plain
from fedpft_core.errors import UserError

BUILTIN_DOCSTRINGS = "builtin:docstrings"
"""Name of the embedded text-classification data; see :mod:`fedpft_core.data.builtin`."""


TASKS = ("classify", "regress", "multi-label", "tokens", "generate", "text-to-image")
"""What is done with rows: a class, a number or several labels a row, a class a word, text, or
images."""

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
    """What is done with it, one of `TASKS`; "" where the columns tell."""
    separator: str = ","
    """What stands between several labels in one text."""
    response: str = ""
    """The response to the text, for generation; "" where the text itself is to be learned."""
    messages: str = ""
    """Conversations, for generation: a list of messages, each with role and content."""
    source: str = ""
    """Where a row is from, for generation: clients and subsets are shared out by it."""


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
    if is_folder(path):
        content, classes = read_classes(Path(path), where)
        for row, one in enumerate(content, start=1):
            image_bytes(one, Path(path), f"{where}: image {row}")
        return Table(tuple(content), tuple(classes), where, separator=columns.separator)
    texts = [columns.text, columns.text_pair] if columns.text_pair else [columns.text]
    names = [columns.image] if columns.image else texts
    found = files.read_columns(path, [*names, columns.label], key)
    cells = found[columns.label]
    for row, value in enumerate(cells, start=1):
        blank = isinstance(value, str) and columns.task == "multi-label"
        if value is None or value != value or not (blank or cell_text(value)):
            raise UserError(f"{where}: row {row} has no label in column {columns.label!r}.")
        if not _is_text(cell_text(value)):
            raise UserError(
                f"{where}: row {row} holds half of a character in column {columns.label!r}."
            )
    inputs: list[Input]
    if columns.image:
        folder = Path(path).parent
        inputs = [
            image_bytes(value, folder, f"{where}: row {row}")
            for row, value in enumerate(found[columns.image], start=1)
        ]
    elif columns.task == "tokens":
        inputs = _words(found[columns.text], columns.text, where)
    else:
        parts = [texts_in(found[name], name, where) for name in names]
        inputs = list(zip(*parts, strict=True)) if columns.text_pair else list(parts[0])
    return Table(tuple(inputs), tuple(cells), where, separator=columns.separator)


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


def texts_in(values: Sequence[Any], column: str, where: str) -> list[str]:
    """The cells of a column of texts.

    Args:
        values: the cells.
        column: its name, for messages.
        where: key and file, put in front of messages.

    Returns:
        The same cells.

    Raises:
        UserError: a cell is empty, or no text; names the row and not what is in it.
    """
    for row, value in enumerate(values, start=1):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{where}: row {row} has no text in column {column!r}.")
        if not isinstance(value, str):
            raise UserError(
                f"{where}: row {row} holds {type(value).__name__} instead of text in column "
                f"{column!r}."
            )
        if not _is_text(value):
            raise UserError(f"{where}: row {row} holds half of a character in column {column!r}.")
    return list(values)


def _words(values: Sequence[Any], column: str, where: str) -> list[Input]:
    out: list[Input] = []
    for row, value in enumerate(values, start=1):
        if not isinstance(value, list | tuple):
            raise UserError(
                f"{where}: row {row} holds {type(value).__name__} instead of a list of words in "
                f"column {column!r}."
            )
        if not value:
            raise UserError(f"{where}: row {row} has no words in column {column!r}.")
        if not all(isinstance(word, str) and word.strip() for word in value):
            raise UserError(f"{where}: row {row} has a word that is no text in column {column!r}.")
        out.append(tuple(value))
    return out


def image_bytes(value: Any, folder: Path, where: str) -> bytes:
    """The encoded image in a cell: bytes, ``{"bytes": …, "path": …}``, or a path.

    Args:
        value: the cell.
        folder: what relative paths are relative to.
        where: file and row, put in front of messages.

    Returns:
        The image file's content, not decoded.

    Raises:
        UserError: the cell is empty or of another type, the image file cannot be read, or the
            bytes do not begin like an image (the whole is decoded only when it is used), or it has
            more than `MOST_PIXELS` pixels.
    """
    from PIL import Image

    content = _image_content(value, folder, where)

    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except Exception as error:  # damaged headers make PIL raise a dozen kinds
        raise UserError(
            f"{where}: the {len(content)} bytes are not a known image format."
        ) from error
    if width * height > MOST_PIXELS:
        # A few kilobytes can hold an image that takes gigabytes once it is decoded.
        raise UserError(
            f"{where}: the image has {width} x {height} pixels, more than {MOST_PIXELS:,} in all."
        )
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
