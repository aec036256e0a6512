"""Replies that outlive the server process: what has arrived need not be asked for again.

The folder has `values.bin`, a slot of float32 values for each reply, and `index.jsonl`, a line for
each reply that lies there whole, after a first line that says what all of them are replies to. A
slot counts only once its line is written, with the sha256 of its values: a server that is killed in
between asks that client again and writes over the slot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from fedpft_core.aggregation import Replies, RuleSettings
from fedpft_core.wire import codec
from server_app.rounds.outcome import Good

_INDEX, _VALUES = "index.jsonl", "values.bin"


class KeptReplies(Replies):
    """The replies of one round in a folder, from which another process can go on.

    Args:
        like: what the clients were sent.
        folder: where the replies lie; it is made if need be. Replies in it to anything else than
            `like` and `of` are removed.
        settings: what a rule may know besides.
        of: names what the replies were trained on: the run and the sub-FM.
        beside: shapes of the merging figures that come with each adapter.

    Raises:
        OSError: when the folder cannot be read or written.
    """

    def __init__(
        self, like: Mapping[str, Tensor], folder: Path, settings: RuleSettings, of: str,
        beside: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:  # fmt: skip
        packed = codec.pack({name: like[name] for name in sorted(like)})
        self._of = {"of": of, "start": hashlib.sha256(packed).hexdigest()}
        self.folder = folder
        self.good: dict[str, Good] = {}
        """Figures of the replies that lie here whole, by client, in the order of arrival."""
        super().__init__(like, folder, settings, beside)
        self._load()

    def _open(self, folder: Path | None) -> IO[bytes]:
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _VALUES).touch()
        return open(folder / _VALUES, "r+b")  # closed with the replies

    def _load(self) -> None:
        """Take in what another process has left, as far as it is whole."""
        lines = _lines(self.folder)
        if not lines or lines[0] != self._of:
            self._file.truncate(0)
            (self.folder / _INDEX).unlink(missing_ok=True)
            self._append(self._of)
            return
        for line in lines[1:]:
            slot, name = line["slot"], line["client"]
            # Written over after a fault on the disk, which only a later process can do.
            if self._digest(slot) == line["sha256"]:
                self._slots[name] = slot, line["figures"]["examples"]
                if line.get("trained"):
                    self.partly[name] = frozenset(line["trained"])
                self.good[name] = Good(**line["figures"])
            self._used = max(self._used, slot + 1)

    def commit(self, name: str, figures: Good, events_offset: int) -> None:
        """Note that a reply lies here whole; from now on it is never asked for again.

        Args:
            name: whose reply it is; it was added before.
            figures: the reply's, without its tensors.
            events_offset: length of the event log with this reply's event, bytes.

        Raises:
            KeyError: the reply was not added.
            OSError: the disk is full.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        slot, _ = self._slots[name]
        self._append({
            "client": name, "slot": slot, "sha256": self._digest(slot),
            "figures": asdict(figures), "events_offset": events_offset,
            **({"trained": sorted(self.partly[name])} if name in self.partly else {}),
        })  # fmt: skip
        self.good[name] = figures

    def remove(self) -> None:
        """Remove the folder, once what the replies come to is kept elsewhere."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self.folder / _INDEX, "ab") as file:
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _digest(self, slot: int) -> str:
        with contextlib.suppress(OSError):
            values = self._read(slot * self._stride, self._stride).numpy()
            return hashlib.sha256(values.view(np.uint8).data).hexdigest()
        return ""


def events_offset(folder: Path, run: str) -> tuple[int, int]:
    """How many replies of a run lie in a folder, and how far its event log tells of them.

    Args:
        folder: where a server may have kept replies.
        run: the run's name.

    Returns:
        The number of replies, and the length of the log with the last one's event in bytes; 0 and
        0 where there are none.
    """
    lines = _lines(folder)
    if not lines or not str(lines[0].get("of")).startswith(f"{run} "):
        return 0, 0
    return len(lines) - 1, max((line["events_offset"] for line in lines[1:]), default=0)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the index; a half-written last one is cut off."""
    path = folder / _INDEX
    if not path.is_file():
        return []
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        path.write_bytes(data)
    return [json.loads(line) for line in data.splitlines()]
