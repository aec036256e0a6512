"""The results folder of an experiment: finished and failed cells, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpft_core.disk.lock import held
from fedpft_core.errors import UserError

CELLS = "cells.jsonl"


class Results:
    """Rows of a folder, in file order. Reading never writes; `append` needs `writing()`."""

    def __init__(self, folder: Path) -> None:
        """Read the rows of a folder, which need not exist.

        Args:
            folder: the results folder.

        Raises:
            UserError: the file cannot be read, or is damaged before its last line, which is named.
        """
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._tail = b""
        self._read()

    def _read(self) -> None:
        path = self.folder / CELLS
        self.rows = []
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
        # What follows the last newline is a line that a killed process was writing.
        *lines, self._tail = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            row = _parsed(line)
            if row is None:
                raise UserError(f"{path}: line {number} is damaged; remove it to go on.")
            self.rows.append(row)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder, read it again and mend its last line.

        Yields:
            Nothing; `append` and `merge` may be called inside.

        Raises:
            UserError: another process holds the folder, or it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with self._told():
                self.folder.mkdir(parents=True, exist_ok=True)
                refusal = (
                    f"another `fedpft compare` is writing to {self.folder}; give this one a "
                    "folder of its own (--results) and put them together later (--merge)."
                )
                stack.enter_context(held(self.folder / ".lock", refusal))
                self._read()  # the other may have written since
                if self._tail:
                    self._cut_tail()
            yield

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on disk when this returns.

        Args:
            row: a result that JSON can hold, with at least `config`.

        Raises:
            UserError: it cannot be written.
        """
        data = (json.dumps(row) + "\n").encode()
        with self._told(), open(self.folder / CELLS, "ab", buffering=0) as file:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        self.rows.append(row)

    def _cut_tail(self) -> None:
        with open(self.folder / CELLS, "r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) - len(self._tail))
        self._tail = b""

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{self.folder}: cannot be written ({reason}).") from error

    def merge(self, other: Results) -> int:
        """Take over finished cells of another folder that are not here.

        Args:
            other: the other folder; its failed cells are left behind.

        Returns:
            How many cells were taken over.

        Raises:
            UserError: a row cannot be written.
        """
        here = [r["config"] for r in self.rows if "failed" not in r]
        new = [r for r in other.rows if "failed" not in r and r["config"] not in here]
        for row in new:
            self.append(row)
        return len(new)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("config"), dict):
        return None
    # Until metrics had names, reference points had keys of their own.
    older = {name: row.pop(name) for name in ("linear-probe", "tf-idf") if name in row}
    return {**row, "baselines": older} if older else row
