"""The event log of a run: one JSON object a line, appended as things happen.

Everything that is drawn of a run and everything a report states is read from this file, so a
report can be made again from a finished, a failed or a still running run. `server_app.run.schema`
says what events there are; `server_app.run.record` folds them into one record, from which all
readers read.

Files of older and newer versions are read as well: what this version does not know is passed over,
and a field that a line lacks is blank: 0, "", empty, None, or NaN for a measured number.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from server_app.run.schema import KINDS, Event

# ---------------------------------------------------------------- accuracy, which had no name once


def accuracy(share: float, rows: int, loss: float | None = None) -> dict[str, Any]:
    """The fields of `Scored` for the share of rows labelled right, with its binomial error.

    Args:
        share: rows labelled right over all rows, in [0, 1].
        rows: rows scored.
        loss: mean loss over the rows; None where it was not measured.

    Returns:
        The fields by name, but for `more`; the error is None where there are no rows.
    """
    error = math.sqrt(max(0.0, share * (1 - share)) / rows) if rows > 0 else None
    return {"metric": "accuracy", "value": share, "error": error, "loss": loss, "rows": rows}


# The fields of `Task` that say how accuracy is shown and compared.
ACCURACY: dict[str, Any] = {"metric": "accuracy", "higher_is_better": True, "share": True}


def _modern(kind: str, line: Mapping[str, Any]) -> Mapping[str, Any]:
    """A line of a version whose only metric was accuracy, as one of today."""
    if kind == "task" and "metric" not in line:
        return {**line, **ACCURACY}
    if "accuracy" in line and "value" not in line:
        score = accuracy(line["accuracy"], line.get("rows") or 0, line.get("loss"))
        return {**line, **score}
    return line


# ---------------------------------------------------------------- lines


@dataclass(frozen=True)
class Entry:
    """An event with its time (Unix seconds) and the side run it is of, "" for the main run."""

    t: float
    event: Event
    arm: str = ""


def line_of(event: Event) -> dict[str, Any]:
    """The event's name and fields, as its line has them.

    Args:
        event: any event.

    Returns:
        Values by field, with the name as `event`. Fields that have their default are left out.
    """
    out: dict[str, Any] = {"event": event.event}
    for f in fields(event):
        value = getattr(event, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if default is MISSING or value != default:
            out[f.name] = value
    return out


def event_of(line: Mapping[str, Any]) -> Event | None:
    """The event a line tells of.

    Args:
        line: a line of a log, which may be of an older or newer version.

    Returns:
        The event, blank in the fields that the line lacks; None when this version does not know it.
    """
    cls = KINDS.get(line.get("event", ""))
    if cls is None:
        return None
    line = _modern(cls.event, line)
    made = {}
    for name, hint, default in _fields_of(cls.event):
        if name in line:
            made[name] = _read(line[name], hint)
        elif default is MISSING:
            made[name] = _blank(hint)
    return cls(**made)


def entry_of(line: Mapping[str, Any]) -> Entry | None:
    """The event a line tells of, with its time and side run.

    Args:
        line: a line of a log, with its time `t`.

    Returns:
        The entry; None when this version does not know the event.
    """
    event = event_of(line)
    return None if event is None else Entry(float(line["t"]), event, str(line.get("arm") or ""))


@cache
def _fields_of(kind: str) -> list[tuple[str, Any, Any]]:
    """(name, type, default or MISSING) of each field of an event."""
    cls = KINDS[kind]
    hints = get_type_hints(cls)
    return [
        (f.name, hints[f.name], f.default if f.default_factory is MISSING else f.default_factory)
        for f in fields(cls)
    ]


def _blank(hint: Any) -> Any:
    """What stands for a value that is not there."""
    if type(None) in get_args(hint):
        return None
    return math.nan if hint is float else (get_origin(hint) or hint)()


def _read(value: Any, hint: Any) -> Any:
    """A value of JSON as one of its field's type; blank where it cannot be one."""
    if type(None) in get_args(hint):
        return None if value is None else _read(value, get_args(hint)[0])
    kind = get_origin(hint) or hint
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and value is not None:
        return str(value)
    if not isinstance(value, kind):
        return _blank(hint)
    if kind is dict and get_args(hint)[0] is int:
        return {int(k): v for k, v in value.items()}
    return value


# ---------------------------------------------------------------- the log


class EventLog:
    """Appends events to a file; each line is written whole, so a reader never sees half a line."""

    def __init__(self, path: Path | None) -> None:
        """With `path` None lines are kept in memory only (`self.seen`)."""
        self.path = path
        self.seen: list[dict[str, Any]] = []
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_tail(path)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # closed by close()

    def emit(self, event: Event, arm: str = "") -> None:
        """Append one event, with the present time.

        Args:
            event: what happened.
            arm: the side run it is of; empty for the main run.

        Raises:
            OSError: the write fails, as on a full disk.
        """
        line = {"t": round(time.time(), 3)} | line_of(event) | ({"arm": arm} if arm else {})
        if self._file is None:
            self.seen.append(line)
            return
        data = (json.dumps(_finite(line), separators=(",", ":"), allow_nan=False) + "\n").encode()
        while data:
            data = data[self._file.write(data) :]

    def tagged(self, arm: str) -> TaggedLog:
        """A view whose events are of the side run `arm`.

        Args:
            arm: name of the side run.

        Returns:
            The view, which appends to this log.
        """
        return TaggedLog(self, arm)

    def offset(self) -> int:
        """How long the log is.

        Returns:
            Bytes written so far; events, when in memory.
        """
        return self._file.seek(0, os.SEEK_END) if self._file else len(self.seen)

    def rewind(self, offset: int) -> None:
        """Forget what came after `offset`: a resumed run writes it again.

        Args:
            offset: what :meth:`offset` gave; more than there is changes nothing.
        """
        if self._file is not None:
            # A log shorter than remembered (power cut) must not be padded with zero bytes.
            end = min(offset, self.offset())
            if self.path is not None:
                # Of a damaged log the place may be in the middle of a line.
                with self.path.open("rb") as file:
                    end = file.read(end).rfind(b"\n") + 1
            self._file.truncate(end)
        else:
            del self.seen[offset:]

    def digest(self, offset: int) -> str:
        """A digest of the log so far, by which damage shows.

        Args:
            offset: how many bytes of it.

        Returns:
            sha256, 64 hex digits; of less where there is less, and empty for a log that is not in
            a file.
        """
        if self._file is None or self.path is None:
            return ""
        self._file.flush()
        with self.path.open("rb") as file:
            return hashlib.sha256(file.read(offset)).hexdigest()

    def close(self) -> None:
        """Make sure that everything is on the disk, and let go of the file."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


class TaggedLog:
    """An event log that marks whatever passes through it as of a side run."""

    def __init__(self, log: EventLog, arm: str) -> None:
        self.log, self.arm = log, arm

    def emit(self, event: Event) -> None:
        """Append one event to the log behind.

        Args:
            event: what happened in the side run.
        """
        self.log.emit(event, self.arm)


def _drop_torn_tail(path: Path) -> None:
    """Cut a half-written last line, which a killed process may have left."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the whole lines of a log; a half-written last line is left for later.

    Args:
        path: the file.
        offset: where a line begins, bytes.

    Yields:
        The offset after the line, and the line.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, json.loads(line)
