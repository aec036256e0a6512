"""Trackers: a run's figures, handed to other programs while the run goes on.

Each file here is one, and so is each entry point of the group `fedpft.trackers` of other packages.
It names a module with a function `start(folder, name, config)` that gives a :class:`Tracker`. A
tracker sees what the event log says and nothing else. One that fails is left out with a warning,
and the run goes on.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from fedpft_core.errors import UserError, first_line
from server_app.run import schema as ev
from server_app.run.events import Entry

GROUP = "fedpft.trackers"


class Tracker(Protocol):
    """What takes the figures of one run."""

    def log(self, figures: Mapping[str, float], step: int, now: float) -> None:
        """Take figures.

        Args:
            figures: by name, such as `fm/accuracy`.
            step: the round they belong to.
            now: when it was, Unix seconds.
        """

    def finish(self, state: str) -> None:
        """Write what is left and let go; nothing comes after it.

        Args:
            state: `finished`, `failed`, or `running` where the command ends before the run.
        """


def names() -> list[str]:
    """The trackers there are: those of this folder, then those of other packages.

    Returns:
        Their names; what they need may not be installed.
    """
    own = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))
    return own + sorted({p.name for p in entry_points(group=GROUP)}.difference(own))


def origin(name: str) -> str:
    """Where a tracker is from.

    Args:
        name: one of :func:`names`.

    Returns:
        `fedpft`, or name and version of the other package.
    """
    if (Path(__file__).parent / f"{name}.py").is_file():
        return "fedpft"
    (point, *_) = (p for p in entry_points(group=GROUP) if p.name == name)
    return f"{point.dist.name} {point.dist.version}" if point.dist else "?"


def fault(name: str) -> str:
    """Why a tracker cannot be used.

    Args:
        name: one of :func:`names`; it is imported.

    Returns:
        A sentence; empty where it can be used.
    """
    try:
        _module(name)
    except Exception as error:  # whatever another program's import may raise
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _module(name: str) -> Any:
    if (Path(__file__).parent / f"{name}.py").is_file():
        return importlib.import_module(f"{__name__}.{name}")
    return next(p for p in entry_points(group=GROUP) if p.name == name).load()


def start(name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Begin to track a run.

    Args:
        name: one of :func:`names`.
        folder: the run folder.
        config: every key with its value.

    Returns:
        The tracker.

    Raises:
        UserError: there is no such tracker, or it cannot be imported.
        Exception: whatever a tracker raises whose other side is down.
    """
    if name not in names():
        raise UserError(f"--tracker {name}: there is {', '.join(names())}.")
    try:
        module = _module(name)
    except ImportError as error:
        raise UserError(
            f"--tracker {name}: {first_line(error)}; pip install 'fedpft[{name}]' brings what the "
            "trackers of fedpft need."
        ) from error
    made: Tracker = module.start(folder, folder.name, config)
    return made


class Trackers:
    """The trackers of a run; use as a context manager.

    Args:
        wanted: their names.
        folder: the run folder.
        config: every key with its value.

    Raises:
        UserError: there is no such tracker, or it cannot be imported. One that is down is left out
            with a warning: it must not hold up the run.
    """

    def __init__(self, wanted: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self.running: dict[str, Tracker] = {}
        self.state = "running"
        for name in dict.fromkeys(wanted):
            try:
                self.running[name] = start(name, folder, config)
            except UserError:
                raise
            except Exception as error:
                _left_out(name, error)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._each("finish", self.state)

    def show(self, entry: Entry) -> None:
        """Hand on what an event says in figures.

        Args:
            entry: the next event of the log; those of side runs are left out.
        """
        if entry.arm:
            return
        if isinstance(entry.event, ev.RunFinished | ev.RunFailed):
            self.state = "finished" if isinstance(entry.event, ev.RunFinished) else "failed"
        found, step = figures(entry.event)
        if found:
            self._each("log", found, step, entry.t)

    def _each(self, what: str, *args: Any) -> None:
        for name, tracker in list(self.running.items()):
            try:
                getattr(tracker, what)(*args)
            except Exception as error:  # a tracker that is down must not end the run
                del self.running[name]
                _left_out(name, error)


def _left_out(name: str, error: Exception) -> None:
    said = f"fedpft: warning: tracker {name} is left out from here on: {first_line(error)}"
    print(said, file=sys.stderr)


def figures(event: ev.Event) -> tuple[dict[str, float], int]:
    """What an event says in figures.

    Args:
        event: any event.

    Returns:
        Values by name, and the round they belong to; no values where there is nothing to track.
    """
    match event:
        case ev.Evaluation():
            found = {f"{event.model}/{event.metric}": event.value}
            found |= {f"{event.model}/{name}": value for name, value in event.more.items()}
            if event.loss is not None:
                found[f"{event.model}/loss"] = event.loss
            return found, event.round
        case ev.Baseline():
            return {f"reference/{event.name}/{event.metric}": event.value}, 0
        case ev.RoundFinished():
            return {
                "train/loss": event.loss, "train/examples": event.examples,
                "round/seconds": event.seconds, "round/exchange seconds": event.exchange_seconds,
                "round/good replies": event.good, "round/bad replies": event.bad,
            }, event.round  # fmt: skip
        case ev.Alignment():
            return {
                "align/loss before": event.loss_before, "align/loss after": event.loss_after,
                "align/neurons": event.neurons,
            }, event.round  # fmt: skip
        case ev.Agreement(cosine=float()):
            return {f"agreement/cosine {event.when}": float(event.cosine or 0.0)}, event.round
        case ev.Adapter():
            return {"adapter/norm": event.norm}, event.round
        case ev.Memory():
            return {f"memory/{event.process} bytes": event.peak_rss_bytes}, 0
    return {}, 0
