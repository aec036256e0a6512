"""Locks that end with the process, so that no two processes write the same folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fedpft_core.errors import UserError

PATIENCE_SECONDS = 10.0
"""How long a server whose command was killed may take to end."""
# A command starts the server of its run, so a run folder has a lock for each of them.
_RUN_LOCKS = {"command": ".lock", "server": "lock"}


@contextlib.contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file.

    Args:
        path: the lock file; its folder must exist.
        refusal: the sentence of the error.

    Yields:
        Nothing. The lock is held during the block; systems without `fcntl` have none.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(refusal) from None
        yield


@contextlib.contextmanager
def run_folder(folder: Path, by: Literal["command", "server"], refusal: str) -> Iterator[None]:
    """Hold a run folder: one command and one server may have it at a time.

    A server that a command starts finds the folder held by that command, and may begin. A
    command finds out a server that is at work in the folder, whoever has started it.

    Args:
        folder: the run folder, which must exist.
        by: who takes it.
        refusal: the sentence of the error.

    Yields:
        Nothing. The folder is held during the block.

    Raises:
        UserError: another process of that kind holds the folder, or `by` is "command" and a
            server is still at work there after `PATIENCE_SECONDS`.
        OSError: the folder cannot be written.
    """
    with held(folder / _RUN_LOCKS[by], refusal):
        if by == "command":
            _wait_for(folder / _RUN_LOCKS["server"], refusal)
        yield


def _wait_for(path: Path, refusal: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while path.exists():
        try:
            with held(path, refusal):
                return
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)
