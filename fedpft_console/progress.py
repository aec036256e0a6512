"""Draws a run from its event file: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from server_app.run.events import read_events

Event = Mapping[str, Any]

PHASES = {
    "load": "loading",
    "baselines": "baselines",
    "build": "building the sub-FM",
    "distil": "distillation",
    "undistilled": "same federation, undistilled sub-FM",
    "round": "round",
    "align": "alignment",
    "evaluate": "evaluation",
    "export": "export",
}
MODELS = {"proxy": "sub-FM", "fm": "plugged-in FM", "fm-as-trained": "FM, head as trained"}
BASELINES = {
    "linear-probe": "linear probe on the FM",
    "tf-idf": "TF-IDF",
    "undistilled": "undistilled sub-FM, plugged in",
}
# Without a terminal a phase reports at most this often, so that logs stay short.
_PLAIN_SECONDS = 10.0


def human_bytes(count: float) -> str:
    """1234567 → `1.2 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_count(count: float) -> str:
    """22713216 → `22.7M`."""
    if abs(count) < 1000:
        return f"{count:.0f}"
    for unit in ("k", "M"):
        count /= 1000
        if abs(count) < 999.95:
            return f"{count:.1f}{unit}"
    return f"{count / 1000:.2f}G"


def human_seconds(seconds: float) -> str:
    """75.2 → `1 min 15 s`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float | None) -> str:
    """0.5713 → `57.1 %`; nothing to show is a dash."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits; anything else is a dash."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}g}"


def lines_for(event: Event, seen: Mapping[str, Any]) -> list[str]:
    """The permanent lines an event is worth, in plain text.

    `seen` carries what earlier events of the run said: `rounds`, `expected` and `got` replies.
    """
    get = event.get
    kind = event["event"]
    where = f"round {get('round')}"
    if kind == "run_started":
        resumed = f", resumed after round {get('resumed_from')}" if get("resumed_from") else ""
        return [
            f"{get('method', 'federation')}: {get('rounds')} rounds of {get('clients_per_round')} "
            f"clients, seed {get('seed')}{resumed}"
        ]
    if kind == "task":
        return [
            f"task {get('name')} ({get('kind')}): {get('train')} training, "
            f"{get('validation')} validation and {get('test')} test rows, "
            f"{len(get('labels') or [])} labels; {get('public')} public rows"
        ]
    if kind == "model":
        before, after = get("fm_parameters", 0), get("proxy_parameters", 0)
        share = f" ({100 * after / before:.0f} %)" if before else ""
        return [
            f"foundation model {human_count(before)} parameters, "
            f"{human_bytes(get('fm_bytes', 0))} -> sub-FM {human_count(after)} parameters, "
            f"{human_bytes(get('proxy_bytes', 0))}{share}"
        ]
    if kind == "nodes":
        return [f"{get('count')} clients connected"]
    if kind == "baseline":
        name = BASELINES.get(str(get("name")), str(get("name")))
        return [f"baseline {name}: accuracy {percent(get('value'))}"]
    if kind == "distilled":
        return [
            f"distilled {get('steps')} steps in {human_seconds(get('seconds', 0))}: "
            f"loss {number(get('loss_first'))} -> {number(get('loss_last'))}"
        ]
    if kind == "round_started":
        names = ", ".join(str(c) for c in get("clients") or [])
        again = f", attempt {get('attempt')}" if (get("attempt") or 1) > 1 else ""
        return [f"{where}/{get('rounds')}{again}: clients {names}"]
    if kind == "reply" and get("status") == "ok":
        return [
            f"{where}: client {get('client')} replied ({seen.get('got')}/{seen.get('expected')}), "
            f"{get('examples')} rows, loss {number(get('loss'))}, "
            f"{human_seconds(get('seconds') or 0)}"
        ]
    if kind == "reply":
        reason = f": {get('reason')}" if get("reason") else ""
        said = {"need": "asks for the sub-FM"}.get(str(get("status")), str(get("status")))
        return [f"{where}: client {get('client')} {said}{reason}"]
    if kind == "round_finished":
        left = seen.get("left")
        tail = f"; about {human_seconds(left)} left" if left else ""
        return [
            f"{where}/{seen.get('rounds', '?')} done in {human_seconds(get('seconds') or 0)}: "
            f"{get('good')} good replies, {get('bad')} bad, loss {number(get('loss'))}{tail}"
        ]
    if kind == "evaluation":
        model = MODELS.get(str(get("model")), str(get("model")))
        return [f"{where}: {model} accuracy {percent(get('value'))} ({get('split')})"]
    if kind == "client_validation":
        return [
            f"{where}: sub-FM accuracy {percent(get('value'))} on {get('rows')} rows that "
            f"{get('clients')} clients keep from training"
        ]
    if kind == "validation":
        model = MODELS.get(str(get("model")), str(get("model")))
        return [f"end: {model} accuracy {percent(get('value'))} (validation rows)"]
    if kind == "alignment":
        return [
            f"{where}: re-aligned {get('neurons')} neurons in "
            f"{human_seconds(get('seconds') or 0)}, loss {number(get('loss_before'))} -> "
            f"{number(get('loss_after'))}, sub-FM {str(get('digest_from'))[:8]} -> "
            f"{str(get('digest_to'))[:8]}"
        ]
    if kind == "agreement":
        return [
            f"{where} ({get('when')}): gradient cosine {number(get('cosine'))}, "
            f"relative difference {number(get('relative_l2'))}"
        ]
    if kind == "warning":
        return [f"warning: {get('text')}"]
    if kind == "run_finished":
        return [f"run finished in {human_seconds(get('seconds') or 0)}"]
    return []


class Follower:
    """Reads new events of a run folder and keeps what the outcome of the run depends on."""

    def __init__(self, path: Path) -> None:
        """Follow what is written from now on.

        A resumed run cuts the file back to its checkpoint before it appends, so the place where
        the new part begins shows only in the times of the events.
        """
        self.path = path
        self.offset = 0
        # Event times are rounded to milliseconds, possibly down.
        self._since = time.time() - 0.001 if path.exists() else None
        self._looked: tuple[int, int] | None = None
        self.finished = False
        self.failure = ""
        self.count = 0

    def new(self) -> list[Event]:
        """Events written since the last call."""
        if not self.path.exists() or not self._begun():
            return []
        events: list[Event] = []
        for offset, event in read_events(self.path, self.offset):
            self.offset = offset
            events.append(event)
            if event["event"] == "run_finished":
                self.finished = True
            elif event["event"] == "run_failed":
                self.failure = str(event.get("reason"))
        self.count += len(events)
        return events

    def _begun(self) -> bool:
        """Whether the new part has begun; sets `offset` to its beginning when it has."""
        if self._since is None:
            return True
        state = self.path.stat()
        looked = (state.st_size, state.st_mtime_ns)
        if looked == self._looked:
            return False
        self._looked = looked
        for offset, event in read_events(self.path):
            if event["t"] >= self._since:
                self._since = None
                return True
            self.offset = offset
        self.offset = 0
        return False


class View:
    """Shows the events of a run on a console; use as a context manager."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._seen: dict[str, Any] = {}
        self._durations: list[float] = []
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._shown: dict[str, float] = {}
        self._start = time.time()
        if console.is_terminal and not quiet:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[note]}", markup=False, style="dim"),
                console=console,
                transient=True,
                refresh_per_second=6,
            )

    def __enter__(self) -> View:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        """Say what is being waited for before events arrive."""
        if self._bars:
            self._bar("note", text, None, 0, "")
        else:
            self.line(text)

    def line(self, text: str, now: float | None = None) -> None:
        """Print one permanent line, with the seconds since the start."""
        if self.quiet:
            return
        stamp = f"{(now or time.time()) - self._start:6.1f}s  "
        printed = Text(stamp, style="dim" if self._bars else "") + Text(text)
        self.console.print(printed, soft_wrap=True)

    def show(self, event: Event) -> None:
        """Show one event."""
        kind = event["event"]
        if event.get("arm") and kind != "warning":
            return  # a side run: its phase has a bar of its own
        self._drop("note")
        if kind == "progress":
            self._progress(event)
            return
        if kind == "run_started":
            self._seen["rounds"] = event.get("rounds")
        elif kind == "round_started":
            self._seen |= {"rounds": event.get("rounds"), "got": 0}
            self._seen["expected"] = len(event.get("clients") or [])
            self._round_bars(event)
        elif kind == "reply" and event.get("status") == "ok":
            self._seen["got"] = self._seen.get("got", 0) + 1
            self._bar("replies", f"  clients of round {event.get('round')}",
                      self._seen.get("expected"), self._seen["got"],
                      f"{self._seen['got']}/{self._seen.get('expected')} replied")  # fmt: skip
        elif kind == "round_finished":
            self._drop("replies")
            self._round_finished(event)
        elif kind == "evaluation":
            self._end("evaluate")
        elif kind == "phase_started":
            name = str(event.get("phase"))
            if name != "round":
                self._bar(name, PHASES.get(name, name), None, 0, "")
        elif kind == "phase_finished":
            self._end(str(event.get("phase")))
        # On a terminal a bar shows these, and only bad replies stay on screen.
        fine = kind == "reply" and event.get("status") in ("ok", "need")
        if self._bars and (kind == "round_started" or fine):
            return
        for text in lines_for(event, self._seen):
            self.line(text, event.get("t"))

    def _progress(self, event: Event) -> None:
        phase, done = str(event.get("phase")), float(event.get("done") or 0)
        total, now = float(event.get("total") or 0), float(event["t"])
        first = self._first.setdefault(phase, (now, done))
        if done < first[1]:
            first = self._first[phase] = (now, done)
        passed = now - first[0]
        rate = (done - first[1]) / passed if passed > 0 else 0.0
        parts = [f"{done:.0f}/{total:.0f} {event.get('unit', '')}".strip()]
        if event.get("loss") is not None:
            parts.append(f"loss {number(event['loss'])}")
        if rate > 0:
            parts += [f"{rate:.1f}/s", f"{human_seconds((total - done) / rate)} left"]
        name = PHASES.get(phase, phase)
        if event.get("round") is not None and phase != "round":
            name += f" (round {event['round']})"
        note = ", ".join(parts)
        if self._bars:
            self._bar(phase, name, total, done, note)
            return
        if now - self._shown.setdefault(phase, first[0]) >= _PLAIN_SECONDS:
            self._shown[phase] = now
            self.line(f"{name}: {note}", now)

    def _round_bars(self, event: Event) -> None:
        current = int(event.get("round") or 1)
        self._bar("rounds", "rounds", event.get("rounds"), current - 1,
                  f"round {current}/{event.get('rounds')}{self._left_note()}")  # fmt: skip
        expected = self._seen["expected"]
        self._bar("replies", f"  clients of round {current}", expected, 0, f"0/{expected} replied")

    def _round_finished(self, event: Event) -> None:
        self._durations.append(float(event["t"]))
        done, rounds = int(event.get("round") or 0), int(self._seen.get("rounds") or 0)
        self._seen["left"] = None
        if len(self._durations) > 1:
            # From one round's end to the next, so that evaluation and alignment are included.
            spans = [b - a for a, b in zip(self._durations, self._durations[1:], strict=False)]
            self._seen["left"] = max(0, rounds - done) * sum(spans) / len(spans)
        else:
            self._seen["left"] = max(0, rounds - done) * float(event.get("seconds") or 0)
        note = f"{done}/{rounds}{self._left_note()}"
        self._bar("rounds", "rounds", rounds, done, note)

    def _left_note(self) -> str:
        left = self._seen.get("left")
        return f", about {human_seconds(left)} left" if left else ""

    def _bar(self, key: str, text: str, total: Any, done: float, note: str) -> None:
        if self._bars is None:
            return
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(text, total=total, note=note)
        self._bars.update(
            self._tasks[key], description=text, total=total, completed=done, note=note
        )

    def _end(self, phase: str) -> None:
        """A phase is over: its next occurrence starts anew."""
        self._drop(phase)
        self._first.pop(phase, None)
        self._shown.pop(phase, None)

    def _drop(self, key: str) -> None:
        if self._bars and key in self._tasks:
            self._bars.remove_task(self._tasks.pop(key))


__all__ = [
    "Event", "Follower", "View", "human_bytes", "human_count", "human_seconds", "lines_for",
    "number", "percent",
]  # fmt: skip
