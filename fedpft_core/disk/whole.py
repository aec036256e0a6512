"""Files and folders that appear whole or not at all, whoever reads or kills the writer meanwhile.

What is being written lies beside its place under a name that begins with `.new-`, and what is
being removed under one that begins with `.gone-`; readers look at neither. A killed process may
leave such a name behind, and `sweep` removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

STALE_SECONDS = 3600.0
"""After so long without a change, no living process is still writing."""


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Write a file under another name, which becomes `path` when the block ends well.

    Of several processes that write the same file, the last wins.

    Args:
        path: where the file appears; what was there stays until then. Its folder must exist.

    Yields:
        The name to write to, in the same folder.

    Raises:
        OSError: the file cannot be put in its place; nothing half written stays.
    """
    temporary = _beside(path, ".new-")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Args:
        path: the file, which is replaced when it is there. Its folder must exist.
        data: its content.

    Raises:
        OSError: the file cannot be written; what was there stays.
    """
    with file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def folder(path: Path, *, replace: bool, sync: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Fill a folder under another name, which becomes `path` when the block ends well.

    Args:
        path: where the folder appears. The folder it lies in must exist.
        replace: whether it takes the place of a folder that is there. Otherwise that one stays,
            which another process has put there first.
        sync: whether everything has reached the disk before the folder appears, and its name
            when the block ends.
        mode: permissions, less the umask.

    Yields:
        An empty folder beside `path`.

    Raises:
        OSError: the folder cannot be made, or reach the disk; nothing half written stays.
    """
    temporary = _beside(path, ".new-")
    temporary.mkdir(mode=mode)
    try:
        yield temporary
        if sync:
            for entry in [*temporary.rglob("*"), temporary]:
                _sync(entry)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if replace or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if sync:
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a folder if it is there, renamed first, so that no reader sees half of it.

    Args:
        path: the folder. What cannot be removed stays, under its old or its new name.
    """
    gone = _beside(path, ".gone-")
    with contextlib.suppress(OSError):
        os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(root: Path, seconds: float = STALE_SECONDS) -> None:
    """Remove from a folder what killed processes have left half written or half removed.

    Args:
        root: the folder; it must exist.
        seconds: how long nothing may have changed in what goes. Zero only where no other process
            writes.
    """
    for path in root.iterdir():
        if not path.name.startswith((".new-", ".gone-")):
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < seconds:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(6)}")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
