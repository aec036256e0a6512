"""Phases in the event log: when one starts and ends, how far it is, what memory it took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from server_app.run import schema as ev
from server_app.state import Events


@contextmanager
def phase(events: Events, name: str, **fields: Any) -> Iterator[None]:
    """Emit the start and the end of a phase with its seconds.

    A phase that ends in an exception has no end in the log.

    Args:
        events: where both events go.
        name: the phase.
        **fields: further fields of both events, as `round`.

    Yields:
        Nothing; the phase lasts as long as the block.
    """
    events.emit(ev.PhaseStarted(phase=name, **fields))
    start = time.perf_counter()
    yield
    events.emit(ev.PhaseFinished(phase=name, seconds=time.perf_counter() - start, **fields))


def progress(events: Events, name: str, unit: str, **fields: Any) -> Callable[..., None]:
    """A progress callback that emits at most five events a second.

    Args:
        events: where the events go.
        name: the phase.
        unit: what is counted: steps, rows or rounds.
        **fields: further fields of each event, as `round`.

    Returns:
        A function of what is done, what there is to do, and the loss or None. Its last call, with
        all done, is always emitted.
    """
    last = 0.0

    def report(done: int, total: int, loss: float | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 0.2 and done < total:
            return
        last = now
        more = fields if loss is None else fields | {"loss": loss}
        events.emit(ev.Progress(phase=name, done=done, total=total, unit=unit, **more))

    return report


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Returns:
        Bytes.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Waits:
    """Says from time to time what is waited for, and how long still.

    The first `silent` seconds of a wait nothing is said, and then no more often than every
    `every` seconds, so that a long wait does not fill the log.
    """

    def __init__(
        self, events: Events, what: str, silent: float = 10.0, every: float = 10.0
    ) -> None:
        self.events = events
        self.what = what
        self.every = every
        self._next = time.monotonic() + silent

    def __call__(self, done: int, total: int, seconds_left: float) -> None:
        """Say it, if it is time to.

        Args:
            done: how many are there.
            total: how many are waited for.
            seconds_left: until the wait is given up.
        """
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.every
            self.events.emit(
                ev.Waiting(what=self.what, done=done, total=total, seconds_left=seconds_left)
            )
