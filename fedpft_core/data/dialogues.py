"""Rows of free text: prompts with their responses, conversations, and texts by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedpft_core.data import files
from fedpft_core.data.examples import Chat, Examples, Input, texts_of
from fedpft_core.data.faults import RowFault
from fedpft_core.data.rows import BUILTIN_DOCSTRINGS, Columns, text_in
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
    faults = columns.faults(key)
    found = files.read_columns(
        path, [*names, *([columns.source] if columns.source else [])], key, faults
    )

    def row(i: int) -> tuple[Input, str]:
        at = f"{where}: row {i + 1}"
        source = str(found[columns.source][i]) if columns.source else ""
        if columns.messages:
            return _chat(found[columns.messages][i], at, columns.messages), source
        if not columns.response:
            return text_in(found[columns.text][i], columns.text, at), source
        answer = found[columns.response][i]
        if answer is None or (isinstance(answer, str) and not answer.strip()):
            raise RowFault(f"{at} has no response in {columns.response!r}.", "without response")
        prompt = text_in(found[columns.text][i], columns.text, at)
        if columns.text_pair:
            prompt = _joined(prompt, found[columns.text_pair][i])
        return (prompt, text_in(answer, columns.response, at)), source

    total = len(found[names[0]])
    rows = faults.each(total, row)
    cells = [source for _, source in rows]
    inputs = tuple(one for one, _ in rows)
    if not columns.source:
        return Examples(inputs, np.zeros(len(rows), np.int64), faults.said(total))
    sources = np.unique(cells, return_inverse=True)[1].astype(np.int64)
    return Examples(inputs, sources, faults.said(total), sources)


def _joined(prompt: str, more: Any) -> str:
    """A prompt with what it is about, which may be nothing."""
    return f"{prompt}\n\n{more}" if isinstance(more, str) and more.strip() else prompt


def _chat(value: Any, where: str, column: str) -> Chat:
    """The messages in a cell; those behind the last response, which nobody learns, left out."""
    if not isinstance(value, list | tuple) or not value:
        raise RowFault(
            f"{where}: {column!r} holds no list of messages, each with role and content.",
            "without messages",
        )
    found = []
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        at = f"{where}: message {number}"
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowFault(f"{at} lacks a role or content that is text.", "with a broken message")
        if role not in _ROLES:
            raise RowFault(
                f"{where}: the role of message {number} is none of {', '.join(_ROLES)}.",
                "with an unknown role",
            )
        if not content.strip():
            what = "an empty response" if role == "assistant" else "no content"
            raise RowFault(f"{at} has {what}.", "with an empty message")
        found.append((role, content))
    last = max((i for i, (role, _) in enumerate(found) if role == "assistant"), default=0)
    if last == 0:
        raise RowFault(
            f"{where}: there is no response (a message of the assistant's).", "without response"
        )
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
