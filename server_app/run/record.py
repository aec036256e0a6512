"""A run as its events tell it: folded once, event by event, for all who read it.

Progress folds while the run goes on; reports and comparisons fold a finished file. The record
keeps the events themselves, by round where they have one, so that what a reader shows is worked
out by that reader and nothing is copied by hand. It lies beside the schema, below the console, so
that whatever wants to follow a run on the server's side can fold as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from server_app.run import schema as ev
from server_app.run.events import Entry, EventLog, entry_of, read_events

DIRECTIONS = ("down", "up")
# When gradients are compared in a round, latest last.
MOMENTS = ("start", "before-align", "after-align", "end")


@dataclass
class Round:
    """What happened in one round; what did not, or is not known yet, is None or empty."""

    number: int
    started: ev.RoundStarted | None = None  # the latest attempt
    finished: ev.RoundFinished | None = None
    ended: float | None = None  # when, Unix seconds
    replies: list[ev.Reply] = field(default_factory=list)
    got: int = 0  # good replies of the latest attempt
    scores: dict[str, ev.Evaluation] = field(default_factory=dict)  # by model
    confusion: dict[str, ev.Confusion] = field(default_factory=dict)  # by model
    widths: dict[str, ev.WidthScored] = field(default_factory=dict)  # by width, but the proxy's
    clients: ev.ClientValidation | None = None
    refit: ev.Refit | None = None
    privacy: ev.PrivacySpent | None = None
    alignment: ev.Alignment | None = None
    agreements: dict[str, ev.Agreement] = field(default_factory=dict)  # by moment
    norm: float | None = None  # L2 norm of the adapter
    guarded: list[ev.Guarded] = field(default_factory=list)  # a width each; of each exchange
    merges: list[ev.Merged] = field(default_factory=list)  # of replies, while others are awaited
    # by direction and kind, and by direction and client
    bytes: dict[str, dict[str, int]] = field(default_factory=lambda: {d: {} for d in DIRECTIONS})
    by_client: dict[str, dict[str, int]] = field(
        default_factory=lambda: {d: {} for d in DIRECTIONS}
    )

    @property
    def proxy(self) -> ev.Evaluation | None:
        """Score of the sub-FM."""
        return self.scores.get("proxy")

    @property
    def fm(self) -> ev.Evaluation | None:
        """Score of the plugged-in FM."""
        return self.scores.get("fm")

    @property
    def trained(self) -> ev.Evaluation | None:
        """Score of the FM with the head as clients left it, where the FM has another."""
        return self.scores.get("fm-as-trained")

    @property
    def gap(self) -> float | None:
        """Plug-in gap: score of the sub-FM minus that of the plugged-in FM."""
        if self.proxy is None or self.fm is None:
            return None
        return self.proxy.value - self.fm.value

    def moments(self, figure: str) -> dict[str, float]:
        """A figure of the agreement events by moment.

        Args:
            figure: a field of theirs, as `cosine` or `relative_l2`.

        Returns:
            Its values by moment, where they are known.
        """
        found = {when: getattr(event, figure) for when, event in self.agreements.items()}
        return {when: value for when, value in found.items() if value is not None}

    def latest(self, figure: str) -> float | None:
        """The figure at the latest moment of this round.

        Args:
            figure: a field of the agreement events.

        Returns:
            Its value; None where it is known at no moment.
        """
        values = self.moments(figure)
        known = [values[m] for m in MOMENTS if m in values]
        return known[-1] if known else None

    def alignment_errors(self) -> tuple[float | None, float | None]:
        """Hidden-state error before and after re-alignment, mean over pruned blocks.

        Returns:
            Both means; None where there was no alignment.
        """
        blocks = self.alignment.blocks if self.alignment else []
        return (
            mean([b.get("error_before") for b in blocks]),
            mean([b.get("error_after") for b in blocks]),
        )


@dataclass
class Record:
    """A run, of which `add` has been told so far."""

    state: str = "running"  # running | finished | failed
    reason: str = ""  # why it failed
    run: ev.RunStarted | None = None
    task: ev.Task | None = None
    model: ev.Model | None = None
    nodes: ev.Nodes | None = None
    partition: ev.Partition | None = None
    distilled: ev.Distilled | None = None
    baselines: dict[str, ev.Baseline] = field(default_factory=dict)
    samples: dict[str, ev.Samples] = field(default_factory=dict)  # the last of each model
    pictures: dict[str, ev.Pictures] = field(default_factory=dict)  # likewise
    painted_before: ev.Pictures | None = None  # by the FM before round 1
    validation: dict[str, ev.Validation] = field(default_factory=dict)  # by model
    backdoor: dict[str, ev.Backdoor] = field(default_factory=dict)  # by model
    phase_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)  # by process
    warnings: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    # bytes of side runs, by side run and direction
    aside: dict[str, dict[str, int]] = field(default_factory=dict)
    widths: ev.Widths | None = None
    given: dict[str, ev.WidthGiven] = field(default_factory=dict)  # the latest, by client
    moved: list[ev.WidthGiven] = field(default_factory=list)  # those that had another before
    # by width and direction the bytes of all its clients
    by_width: dict[str, dict[str, int]] = field(default_factory=dict)
    # what of the FM each version of the sub-FM holds: by side run ("" for the run itself), digest
    exposed: dict[str, dict[str, ev.Exposed]] = field(default_factory=dict)
    _rounds: dict[int, Round] = field(default_factory=dict)
    _earlier: float = 0.0  # seconds of the parts before the last resumption
    _start: float | None = None
    _last: float | None = None

    @property
    def rounds(self) -> list[Round]:
        """The rounds of which there are events, in order; 0 is before the first."""
        return [self._rounds[n] for n in sorted(self._rounds)]

    def round(self, number: int) -> Round:
        """A round, which exists from when it is first asked for.

        Args:
            number: the round's; 0 is before the first.

        Returns:
            The round of this record, which changes as events are added.
        """
        return self._rounds.setdefault(number, Round(number))

    @property
    def further(self) -> list[str]:
        """Names of the further metrics that a score has a value of, in order of appearance."""
        scores: list[ev.Scored] = [*self.baselines.values()]
        for r in self.rounds:
            scores += [*r.scores.values(), *([r.clients] if r.clients else [])]
        return list(dict.fromkeys(name for score in scores for name in score.more))

    @property
    def seconds(self) -> float | None:
        """How long the run took so far, without the pauses between its parts."""
        if self._start is None or self._last is None:
            return None
        return self._earlier + self._last - self._start

    def bytes(self, direction: str, kind: str) -> int:
        """Bytes of one kind in one direction over all rounds.

        Args:
            direction: `down` or `up`.
            kind: what was sent, as the events have it.

        Returns:
            Their sum.
        """
        return sum(r.bytes[direction].get(kind, 0) for r in self._rounds.values())

    def add(self, entry: Entry) -> None:
        """Fold one more event. Of side runs only what was sent counts: the rest is not the run's.

        Args:
            entry: the next one of the log.
        """
        if isinstance(entry.event, ev.Exposed):
            self.exposed.setdefault(entry.arm, {})[entry.event.digest] = entry.event
        if entry.arm:
            if isinstance(entry.event, ev.Bytes):
                sums = self.aside.setdefault(entry.arm, dict.fromkeys(DIRECTIONS, 0))
                sums[entry.event.direction] = sums.get(entry.event.direction, 0) + entry.event.bytes
            return
        event, now = entry.event, entry.t
        self._start = now if self._start is None else self._start
        if isinstance(event, ev.RunStarted):
            self._begin(event, now)
        else:
            self._add_to_run(event)
            self._add_to_round(event, now)
        if not isinstance(event, ev.Memory):  # may be added after the end
            self._last = now

    def _begin(self, event: ev.RunStarted, now: float) -> None:
        if self._last is not None and self._start is not None:
            self._earlier += self._last - self._start
        self._start = now
        self.run, self.state, self.reason = event, "running", ""
        # The log was cut back to the checkpoint, and what came after it is done again.
        if event.resumed_from is not None:
            last = event.resumed_from + bool(event.kept)
            kept = {n: r for n, r in self._rounds.items() if n <= last}
            self._rounds = kept

    def _add_to_run(self, event: ev.Event) -> None:
        match event:
            case ev.Task():
                self.task = event
            case ev.Model():
                self.model = event
            case ev.Nodes():
                self.nodes = event
            case ev.Partition():
                self.partition = event
            case ev.Distilled():
                self.distilled = event
            case ev.Baseline():
                self.baselines[event.name] = event
            case ev.Validation():
                self.validation[event.model] = event
            case ev.Backdoor():
                self.backdoor[event.model] = event
            case ev.PhaseFinished():
                before = self.phase_seconds.get(event.phase, 0.0)
                self.phase_seconds[event.phase] = before + event.seconds
            case ev.Memory():
                before = self.peak_bytes.get(event.process, 0)
                self.peak_bytes[event.process] = max(before, event.peak_rss_bytes)
            case ev.Files():
                self.files |= event.paths
            case ev.Widths():
                self.widths = event
            case ev.WidthGiven():
                self.given[event.client] = event
                if event.before:
                    self.moved.append(event)
            case ev.Bytes() if event.client in self.given:
                width = self.given[event.client].width
                sums = self.by_width.setdefault(width, dict.fromkeys(DIRECTIONS, 0))
                sums[event.direction] = sums.get(event.direction, 0) + event.bytes
            case ev.Warned():
                self.warnings.append(event.text)
            case ev.RunFinished():
                self.state, self.reason = "finished", ""
            case ev.RunFailed():
                self.state, self.reason = "failed", event.reason

    def _add_to_round(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.RoundStarted():
                at = self.round(event.round)
                at.started, at.got = event, 0
            case ev.Joined():
                at = self.round(event.round)
                if at.started:
                    names = [*at.started.clients, event.client]
                    at.started = replace(at.started, clients=names)
            case ev.Merged():
                self.round(event.round).merges.append(event)
            case ev.Reply():
                at = self.round(event.round)
                at.replies.append(event)
                at.got += event.status == "ok"
            case ev.RoundFinished():
                at = self.round(event.round)
                at.finished, at.ended = event, now
            case ev.Evaluation():
                self.round(event.round).scores[event.model] = event
            case ev.WidthScored():
                self.round(event.round).widths[event.width] = event
            case ev.Samples():
                self.samples[event.model] = event
            case ev.Confusion():
                self.round(event.round).confusion[event.model] = event
            case ev.Pictures():
                self.pictures[event.model] = event
                if event.model == "fm" and not event.round:
                    self.painted_before = event
            case ev.ClientValidation():
                self.round(event.round).clients = event
            case ev.PrivacySpent():
                self.round(event.round).privacy = event
            case ev.Guarded():
                self.round(event.round).guarded.append(event)
            case ev.Refit():
                self.round(event.round).refit = event
            case ev.Alignment():
                self.round(event.round).alignment = event
            case ev.Agreement():
                self.round(event.round).agreements[event.when] = event
            case ev.Adapter():
                self.round(event.round).norm = event.norm
            case ev.Bytes():
                counts = self.round(event.round).bytes.setdefault(event.direction, {})
                counts[event.kind] = counts.get(event.kind, 0) + event.bytes
                own = self.round(event.round).by_client.setdefault(event.direction, {})
                own[event.client] = own.get(event.client, 0) + event.bytes


def fold(lines: Iterable[Mapping[str, Any]]) -> Record:
    """The record of a run.

    Args:
        lines: the lines of its log, in order. What this version does not know is passed over.

    Returns:
        What they come to.
    """
    record = Record()
    for line in lines:
        entry = entry_of(line)
        if entry is not None:
            record.add(entry)
    return record


def of_log(log: EventLog) -> Record:
    """The record of a run whose log is still being written.

    Args:
        log: the run's, in a file or in memory.

    Returns:
        What its events come to so far.
    """
    return fold(log.seen if log.path is None else (line for _, line in read_events(log.path)))


def mean(values: Iterable[Any]) -> float | None:
    """Mean of those that are known.

    Args:
        values: numbers, or None where one is not known.

    Returns:
        The mean; None where no number is known.
    """
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None
