"""What has to go when only so much may stay: by use, by round, or by the order of arrival."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def least_recently_used(
    paths: Iterable[Path], keep: int, *, spare: Path, keep_bytes: float = float("inf")
) -> list[Path]:
    """Say which files or folders have to go, the most recently used staying.

    Args:
        paths: what there is. What vanishes meanwhile is passed over.
        keep: how many stay at most, `spare` among them.
        spare: the one that stays whatever the limits: it has just been written.
        keep_bytes: how large they may be together, bytes. A folder counts without its content.

    Returns:
        Those that have to go, by the time of their last use (mtime, which a reader renews).
    """
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append((path == spare, stat.st_mtime, stat.st_size, path))
    gone, total = [], 0
    for i, (spared, _, size, path) in enumerate(sorted(found, reverse=True)):
        total += size
        if not spared and (i >= keep or total > keep_bytes):
            gone.append(path)
    return gone


def rounds(folder: Path) -> dict[int, Path]:
    """The entries `round-N` of a folder by number, in order; none where there is no folder.

    Args:
        folder: where they lie. Other names in it are passed over.

    Returns:
        Paths by N, ascending.
    """
    found = folder.glob("round-*") if folder.is_dir() else ()
    numbered = {p.name.removeprefix("round-"): p for p in found}
    return dict(sorted((int(n), p) for n, p in numbered.items() if n.isdecimal()))


def superseded(folder: Path, newest: int, keep: int) -> list[Path]:
    """Say which entries `round-N` of a folder have to go once round `newest` is written.

    Args:
        folder: where they lie.
        newest: the round just written. Later ones go: they are being done again.
        keep: how many stay, counted back from `newest`; at least 1.

    Returns:
        Those that have to go.
    """
    there = rounds(folder)
    kept = [n for n in there if n <= newest][-keep:]
    return [path for n, path in there.items() if n not in kept]


def put(entries: dict[K, V], key: K, value: V, limit: int) -> None:
    """Put an entry into a dictionary; the oldest ones make room, so that `limit` stay.

    Args:
        entries: changed in place. Its order of insertion tells which entry is the oldest.
        key: of the new entry.
        value: of the new entry.
        limit: entries there may be afterwards, at least 1.
    """
    while len(entries) >= limit:
        entries.pop(next(iter(entries)))
    entries[key] = value
