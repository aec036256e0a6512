"""Draws a run from its event file: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from fedpft_console.lines import lines_for, rounds_planned, seconds_left
from fedpft_console.text import PHASES, human_seconds, number
from server_app.run import schema as ev
from server_app.run.events import Entry, entry_of, read_events
from server_app.run.record import Record

# Without a terminal a phase reports at most this often, so that logs stay short.
_PLAIN_SECONDS = 10.0


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
        self.record = Record()
        self.count = 0
        self.again = False

    def restart(self) -> None:
        """Follow what is written from now on, as a new follower would."""
        self.__init__(self.path)  # type: ignore[misc]

    @property
    def finished(self) -> bool:
        """Whether the run has ended well."""
        return self.record.state == "finished"

    @property
    def failure(self) -> str:
        """Why the run has failed; empty where it has not."""
        return self.record.reason

    def new(self) -> list[Entry]:
        """Read the events written since the last call, and add them to the record.

        Returns:
            The events in order, whatever side run they are of; those of kinds that are not known
            are left out.
        """
        if not self.path.exists() or not self._begun():
            return []
        entries: list[Entry] = []
        for offset, line in read_events(self.path, self.offset):
            self.offset = offset
            self.count += 1
            entry = entry_of(line)
            if entry is not None:
                entries.append(entry)
                self.record.add(entry)
                if isinstance(entry.event, ev.RunFailed) and not entry.arm:
                    self.again = entry.event.again
        return entries

    def _begun(self) -> bool:
        """Whether the new part has begun; sets `offset` to its beginning when it has."""
        if self._since is None:
            return True
        state = self.path.stat()
        looked = (state.st_size, state.st_mtime_ns)
        if looked == self._looked:
            return False
        self._looked = looked
        for offset, line in read_events(self.path):
            if line["t"] >= self._since:
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
        self.record = Record()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._shown: dict[str, float] = {}
        self._warned: dict[str, int] = {}
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
        for text, count in self._warned.items():
            if count > 1:
                self.line(f"warning, {count} times in all: {text}")

    def note(self, text: str) -> None:
        """Say what is being waited for before events arrive.

        Args:
            text: a few words, such as `starting Flower`.
        """
        if self._bars:
            self._bar("note", text, None, 0, "")
        else:
            self.line(text)

    def line(self, text: str, now: float | None = None) -> None:
        """Print one permanent line, with the seconds since the start; nothing when quiet.

        Args:
            text: the line without its end.
            now: when it happened, in Unix seconds; None for now.
        """
        if self.quiet:
            return
        stamp = f"{(now or time.time()) - self._start:6.1f}s  "
        printed = Text(stamp, style="dim" if self._bars else "") + Text(text)
        self.console.print(printed, soft_wrap=True)

    def show(self, entry: Entry) -> None:
        """Show one event: as a bar, as lines, or not at all.

        Args:
            entry: the event with its time; of side runs only warnings are shown.
        """
        event = entry.event
        if entry.arm and not isinstance(event, ev.Warned):
            return  # a side run: its phase has a bar of its own
        self.record.add(entry)
        self._drop("note")
        if isinstance(event, ev.Waiting):
            self._waiting(event, entry.t)
            return
        self._drop("waiting")
        if isinstance(event, ev.Warned) and self._repeated(event.text):
            return
        if isinstance(event, ev.Progress):
            self._progress(event, entry.t)
            return
        self._move_bars(event)
        # On a terminal a bar shows these, and only bad replies stay on screen.
        fine = isinstance(event, ev.Reply) and event.status in ("ok", "need")
        if self._bars and (isinstance(event, ev.RoundStarted) or fine):
            return
        for text in lines_for(event, self.record):
            self.line(text, entry.t)

    def _waiting(self, event: ev.Waiting, now: float) -> None:
        left = f"{event.seconds_left:.0f} s left"
        if self._bars:
            note = f"{event.done} of {event.total}, {left}"
            self._bar("waiting", f"waiting for {event.what}", event.total, event.done, note)
        else:
            self.line(f"waiting for {event.what}, {event.done} of {event.total}, {left}", now)

    def _repeated(self, text: str) -> bool:
        """Whether this warning stands on the screen already; how often is said at the end."""
        self._warned[text] = self._warned.get(text, 0) + 1
        return self._warned[text] > 1

    def _move_bars(self, event: ev.Event) -> None:
        match event:
            case ev.RoundStarted():
                self._round(event.round - 1, event.rounds, f"round {event.round}/{event.rounds}")
                self._replies(event.round)
            case ev.Reply(status="ok"):
                self._replies(event.round)
            case ev.RoundFinished():
                self._drop("replies")
                planned = rounds_planned(self.record)
                self._round(event.round, planned, f"{event.round}/{planned}")
            case ev.Evaluation():
                self._end("evaluate")
            case ev.PhaseStarted(phase=name) if name != "round":
                self._bar(name, PHASES.get(name, name), None, 0, "")
            case ev.PhaseFinished():
                self._end(event.phase)

    def _progress(self, event: ev.Progress, now: float) -> None:
        phase, done, total = event.phase, event.done, event.total
        first = self._first.setdefault(phase, (now, done))
        if done < first[1]:
            first = self._first[phase] = (now, done)
        passed = now - first[0]
        rate = (done - first[1]) / passed if passed > 0 else 0.0
        parts = [f"{done:.0f}/{total:.0f} {event.unit}".strip()]
        if event.loss is not None:
            parts.append(f"loss {number(event.loss)}")
        if rate > 0:
            parts += [f"{rate:.1f}/s", f"{human_seconds((total - done) / rate)} left"]
        name = PHASES.get(phase, phase)
        if event.round is not None and phase != "round":
            name += f" (round {event.round})"
        note = ", ".join(parts)
        if self._bars:
            self._bar(phase, name, total, done, note)
            return
        if now - self._shown.setdefault(phase, first[0]) >= _PLAIN_SECONDS:
            self._shown[phase] = now
            self.line(f"{name}: {note}", now)

    def _round(self, done: int, planned: int, note: str) -> None:
        left = seconds_left(self.record)
        more = f", about {human_seconds(left)} left" if left else ""
        self._bar("rounds", "rounds", planned, done, note + more)

    def _replies(self, number: int) -> None:
        at = self.record.round(number)
        expected = len(at.started.clients) if at.started else None
        text = f"  clients of round {number}"
        self._bar("replies", text, expected, at.got, f"{at.got}/{expected} replied")

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
