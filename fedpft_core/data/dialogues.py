"""Rows of free text: prompts with their responses, conversations, and texts by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpft_core.data import files
from fedpft_core.data.examples import Chat, Examples, Input, texts_of
from fedpft_core.data.rows import BUILTIN_DOCSTRINGS, Columns, texts_in
from fedpft_core.errors import UserError

_BINS = 10  # groups of rows by length, where no column says where they are from
_ROLES = ("system", "user", "assistant", "tool")


def read_dialogues(path: str | Path, columns: Columns, key: str = "") -> Examples:
    """All rows of one file, in file order.

    Args:
        path: .csv, .tsv, .json, .jsonl or .parquet file.
        columns: with `messages` the rows are conversations, with `response` pairs of prompt and
            response, otherwise texts. Behind a prompt comes the cell of `text_pair`, if any.
        key: configuration key to name in messages; "" for none.

    Returns:
        The inputs. The labels number the values of the column `source` in sorted order; without
        one they are 0.

    Raises:
        UserError: missing file or column, no rows, an empty response, or messages that are none;
            names the file and the row (from 1), and nothing that stands in the row.
    """
    where = f"{key}: {path}" if key else str(path)
    if str(path).startswith("builtin:"):
        raise UserError(
            f"{where}: text generation needs files of its own ({BUILTIN_DOCSTRINGS} has labels)."
        )
    if columns.messages:
        names = [columns.messages]
    elif columns.response:
        names = [columns.text, columns.response]
        names += [columns.text_pair] if columns.text_pair else []
    else:
        names = [columns.text]
    found = files.read_columns(path, [*names, *([columns.source] if columns.source else [])], key)
    inputs: Sequence[Input]
    if columns.messages:
        inputs = [
            _chat(value, f"{where}: row {row}", columns.messages)
            for row, value in enumerate(found[columns.messages], start=1)
        ]
    elif columns.response:
        for row, value in enumerate(found[columns.response], start=1):
            if value is None or (isinstance(value, str) and not value.strip()):
                raise UserError(f"{where}: row {row} has no response in {columns.response!r}.")
        prompts = texts_in(found[columns.text], columns.text, where)
        if columns.text_pair:
            more = found[columns.text_pair]
            prompts = [_joined(a, b) for a, b in zip(prompts, more, strict=True)]
        answers = texts_in(found[columns.response], columns.response, where)
        inputs = list(zip(prompts, answers, strict=True))
    else:
        inputs = texts_in(found[columns.text], columns.text, where)
    sources = np.zeros(len(inputs), np.int64)
    if columns.source:
        cells = [str(value) for value in found[columns.source]]
        sources = np.unique(cells, return_inverse=True)[1]
    return Examples(tuple(inputs), sources)


def _joined(prompt: str, more: Any) -> str:
    """A prompt with what it is about, which may be nothing."""
    return f"{prompt}\n\n{more}" if isinstance(more, str) and more.strip() else prompt


def _chat(value: Any, where: str, column: str) -> Chat:
    """The messages in a cell; those behind the last response, which nobody learns, left out."""
    if not isinstance(value, list | tuple) or not value:
        raise UserError(
            f"{where}: {column!r} holds no list of messages, each with role and content."
        )
    found = []
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: message {number} lacks a role or content that is text.")
        if role not in _ROLES:
            raise UserError(
                f"{where}: the role of message {number} is none of {', '.join(_ROLES)}."
            )
        if not content.strip():
            what = "an empty response" if role == "assistant" else "no content"
            raise UserError(f"{where}: message {number} has {what}.")
        found.append((role, content))
    last = max((i for i, (role, _) in enumerate(found) if role == "assistant"), default=0)
    if last == 0:
        raise UserError(f"{where}: there is no response (a message of the assistant's).")
    return tuple(found[: last + 1])


def groups(examples: Examples) -> np.ndarray:
    """The group of each row: where it is from, or else how long it is.

    Args:
        examples: as :func:`read_dialogues` gives them.

    Returns:
        int64 (rows,): the number of the row's source; where all are from one, that of its tenth
        when rows are sorted by their characters.
    """
    if len(np.unique(examples.labels)) > 1 or not len(examples):
        return examples.labels
    return length_groups(examples)


def length_groups(examples: Examples) -> np.ndarray:
    """The tenth that each row falls into when rows are sorted by their length.

    Args:
        examples: as :func:`read_dialogues` gives them.

    Returns:
        int64 (rows,), 0 for the shortest; of rows as long as one another the first come first.
    """
    size = np.array([sum(map(len, texts_of(row))) for row in examples.inputs], np.int64)
    rank = np.empty(len(size), np.int64)
    rank[np.argsort(size, kind="stable")] = np.arange(len(size))
    return rank * min(_BINS, len(size)) // max(len(size), 1)
