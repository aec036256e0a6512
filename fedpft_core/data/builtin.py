"""The embedded data: real prose from packages that are installed as dependencies anyway.

``builtin:docstrings`` asks "what does this sentence document?": a class, a function, a module or a
property. The sentence is the first of a docstring of eight libraries. ``builtin:public`` is
unlabelled prose from elsewhere: the standard library's docstrings and the long descriptions
(READMEs) of the other installed dependencies.

Nothing is imported to read it: packages are located by ``importlib.util.find_spec`` and their
sources parsed. Files are visited in the order of a digest of their path until there are enough
rows, so the same package versions give the same rows on every machine. The result is cached as a
Parquet file named by a digest of those versions and of the recipe.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
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

RECIPE = 8
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
"""Where the sentences come from: the names packages are imported under."""

KINDS: tuple[str, ...] = ("class", "function", "module", "property")
"""The classes, in class order. A method is a function here: their sentences read alike."""

ROWS_PER_CLASS: dict[str, int] = {"train": 100, "validation": 100, "test": 250}
"""How many rows each class has in each split."""

MIN_ROW_WORDS = prose.MIN_WORDS
"""Shortest row, in words."""

MAX_ROW_WORDS = 18
"""Longest row, in words: short rows keep the main job within minutes on two cores."""

ROWS_PER_FILE = 4
"""No source file gives more rows of a class than this, so that a split is not the style of a few
files."""

_LANGUAGE_REFERENCE = "pydoc_data/topics.py"
"""The standard library's copy of the language reference, as a dictionary of strings."""

_PUBLIC_MAX_WORDS = 120
"""Longest public paragraph, in words; longer ones are cut at sentence ends."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DocstringRows:
    """The rows of ``builtin:docstrings``; position i of each field belongs to row i."""

    text: tuple[str, ...]
    """The first sentence of a docstring, MIN_ROW_WORDS to MAX_ROW_WORDS words."""
    label: tuple[str, ...]
    """One of KINDS: what the docstring belongs to."""
    split: tuple[str, ...]
    """"train", "validation" or "test"."""
    source: tuple[str, ...]
    """The source file it came from, e.g. "numpy/lib/_iotools.py"."""


def default_cache_dir() -> Path:
    """``$FEDPFT_CACHE`` if set, else ``~/.cache/fedpft``.

    Returns:
        The folder, which need not exist yet.
    """
    named = os.environ.get("FEDPFT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fedpft"


def docstring_rows(cache_dir: Path | None = None) -> DocstringRows:
    """All rows of ``builtin:docstrings``, built on first use and cached.

    Balanced over KINDS within each split, no two rows with the same :func:`prose.key`, and no
    source file in more than one split.

    Args:
        cache_dir: folder of the cache; None for :func:`default_cache_dir`.

    Returns:
        The rows, split by split and within each kind by kind.

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

    None contains a sentence of ``builtin:docstrings``.

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
    # A margin, because a sentence that documents two kinds of things is dropped from both.
    wanted = {
        (kind, split): rows + rows // 10 for kind in KINDS for split, rows in ROWS_PER_CLASS.items()
    }
    found: dict[tuple[str, str], list[tuple[str, str, str]]] = {place: [] for place in wanted}
    kinds: dict[str, set[str]] = {}
    for source, path in _files():
        split = _split_of(source)
        open_kinds = {k for k in KINDS if len(found[k, split]) < wanted[k, split]}
        if not open_kinds:
            continue
        for kind, rows in _rows_of_file(read(path), open_kinds).items():
            for row_key, text in rows:
                known = kinds.setdefault(row_key, set())
                if not known:
                    found[kind, split].append((row_key, text, source))
                known.add(kind)
        if all(len(found[place]) >= wanted[place] for place in wanted):
            break
    kept = {
        place: [(text, source) for row_key, text, source in rows if len(kinds[row_key]) == 1]
        for place, rows in found.items()
    }
    columns: dict[str, list[str]] = {"text": [], "label": [], "split": [], "source": []}
    for split, quota in ROWS_PER_CLASS.items():
        # Other versions of the packages may document less; balance matters more than the number.
        count = min(quota, *(len(kept[kind, split]) for kind in KINDS))
        if count < quota:
            poorest = min(KINDS, key=lambda kind: len(kept[kind, split]))
            _log.warning(
                "builtin:docstrings: %d instead of %d %s rows per class; there are no more of "
                "class %s.",
                count,
                quota,
                split,
                poorest,
            )
        if count == 0:
            raise UserError(
                "builtin:docstrings: the installed libraries have too few readable docstrings; "
                "reinstall the dependencies with their source files."
            )
        for kind in KINDS:
            for text, source in kept[kind, split][:count]:
                columns["text"].append(text)
                columns["label"].append(kind)
                columns["split"].append(split)
                columns["source"].append(source)
    return columns


def _files() -> list[tuple[str, Path]]:
    """The sources of all libraries, ("numpy/lib/_iotools.py", its path), in a mixed fixed order."""
    found = [
        (f"{name}/{relative}", root / relative)
        for name in LIBRARIES
        for root in (folder_of_module(name),)
        for relative in source_files(root)
    ]
    return sorted(found, key=lambda pair: digest_of(pair[0]))


def _split_of(source: str) -> str:
    """The split that all rows of a file are in, as a function of its name."""
    at = int(digest_of(f"the split of {source}")[:8], 16) % sum(ROWS_PER_CLASS.values())
    for split, rows in ROWS_PER_CLASS.items():
        if at < rows:
            return split
        at -= rows
    raise AssertionError


def _rows_of_file(source: str, kinds: set[str]) -> dict[str, list[tuple[str, str]]]:
    """The rows of one file that some kinds still need.

    Args:
        source: the file's text.
        kinds: those of KINDS that need rows; a file that can have none of them is not parsed.

    Returns:
        By kind pairs of a row's key and text, at most ROWS_PER_FILE.
    """
    documented: Iterable[tuple[str, str]]
    if kinds <= {"module"} or (kinds <= {"module", "property"} and "property" not in source):
        documented = [("module", prose.module_docstring(source))]
    else:
        documented = prose.documented(source)
    found: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    for kind, docstring in documented:
        if kind in kinds and (text := _first_sentence(docstring)):
            found[kind].setdefault(_template(text), text)
    return {
        kind: [(k, rows[k]) for k in sorted(rows, key=digest_of)[:ROWS_PER_FILE]]
        for kind, rows in found.items()
    }


def _first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, or nothing where that is no prose of a row's length."""
    paragraphs = prose.paragraphs(docstring)
    sentences = prose.sentences(paragraphs[0]) if paragraphs else []
    usable = sentences and prose.is_prose(sentences[0], MAX_ROW_WORDS)
    return sentences[0] if usable else ""


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
        for piece in _runs(prose.sentences(paragraph), _PUBLIC_MAX_WORDS):
            piece_key = prose.key(piece)
            if piece_key in seen:
                continue
            seen.add(piece_key)
            own = prose.sentences(piece)
            if not {prose.key(s) for s in own} & taken:
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


def _runs(sentences: Iterable[str], max_words: int) -> Iterator[str]:
    """Join successive readable sentences while they fit into ``max_words``; others end a run."""
    run: list[str] = []
    words = 0
    for sentence in sentences:
        usable = prose.is_readable(sentence, max_words)
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
