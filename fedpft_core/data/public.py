"""The public corpus: unlabelled rows the server distils on, disjoint from the task."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from fedpft_core.data import captioned, files, prose
from fedpft_core.data.examples import Captioned, Examples, texts_of
from fedpft_core.data.faults import Faults, RowFault
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
    max_bad: float = 0.0,
    say: Callable[[str], None] | None = None,
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
        max_bad: rows that may be left out because they cannot be used: a share below 1, or a
            number.
        say: told how many were; None for nobody.

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
    faults = Faults(max_bad)

    def chosen(rows: list[_Row]) -> list[_Row]:
        if say and faults.bad:
            left_out = faults.said(len(rows) + len(faults.bad))
            say(f"{_KEY}: {left_out} (data.max-bad-rows = {max_bad:g})")
        return _choose(rows, taken, max_rows, seed, spec)

    if kind == "captioned image":
        return chosen(captioned.read(spec, column, prompt_column, _KEY, faults))
    if kind == "image":
        return chosen(_images(spec, column, faults))
    return chosen(_texts(spec, column, cache_dir, faults))


def _texts(spec: str, column: str, cache_dir: Path | None, faults: Faults) -> list[str]:
    if spec == BUILTIN_PUBLIC:
        from fedpft_core.data import builtin

        return list(builtin.public_paragraphs(cache_dir))
    if spec.startswith("builtin:"):
        raise UserError(f"{_KEY} is {spec!r}; the only built-in corpus is {BUILTIN_PUBLIC!r}.")
    if Path(spec).suffix.lower() == ".txt":
        # Only line feeds end a line: splitlines() would also cut at form feeds and the like.
        return [line.strip() for line in files.read_text(spec, _KEY).split("\n")]
    values = files.read_columns(spec, [column], _KEY, faults)[column]

    def row(i: int) -> str:
        value = values[i]
        if value is not None and not isinstance(value, str):
            raise RowFault(
                f"{_KEY}: {spec}: row {i + 1} holds {type(value).__name__} instead of text in "
                f"column {column!r}.",
                "with no text but another type",
            )
        return value.strip() if value is not None else ""

    return faults.each(len(values), row)


def _images(spec: str, column: str, faults: Faults) -> list[bytes]:
    if spec.startswith("builtin:"):
        raise UserError(
            f"{_KEY} is {spec!r}, which is text, but the task has images; name a file with images."
        )
    if is_folder(spec):
        paths = images(Path(spec))
        return faults.each(
            len(paths),
            lambda i: image_bytes(str(paths[i].resolve()), Path(spec), f"{_KEY}: {paths[i].name}"),
        )
    values = files.read_columns(spec, [column], _KEY, faults)[column]
    folder = Path(spec).parent
    return faults.each(
        len(values),
        lambda i: image_bytes(values[i], folder, f"{_KEY}: {spec}: row {i + 1}"),
    )


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
