"""The event log of a run: one JSON object a line, appended as things happen.

Everything the CLI draws and everything a report states is read from this file, so a report
can be made again from a finished, a failed or a still running run.

Every line has `t` (Unix seconds) and `event`. Events of a side run carry `arm` (the federation
on the undistilled sub-FM has `arm = "undistilled"`) and are no part of the main run's figures.
The other fields by event:

run_started      run_dir, version, seed, method, rounds, clients_per_round, resumed_from (round)
phase_started    phase (load | build | baselines | undistilled | distil | round | align | local |
                 export),
                 round (round and align only)
phase_finished   phase, seconds, round (as above)
progress         phase, done, total, unit, and any of loss, round, model
model            name, fm_parameters, fm_bytes, proxy_parameters, proxy_bytes,
                 fm_block_parameters, proxy_block_parameters, step_flops: {fm, proxy: [a, b]}
                 (a + b·L FLOPs per token of a training step at length L), image_tokens,
                 blocks: [{block, kind, neurons, fm_neurons}]
task             name, kind, train, validation, test (rows), labels (names), public (rows)
nodes            count, names
baseline         name (linear-probe | tf-idf | undistilled), accuracy, rows, split
distilled        steps, seconds, loss_first, loss_last, error_before, output_error: {block: error},
                 cached (true: found in run.proxy-cache, with the seconds it took then)
round_started    round, rounds, attempt, clients (names), lr
reply            round, client, status (ok | refused | error | need), seconds, reason, and when
                 ok: examples, loss, steps, train_seconds, timings: {part: seconds}, and of a
                 client with a validation-share: validation_rows, validation_correct
round_finished   round, seconds, exchange_seconds, train_seconds, evaluate_seconds,
                 overhead_seconds (neither training, averaging nor evaluation), loss, examples,
                 good, bad
evaluation       round, model (proxy | fm | fm-as-trained: its head not refitted, where fm's is),
                 split, accuracy, loss, rows, seconds
refit            round, source (plug.refit), error_before, error_after (features of the FM against
                 the sub-FM's, over their variance), right_before, right_after (validation rows
                 labelled right, with plug.refit = better), taken (true or false), seconds
client_validation round (rounds behind the adapter measured: that of round r is measured while
                 round r + 1 trains), accuracy, correct, rows, clients: summed over clients
                 with a validation-share, on rows they keep from training
validation       round, model (proxy | fm), accuracy, loss, rows, seconds: at the end, on the
                 server's validation rows, for choosing settings
bytes            round, client, direction (down | up), kind (package | patch | adapter | counts
                 | control), bytes
alignment        round, neurons, share, loss_before, loss_after, digest_from, digest_to,
                 seconds, blocks: [{block, error_before, error_after}], gap_before, gap_after
                 (plug-in gap of the head as trained, null in rounds that are not evaluated)
alignment_check  round, measure (align.disagreement), value, threshold, aligned (true or false):
                 with align.threshold, whether a due alignment happens
agreement        round, when (start | before-align | after-align | end), cosine, relative_l2,
                 head_cosine, head_relative_l2, blocks: [{block, cosine, relative_l2}]
adapter          round, norm
memory           process (server), peak_rss_bytes
files            paths: {name: path}
warning          text
run_finished     seconds
run_failed       reason
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to a file; each line is written whole, so a reader never sees half a line."""

    def __init__(self, path: Path | None) -> None:
        """With `path` None events are kept in memory only (`self.seen`)."""
        self.path = path
        self.seen: list[dict[str, Any]] = []
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_tail(path)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # closed by close()

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event. A write that fails (full disk) raises OSError."""
        line = {"t": round(time.time(), 3), "event": event} | fields
        if self._file is None:
            self.seen.append(line)
            return
        data = (json.dumps(_finite(line), separators=(",", ":"), allow_nan=False) + "\n").encode()
        while data:
            data = data[self._file.write(data) :]

    def tagged(self, **more: Any) -> TaggedLog:
        """A view that adds the same fields to each of its events."""
        return TaggedLog(self, more)

    def offset(self) -> int:
        """Bytes written so far (events, when in memory)."""
        return self._file.seek(0, os.SEEK_END) if self._file else len(self.seen)

    def rewind(self, offset: int) -> None:
        """Forget what came after `offset`: a resumed run writes it again."""
        if self._file is not None:
            # A log shorter than remembered (power cut) must not be padded with zero bytes.
            self._file.truncate(min(offset, self.offset()))
        else:
            del self.seen[offset:]

    def close(self) -> None:
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
    """An event log that marks whatever passes through it."""

    def __init__(self, log: EventLog, more: dict[str, Any]) -> None:
        self.log, self.more = log, more

    def emit(self, event: str, **fields: Any) -> None:
        self.log.emit(event, **self.more, **fields)


def _drop_torn_tail(path: Path) -> None:
    """Cut a half-written last line, which a killed process may have left."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the line, event) for each whole line from byte `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, json.loads(line)
