"""Fabricated rows with the columns that a run's configuration names; they mean nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedpft_core.data.rows import Columns
from fedpft_core.disk import whole

_WORDS = (
    "the a of in and to is was it some many few small large old new red green blue cat dog horse "
    "bird tree house river hill road town one two three four five six seven eight nine ten sees "
    "finds takes gives asks says opens closes ### Instruction : Response"
)
WORDS = tuple(_WORDS.split())
"""Every word that fabricated texts are made of."""

_SOURCES = 7  # values of the column that says where a row is from
_SIDE = 24  # pixels of a fabricated image


def write(
    folder: Path, kind: str, columns: Columns, labels: tuple[str, ...], rows: dict[str, int]
) -> dict[str, Path]:
    """Write a file for each split.

    Args:
        folder: is made.
        kind: the kind of task, a name of `fedpft_core.task.KINDS`.
        columns: names of the columns.
        labels: label names; empty for two that mean nothing.
        rows: how many rows each split has, by its name.

    Returns:
        The files by split: Parquet for images, JSON lines for texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, (split, count) in enumerate(rows.items()):
        rng = np.random.default_rng([number, count])
        made = [_row(kind, columns, labels or ("a", "b"), i, rng) for i in range(count)]
        found[split] = _save(folder / split, made, bool(columns.image))
    return found


def write_public(folder: Path, image: str, text: str, rows: int) -> Path:
    """Write a public corpus.

    Args:
        folder: where; it is there already.
        image: column with the images; "" for texts.
        text: column with the texts.
        rows: how many.

    Returns:
        The file.
    """
    rng = np.random.default_rng(rows)
    made = [{image: _image(rng)} if image else {text: _text(rng)} for _ in range(rows)]
    return _save(folder / "public", made, bool(image))


def _save(path: Path, rows: list[dict[str, Any]], images: bool) -> Path:
    if images:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = path.with_suffix(".parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    path = path.with_suffix(".jsonl")
    whole.write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def _row(
    kind: str, columns: Columns, labels: tuple[str, ...], i: int, rng: np.random.Generator
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if columns.source:
        row[columns.source] = f"source {i % _SOURCES}"
    if kind == "generate":
        return row | _free_text(columns, rng)
    if columns.image:
        row[columns.image] = _image(rng)
    if kind == "text-to-image" or not columns.image:
        row[columns.text] = _text(rng).split() if kind == "tokens" else _text(rng)
    if columns.text_pair and not columns.image:
        row[columns.text_pair] = _text(rng)
    if kind != "text-to-image":
        words = len(row.get(columns.text, ()))
        row[columns.label] = _label(kind, labels, i, words, rng, columns.separator)
    return row


def _label(
    kind: str,
    labels: tuple[str, ...],
    i: int,
    words: int,
    rng: np.random.Generator,
    separator: str,
) -> Any:
    if kind.endswith("regression"):
        return float(rng.uniform(1, 5))
    if kind.endswith("labels"):
        first = labels[i % len(labels)]
        return separator.join(dict.fromkeys([first, labels[int(rng.integers(len(labels)))]]))
    if kind == "tokens":
        return [labels[(i + j) % len(labels)] for j in range(words)]
    return labels[i % len(labels)]


def _free_text(columns: Columns, rng: np.random.Generator) -> dict[str, Any]:
    if columns.messages:
        said = zip(("user", "assistant"), (_text(rng), _text(rng)), strict=True)
        return {columns.messages: [{"role": role, "content": text} for role, text in said]}
    row: dict[str, Any] = {columns.text: _text(rng)}
    if columns.response:
        row[columns.response] = _text(rng)
        if columns.text_pair:
            row[columns.text_pair] = _text(rng) if rng.integers(2) else ""
    return row


def _text(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS[:-5], size=int(rng.integers(3, 9))))


def _image(rng: np.random.Generator) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    pixels = rng.integers(0, 255, (_SIDE, _SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
