"""The public corpus: unlabelled rows the server distils on, disjoint from the task."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from fedpft_core.data import captioned, files, prose
from fedpft_core.data.examples import Captioned, Examples, texts_of
from fedpft_core.data.folders import images, is_folder
from fedpft_core.data.rows import image_bytes
from fedpft_core.errors import UserError

BUILTIN_PUBLIC = "builtin:public"
"""Name of the embedded corpus; see :func:`fedpft_core.data.builtin.public_paragraphs`."""

_KEY = "data.public"

_Row = TypeVar("_Row", str, bytes, Captioned)


def load_public(
    spec: str,
    column: str,
    kind: str,
    avoid: Iterable[Examples],
    max_rows: int,
    seed: int,
    cache_dir: Path | None = None,
    prompt_column: str = "",
) -> list[str] | list[bytes] | list[Captioned]:
    """Load the public corpus without any row of the task.

    Args:
        spec: ``data.public``: "builtin:public" (texts only), a .csv, .tsv, .json, .jsonl or
            .parquet file, a .txt file with one text per line, or a folder of images.
        column: column with the text or image; unused for built-in data and .txt.
        kind: what the task reads; "image" gives encoded images, "captioned image" such with their
            prompts, "text" gives texts.
        avoid: the task's splits. A text is dropped if its :func:`prose.key` is that of one of
            their texts (either one of a pair), an image if its bytes are.
        max_rows: a seeded subset is taken if there are more rows; 0 for all.
        seed: run seed, for the subset.
        cache_dir: where built-in data is cached; None for the default folder.
        prompt_column: column with the prompts of images.

    Returns:
        Texts or encoded images in source order, empty ones and repetitions left out.

    Raises:
        UserError: anything wrong with the file, or no rows left; names ``data.public``.
    """
    if not spec:
        raise UserError(f"{_KEY} is empty; name a file or {BUILTIN_PUBLIC!r}.")
    if max_rows < 0:
        raise UserError(f"data.max-public-rows is {max_rows}; it must be 0 (all rows) or more.")
    taken = {
        _fingerprint(part) for split in avoid for row in split.inputs for part in texts_of(row)
    }
    if kind == "captioned image":
        rows = captioned.read(spec, column, prompt_column, _KEY)
        return _choose(rows, taken, max_rows, seed, spec)
    if kind == "image":
        return _choose(_images(spec, column), taken, max_rows, seed, spec)
    return _choose(_texts(spec, column, cache_dir), taken, max_rows, seed, spec)


def _texts(spec: str, column: str, cache_dir: Path | None) -> list[str]:
    if spec == BUILTIN_PUBLIC:
        from fedpft_core.data import builtin

        return list(builtin.public_paragraphs(cache_dir))
    if spec.startswith("builtin:"):
        raise UserError(f"{_KEY} is {spec!r}; the only built-in corpus is {BUILTIN_PUBLIC!r}.")
    if Path(spec).suffix.lower() == ".txt":
        # Only line feeds end a line: splitlines() would also cut at form feeds and the like.
        return [line.strip() for line in files.read_text(spec, _KEY).split("\n")]
    values = files.read_columns(spec, [column], _KEY)[column]
    for row, value in enumerate(values, start=1):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{_KEY}: {spec}: row {row} holds {type(value).__name__} instead of text in "
                f"column {column!r}."
            )
    return [value.strip() for value in values if value is not None]


def _images(spec: str, column: str) -> list[bytes]:
    if spec.startswith("builtin:"):
        raise UserError(
            f"{_KEY} is {spec!r}, which is text, but the task has images; name a file with images."
        )
    if is_folder(spec):
        return [
            image_bytes(str(path.resolve()), Path(spec), f"{_KEY}: {path.name}")
            for path in images(Path(spec))
        ]
    values = files.read_columns(spec, [column], _KEY)[column]
    folder = Path(spec).parent
    return [
        image_bytes(value, folder, f"{_KEY}: {spec}: row {row}")
        for row, value in enumerate(values, start=1)
    ]


def _choose(
    rows: list[_Row], taken: set[str | bytes], max_rows: int, seed: int, spec: str
) -> list[_Row]:
    seen = set(taken)
    kept: list[_Row] = []
    for row in rows:
        mark = _fingerprint(row)
        if row and mark not in seen:
            seen.add(mark)
            kept.append(row)
    if not kept:
        raise UserError(f"{_KEY}: {spec}: no rows are left that the task does not contain.")
    if 0 < max_rows < len(kept):
        rng = np.random.default_rng([zlib.crc32(b"data: public rows"), seed])
        chosen = np.sort(rng.choice(len(kept), size=max_rows, replace=False))
        kept = [kept[i] for i in chosen]
    return kept


def _fingerprint(row: str | bytes | Captioned) -> str | bytes:
    if isinstance(row, Captioned):
        row = row.image
    return hashlib.sha256(row).digest() if isinstance(row, bytes) else prose.key(row)
