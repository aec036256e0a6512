"""Data sets of the Hugging Face Hub, and local folders of the same layout, through `datasets`.

A source is written `hub:NAME[#CONFIG][@REVISION][:SPLIT]`, where NAME is one on the hub or a
folder, and SPLIT may be a part such as `train[:90%]`. No code of a data set is ever run: `datasets`
has had no way to do so since its version 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpft_core.errors import UserError, first_line

PREFIX = "hub:"
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
_FILES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".arrow")
_SPLITS = {"data.train": "train", "data.validation": "validation", "data.test": "test"}


@dataclass(frozen=True)
class Source:
    """Where a data set is, and what of it is wanted."""

    name: str
    """A name on the hub, or a folder."""
    config: str = ""
    """Which of its configurations; "" for its only one."""
    revision: str = ""
    """A branch, tag or commit on the hub; "" for its default branch."""
    split: str = ""
    """Which split, or part of one; "" for the one that the key means."""


def is_hub(source: str | Path) -> bool:
    """Whether a source of rows is read through `datasets`.

    Args:
        source: a file, a folder, or a name.

    Returns:
        True for what begins with `hub:`, and for folders of data files, which need not.
    """
    return str(source).startswith(PREFIX) or is_data_folder(source)


def is_data_folder(source: str | Path) -> bool:
    """Whether a source is a folder of data files, or one that `save_to_disk` has made.

    Args:
        source: a file, a folder, or a name.

    Returns:
        Whether such a file lies in it, or in a folder `data` in it.
    """
    folder = Path(source)
    if not str(source) or not folder.is_dir():
        return False
    inside = [*folder.iterdir(), *(folder / "data").glob("*")]
    return any(p.is_file() and (p.suffix.lower() in _FILES or p.name in _SAVED) for p in inside)


def parse(spec: str | Path) -> Source:
    """The parts of a source's name.

    Args:
        spec: `hub:NAME[#CONFIG][@REVISION][:SPLIT]`, or a folder.

    Returns:
        The parts; a folder's name is taken as it is, whatever characters are in it.
    """
    if is_data_folder(spec):
        return Source(str(spec))
    rest = str(spec).removeprefix(PREFIX)
    rest, _, split = rest.partition(":")
    rest, _, revision = rest.partition("@")
    name, _, config = rest.partition("#")
    return Source(name, config, revision, split)


def absolute(spec: str) -> str:
    """The same source by a name that holds in any working folder.

    Args:
        spec: as `parse` takes it.

    Returns:
        The spec with an absolute path where NAME is a folder here.
    """
    found = parse(spec)
    folder = Path(found.name).expanduser()
    if not spec.startswith(PREFIX) or not folder.is_dir():
        return spec
    more = [f"#{found.config}" * bool(found.config), f"@{found.revision}" * bool(found.revision)]
    return f"{PREFIX}{folder.resolve()}{''.join(more)}{f':{found.split}' * bool(found.split)}"


def read_columns(spec: str | Path, columns: Sequence[str], key: str = "") -> dict[str, list[Any]]:
    """Read the named columns of one split.

    Args:
        spec: as `parse` takes it.
        columns: names of the columns; all must be present.
        key: configuration key that named the source; it tells the split where the source does not.

    Returns:
        One list per column, of the same length. Classes that the data set names are given by name,
        and are None where it has no label (-1); images are not decoded.

    Raises:
        UserError: there is no such data set, configuration, split or column, or it has no rows.
    """
    import datasets

    source = parse(spec)
    where = f"{key}: {spec}" if key else str(spec)
    split = source.split or _SPLITS.get(key, "train")
    folder = Path(source.name).expanduser()
    try:
        with _quiet():
            if any((folder / name).is_file() for name in _SAVED):
                found = _saved(datasets.load_from_disk(str(folder)), split)
            else:
                found = datasets.load_dataset(
                    str(folder) if folder.is_dir() else source.name,
                    source.config or None,
                    split=split,
                    revision=source.revision or None,
                )
    except Exception as error:  # a hub, a network and a dozen file formats have as many kinds
        raise UserError(
            f"{where}: the split {split!r} cannot be loaded ({first_line(error)}).",
            public="the node's data set cannot be loaded",
        ) from error
    missing = [name for name in columns if name not in found.column_names]
    if missing:
        listed = ", ".join(repr(name) for name in found.column_names)
        raise UserError(
            f"{where}: no column named {missing[0]!r}; the columns present are {listed}.",
            public="a column that the node config names is not in the node's data file",
        )
    if not len(found):
        raise UserError(f"{where}: the split {split!r} holds no rows.")
    found = found.select_columns(list(dict.fromkeys(columns)))
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    cells = found[:]
    return {name: _named(cells[name], found.features[name]) for name in columns}


def _saved(found: Any, split: str) -> Any:
    """The split of what `save_to_disk` has saved: one data set, or several by name."""
    if not hasattr(found, "keys"):
        return found
    if split not in found:
        raise ValueError(f"there are {', '.join(found)}")
    return found[split]


def _named(cells: list[Any], feature: Any) -> list[Any]:
    """Class numbers, or lists of them, as the names that the data set gives them."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return [feature.int2str(v) if v is not None and v >= 0 else None for v in cells]
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.ClassLabel):
        return [None if row is None else _named(row, inner) for row in cells]
    return cells


@contextmanager
def _quiet() -> Any:
    """No progress bars: what is read is small, or told by the run's own lines."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
