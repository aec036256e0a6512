"""Signals while a run is on: they become exceptions, and wait during the clean-up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; a BaseException so that no `except Exception` swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise Terminated, while inside.

    SIGINT is taken even where a shell has set it to be ignored (a script's background job):
    otherwise the job would outlive the script that was interrupted. SIGHUP that is ignored (nohup)
    stays so.

    Yields:
        Nothing; the handlers of before are back afterwards.

    Raises:
        KeyboardInterrupt: SIGINT arrived while inside.
        Terminated: SIGTERM or SIGHUP arrived while inside.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(signum)

    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
        wanted.append(signal.SIGHUP)
    before = {s: signal.signal(s, stop) for s in wanted}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Ignore signals while the block cleans up, which must be bounded in time.

    Yields:
        Nothing; outside the main thread, signals are left as they are.
    """
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        before = {s: signal.signal(s, signal.SIG_IGN) for s in wanted}
    except ValueError:  # not the main thread: no handler of ours is installed either
        before = {}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
