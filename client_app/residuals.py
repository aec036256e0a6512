"""What a client has not yet sent in full: the remainders of its updates, by run and round."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from fedpft_core.disk import evict, whole
from fedpft_core.errors import ReplyError
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec

_HEX = frozenset("0123456789abcdef")


class Residuals:
    """What ternary updates left unsent, by run, client and round (error feedback).

    `get` for round t gives what the newest round before t left, so a round that is repeated, or
    done again after the server came back from a checkpoint, starts from the same bits. All of it
    may be lost at any time: that client's next update starts without a residual.
    """

    def __init__(self, root: Path, keep_rounds: int = 3, keep_runs: int = 4) -> None:
        self.root = root
        self.keep_rounds = keep_rounds
        self.keep_runs = keep_runs

    def _folder(self, run: str, client: str) -> Path:
        """Where one client's residuals of one run lie.

        Args:
            run: names the run, 8 to 64 hex digits; it becomes part of the path.
            client: the client's name, of which a digest becomes part of the path.

        Returns:
            The folder, which need not be there.

        Raises:
            ValueError: the run is no run identifier.
        """
        if not 8 <= len(run) <= 64 or not _HEX.issuperset(run):
            raise ValueError(f"not a run: {run[:80]!r}")
        return self.root / run / hashlib.sha256(client.encode()).hexdigest()[:32]

    def get(self, run: str, client: str, round: int) -> Tensors:
        """The residual to start a round from.

        Args:
            run: names the run, 8 to 64 hex digits.
            client: the client's name.
            round: the round that begins.

        Returns:
            float32 tensors by name; empty when there are none or they are corrupt.

        Raises:
            ValueError: the run is no run identifier.
        """
        rounds = evict.rounds(self._folder(run, client))
        before = [n for n in rounds if n < round]
        if not before:
            return {}
        # Never an older one instead of a corrupt one: that has been sent already.
        try:
            digest, _, data = rounds[max(before)].read_bytes().partition(b"\n")
            if hashlib.sha256(data).hexdigest().encode() == digest:
                return codec.unpack(data)
        except (OSError, ReplyError):
            pass
        return {}

    def put(self, run: str, client: str, round: int, tensors: Tensors) -> None:
        """Keep what a round left; forget later rounds, which are being done again.

        Args:
            run: names the run, 8 to 64 hex digits.
            client: the client's name.
            round: the round that left it.
            tensors: what was not sent, float32, by name.

        Raises:
            ValueError: the run is no run identifier.
            OSError: the disk is full.
        """
        folder = self._folder(run, client)
        folder.mkdir(parents=True, exist_ok=True)
        data = codec.pack(tensors)
        content = hashlib.sha256(data).hexdigest().encode() + b"\n" + data
        whole.write(folder / f"round-{round:06d}", content)
        for path in evict.superseded(folder, round, self.keep_rounds):
            path.unlink(missing_ok=True)
        mine = self.root / run
        with contextlib.suppress(OSError):
            os.utime(mine)
        for old in evict.least_recently_used(self.root.iterdir(), self.keep_runs, spare=mine):
            shutil.rmtree(old, ignore_errors=True)
