"""Whether a machine has the disk and the memory that a message needs."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from pathlib import Path

from client_app.memory import available_memory
from fedpft_core.errors import UserError
from fedpft_core.model.families import Shape

# What a node's process takes before it holds a model: Python, torch, transformers, Flower.
BASE_BYTES = 450_000_000
# Sub-FMs that may lie in a node's store while one more is being written.
STORED = 4


def folder(path: Path, needed: int) -> str:
    """Whether a folder can be made and written to and has room.

    Args:
        path: the folder, which is made.
        needed: bytes that have to be free in it; 0 where that is not known.

    Returns:
        A sentence with the bytes that are free.

    Raises:
        UserError: it cannot be made or written to, or is too full.
    """
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
    except OSError as error:
        what = "is full" if error.errno == errno.ENOSPC else "cannot be written to"
        raise UserError(f"cache-dir {path} {what} ({error.strerror or error}).") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"cache-dir {path} has {_mb(free)} free, but {STORED} sub-FMs and the encoded rows "
            f"need {_mb(needed)}."
        )
    wanted = f"; at most {_mb(needed)} are needed" if needed else ""
    return f"{path} is writable and has {_mb(free)} free{wanted}."


def memory(needed: int) -> str:
    """Whether so many bytes of memory are free now.

    Args:
        needed: bytes that a message takes.

    Returns:
        A sentence with the bytes that are free.

    Raises:
        UserError: fewer are free.
    """
    free = available_memory()
    if free < needed:
        raise UserError(f"{_mb(free)} of memory are free, but a message needs about {_mb(needed)}.")
    return f"{_mb(free)} of memory are free; a message needs about {_mb(needed)}."


def memory_needed(sub_fm_bytes: int, shape: Shape | None, batch: int, tokens: int) -> int:
    """What memory a message takes at most, roughly.

    Libraries, the sub-FM as read and as built, and one step. A step keeps about 12 values of the
    hidden width, 3 of the FFN's and 3 of each attention map for each token and block.

    Args:
        sub_fm_bytes: size of the sub-FM's weights.
        shape: the FM's sizes; None where they are not known, then no step is reckoned.
        batch: rows of a step.
        tokens: positions of a row.

    Returns:
        Bytes.
    """
    step = 0
    if shape is not None:
        token = 12 * shape.hidden + 3 * shape.ffn + 3 * shape.heads * tokens
        step = 4 * batch * tokens * token * shape.blocks
    return BASE_BYTES + 3 * sub_fm_bytes + step


def _mb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"
