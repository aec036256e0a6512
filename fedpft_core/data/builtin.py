"""The embedded data: real prose from packages that are installed as dependencies anyway.

``builtin:docstrings`` asks "which library does this sentence document?" (eight libraries), and
``builtin:public`` is unlabelled prose from elsewhere: the standard library's docstrings and the
long descriptions (READMEs) of the other installed dependencies.

Nothing is imported to read it: packages are located by ``importlib.util.find_spec`` and their
sources parsed. Files are visited in the order of a digest of their relative path until there are
enough rows, so the same package versions give the same rows on every machine. The result is cached
as a Parquet file named by a digest of those versions and of the recipe.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fedpft_core.data import prose
from fedpft_core.data.installed import (
    digest_of,
    folder_of_module,
    read,
    readme,
    readme_packages,
    source_files,
    version_of_module,
)
from fedpft_core.disk import whole
from fedpft_core.errors import UserError

RECIPE = 3
"""Raised whenever a change here or in :mod:`prose` changes the rows: names the cache file."""

LIBRARIES: tuple[str, ...] = (
    "torch",
    "transformers",
    "ray",
    "pandas",
    "sqlalchemy",
    "flwr",
    "numpy",
    "huggingface_hub",
)
"""The classes, in class order: the names packages are imported under."""

ROWS_PER_CLASS: dict[str, int] = {"train": 500, "validation": 80, "test": 125}
"""How many rows each class has in each split."""

MIN_ROW_WORDS = 8
"""Shortest row, in words. Successive sentences of a docstring are joined while they fit into
MAX_ROW_WORDS: on single sentences a bag of words scores about 6 points less."""

MAX_ROW_WORDS = 26
"""Longest row, in words: short rows keep the main job within minutes on two cores."""

ROWS_PER_FILE = 16
"""No source file gives more rows than this, so that a split is not the style of a few files."""

MASK = "library"
"""What a library's name becomes, whichever of the eight it is."""

_NAMES = re.compile(
    r"""
    # Distinctive enough to be replaced inside identifiers too (is_torch_available, TorchTrainer).
    (?:the\s+)?hugging[\s_-]?face(?:[\s_-]?hub)? | 🤗
    | (?:lib|py)?torch | transformers | numpy | pandas | sql[\s_-]?alchemy
    | flwr | (?<![a-z])flower(?!ing) | rllib | anyscale
    # Short ones: only where no letter is next to them, or as the first hump of a camel-case word.
    | (?<![a-z])(?:the\s+)?(?:ray|hub|hf|pd|np|sa)(?![a-z])
    | (?<![a-z])(?-i:Ray|Hub|H[fF])(?-i:(?=[A-Z]))
    """,
    re.IGNORECASE | re.VERBOSE,
)

_LANGUAGE_REFERENCE = "pydoc_data/topics.py"
"""The standard library's copy of the language reference, as a dictionary of strings."""

_PUBLIC_MAX_WORDS = 120
"""Longest public paragraph, in words; longer ones are cut at sentence ends."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DocstringRows:
    """The rows of ``builtin:docstrings``; position i of each field belongs to row i."""

    text: tuple[str, ...]
    """One or a few sentences of one docstring, MIN_ROW_WORDS to MAX_ROW_WORDS words, library
    names masked."""
    label: tuple[str, ...]
    """One of LIBRARIES."""
    split: tuple[str, ...]
    """"train", "validation" or "test"."""
    source: tuple[str, ...]
    """The source file it came from, e.g. "numpy/lib/_iotools.py"."""


def mask_names(text: str) -> str:
    """Replace the eight libraries' names and usual aliases by MASK, in any letter case.

    Args:
        text: any text.

    Returns:
        The text, of which nothing else changes.
    """
    return _NAMES.sub(MASK, text)


def default_cache_dir() -> Path:
    """``$FEDPFT_CACHE`` if set, else ``~/.cache/fedpft``.

    Returns:
        The folder, which need not exist yet.
    """
    named = os.environ.get("FEDPFT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fedpft"


def docstring_rows(cache_dir: Path | None = None) -> DocstringRows:
    """All rows of ``builtin:docstrings``, built on first use and cached.

    Balanced over LIBRARIES within each split, no two rows with the same :func:`prose.key`, and no
    source file in more than one split.

    Args:
        cache_dir: folder of the cache; None for :func:`default_cache_dir`.

    Returns:
        The rows, split by split and within each library by library.

    Raises:
        UserError: one of the eight packages is not installed or has no readable sources.
    """
    versions = [f"{name}=={version_of_module(name)}" for name in LIBRARIES]
    columns = _cached(
        "docstrings", versions, ("text", "label", "split", "source"), _build_docstrings, cache_dir
    )
    return DocstringRows(*(tuple(columns[c]) for c in ("text", "label", "split", "source")))


def public_paragraphs(cache_dir: Path | None = None) -> tuple[str, ...]:
    """All paragraphs of ``builtin:public``, built on first use and cached.

    None contains a sentence of ``builtin:docstrings``, with or without its names masked.

    Args:
        cache_dir: folder of the cache; None for :func:`default_cache_dir`.

    Returns:
        The paragraphs, those of the standard library before those of READMEs.

    Raises:
        UserError: as from :func:`docstring_rows`.
    """
    versions = [
        "python==" + ".".join(map(str, sys.version_info[:3])),
        *(f"{name}=={version_of_module(name)}" for name in LIBRARIES),
        *(f"{name}=={metadata.version(name)}" for name in readme_packages(LIBRARIES)),
    ]

    def build() -> dict[str, list[str]]:
        return _build_public(set(map(prose.key, docstring_rows(cache_dir).text)))

    return tuple(_cached("public", versions, ("text",), build, cache_dir)["text"])


def _build_docstrings() -> dict[str, list[str]]:
    # A margin per class, because a sentence found in two libraries is dropped from both.
    margin = {split: rows + 20 + rows // 10 for split, rows in ROWS_PER_CLASS.items()}
    found = {name: _library_rows(name, margin) for name in LIBRARIES}
    owners = Counter(row_key for rows in found.values() for row_key in rows)
    kept: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for name, rows in found.items():
        kept[name] = {split: [] for split in ROWS_PER_CLASS}
        for row_key, (text, split, source) in rows.items():
            if owners[row_key] == 1:
                kept[name][split].append((text, source))
    columns: dict[str, list[str]] = {"text": [], "label": [], "split": [], "source": []}
    for split, quota in ROWS_PER_CLASS.items():
        # Other versions of a package may document less; balance matters more than the number.
        count = min(quota, *(len(kept[name][split]) for name in LIBRARIES))
        if count < quota:
            poorest = min(LIBRARIES, key=lambda name: len(kept[name][split]))
            _log.warning(
                "builtin:docstrings: %d instead of %d %s rows per class; %s has no more.",
                count,
                quota,
                split,
                poorest,
            )
        if count == 0:
            raise UserError(
                "builtin:docstrings: an installed library has too few readable docstrings; "
                "reinstall the dependencies with their source files."
            )
        for name in LIBRARIES:
            for text, source in kept[name][split][:count]:
                columns["text"].append(text)
                columns["label"].append(name)
                columns["split"].append(split)
                columns["source"].append(source)
    return columns


def _library_rows(name: str, quota: dict[str, int]) -> dict[str, tuple[str, str, str]]:
    """Sentences of one library until every split has its quota: key → (text, split, source)."""
    root = folder_of_module(name)
    rows: dict[str, tuple[str, str, str]] = {}
    filled = dict.fromkeys(quota, 0)
    for relative in source_files(root):
        if all(filled[split] >= quota[split] for split in quota):
            break
        source = f"{name}/{relative}"
        fresh: dict[str, str] = {}
        for raw in _texts_of_file(root / relative):
            text = mask_names(raw)
            text = text[0].upper() + text[1:]
            row_key = _template(text)
            # A name of several words becomes one: a row may have grown too short.
            if row_key not in rows and len(text.split()) >= MIN_ROW_WORDS:
                fresh.setdefault(row_key, text)
        # The whole file goes to the split that is furthest from its quota.
        split = min(quota, key=lambda s: filled[s] / quota[s])
        chosen = sorted(fresh, key=digest_of)[:ROWS_PER_FILE]
        for row_key in chosen:
            rows[row_key] = (fresh[row_key], split, source)
        filled[split] += len(chosen)
    return rows


def _template(text: str) -> str:
    """The key rows are told apart by: like :func:`prose.key`, but without capitalised names.

    "Constructs a Llama tokenizer based on …" and its forty siblings differ only in the name, and
    would otherwise stand in train and test alike.

    Returns:
        The key without those names, or with them where fewer than five words are left.
    """
    words = text.split()
    plain = [words[0], *(w for w in words[1:] if w.lower() == w and "_" not in w)]
    return prose.key(" ".join(plain)) if len(plain) >= 5 else prose.key(text)


def _build_public(taken: set[str]) -> dict[str, list[str]]:
    """Standard library paragraphs first, then READMEs by package name."""
    seen: set[str] = set()
    texts: list[str] = []

    def add(paragraph: str) -> None:
        for piece in _runs(prose.sentences(paragraph), prose.is_readable, _PUBLIC_MAX_WORDS):
            piece_key = prose.key(piece)
            if piece_key in seen:
                continue
            seen.add(piece_key)
            own = prose.sentences(piece)
            keys = {prose.key(s) for s in own} | {prose.key(mask_names(s)) for s in own}
            if not keys & taken:
                texts.append(piece)

    stdlib = Path(sysconfig.get_path("stdlib"))
    for relative in source_files(stdlib):
        source = read(stdlib / relative)
        texts_of_file = (
            prose.string_values(source)
            if relative == _LANGUAGE_REFERENCE
            else prose.docstrings(source)
        )
        for text in texts_of_file:
            for paragraph in prose.paragraphs(text, indented=True):
                add(paragraph)
    for name in readme_packages(LIBRARIES):
        for paragraph in prose.paragraphs(readme(name), indented=True):
            add(paragraph)
    return {"text": texts}


def _texts_of_file(path: Path) -> Iterator[str]:
    for docstring in prose.docstrings(read(path)):
        every = (s for p in prose.paragraphs(docstring) for s in prose.sentences(p))
        yield from _runs(every, prose.is_prose, MAX_ROW_WORDS)


def _runs(
    sentences: Iterable[str], accept: Callable[[str, int], bool], max_words: int
) -> Iterator[str]:
    """Join successive accepted sentences while they fit into ``max_words``; others end a run."""
    run: list[str] = []
    words = 0
    for sentence in sentences:
        usable = accept(sentence, max_words)
        count = len(sentence.split())
        if run and (not usable or words + count > max_words):
            yield " ".join(run)
            run, words = [], 0
        if usable:
            run.append(sentence)
            words += count
    if run:
        yield " ".join(run)


def _cached(
    name: str,
    versions: Iterable[str],
    columns: Sequence[str],
    build: Callable[[], dict[str, list[str]]],
    cache_dir: Path | None,
) -> dict[str, list[str]]:
    """String columns from the cache file, or from ``build()``, which then fills the file.

    A file that cannot be read is built anew. Several processes may do this at once: each writes a
    file of its own and renames it, and all write the same content.

    Returns:
        One list per column, all of the same length.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = digest_of("\n".join([f"recipe=={RECIPE}", *versions]))[:16]
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    path = folder / f"{name}-{digest}.parquet"
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        cached = {column: table.column(column).to_pylist() for column in columns}
        if all(isinstance(v, str) for values in cached.values() for v in values) and cached["text"]:
            return cached
    except FileNotFoundError:
        pass
    except (pa.ArrowException, OSError, KeyError) as error:
        _log.warning("%s: unreadable cache file is built anew (%s)", path, error)

    built = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole.file(path) as temporary, open(temporary, "wb") as stream:
            pq.write_table(pa.table({c: built[c] for c in columns}), stream)
    except OSError as error:
        # Only time is lost: the next use builds the rows again.
        _log.warning("%s: built-in data is not cached (%s)", folder, error.strerror or error)
    return built
