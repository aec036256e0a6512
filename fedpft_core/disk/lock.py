"""A lock that ends with the process, so that two commands never write the same folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fedpft_core.errors import UserError


@contextlib.contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path`. Raises UserError(refusal) while another process holds it."""
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
