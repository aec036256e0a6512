"""The node's own record of what it was asked to do and what left it: hash-chained JSON lines.

Each line holds the sha256 of the line before, so that a line which is changed, taken out or put in
between shows. It says nothing of a row. Whoever can write the file can write it anew from the
start: keep a copy of its last hash elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from fedpft_core.errors import UserError
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import (
    Message,
    RefusalReply,
    SecureStatisticsReply,
    SecureTrainReply,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    TrainRequest,
)

_FIRST = "0" * 64
_TAIL = 2**16  # bytes in which the last line lies


def asked(message: Message) -> dict[str, Any]:
    """What a message asks for, in a few words.

    Args:
        message: as it came, opened.

    Returns:
        JSON values: its kind, and for work its run, round, sub-FM and settings.
    """
    out: dict[str, Any] = {"asked": type(message).__name__}
    if isinstance(message, TrainRequest):
        out |= {
            "run": message.run, "round": message.round, "digest": message.digest,
            "settings": dict(message.settings.__dict__), "counts": message.count_rule,
            "merging": message.merging_rule,
        }  # fmt: skip
    elif isinstance(message, StatisticsRequest):
        out |= {"round": message.round, "digest": message.digest, "width": message.width}
    return out


def left(message: Message, envelope: Envelope) -> dict[str, Any]:
    """What leaves the node with an answer.

    Args:
        message: the answer.
        envelope: the same, sealed.

    Returns:
        JSON values: its kind, its bytes by part, rows and steps it is of, or why it is refused.
    """
    out: dict[str, Any] = {"answered": type(message).__name__, "bytes": envelope.sizes()}
    if isinstance(message, TrainReply):
        out |= {"rows": message.examples, "steps": message.steps}
        out |= {"validation": sorted(message.validation_sums)}
    elif isinstance(message, SecureTrainReply):
        out |= {"steps": message.steps, "masked": True}
    elif isinstance(message, SecureStatisticsReply):
        out |= {"masked": True}
    elif isinstance(message, StatisticsReply):
        out |= {"rows": message.examples}
    elif isinstance(message, RefusalReply):
        out |= {"reason": message.reason}
    return out


def append(path: Path, entry: dict[str, Any]) -> None:
    """Put a line at the end of the record.

    Args:
        path: the record; it and its folder are made where they are not there.
        entry: JSON values. The time, a number and the hash of the line before are added.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(fd, "r+b") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
        number, before = 0, _FIRST
        if last:
            before = hashlib.sha256(last).hexdigest()
            with contextlib.suppress(ValueError, TypeError, KeyError):
                number = json.loads(last)["n"] + 1
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"n": number, "time": when} | entry | {"before": before}, sort_keys=True)
        file.seek(0, os.SEEK_END)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def verify(path: Path) -> tuple[int, str]:
    """Hold a record against its hashes.

    Args:
        path: the record.

    Returns:
        How many lines it has, and the sha256 of the last.

    Raises:
        UserError: naming the first line that is not as it was written.
        OSError: it cannot be read.
    """
    before, count = _FIRST, 0
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            good = entry["n"] == count and entry["before"] == before
        except (ValueError, TypeError, KeyError):
            good = False
        if not good:
            raise UserError(f"{path}: line {count + 1} is not as it was written.")
        before, count = hashlib.sha256(line).hexdigest(), count + 1
    return count, before
