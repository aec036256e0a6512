"""Events of the course of a run: its phases, how far they are, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass

from server_app.run.schema.event import Event


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event, name="run_started"):
    """A run begins, or goes on from a checkpoint."""

    run_dir: str  # the run folder
    version: str  # version of this program
    seed: int  # the run's seed
    method: str  # what the configuration is called (`fedpft`, `fedpetuning`, ...)
    rounds: int  # rounds planned in all
    clients_per_round: int  # clients drawn for each round
    # the last finished round of the run that is resumed; None for a new run
    resumed_from: int | None
    kept: int = 0  # replies of the round after that one which need not be asked for again


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event, name="phase_started"):
    """A part of the run begins."""

    phase: str  # load | build | baselines | undistilled | distil | round | align | local | export
    round: int | None = None  # the round, where the phase is `round` or `align`


@dataclass(frozen=True, kw_only=True)
class PhaseFinished(Event, name="phase_finished"):
    """A part of the run is over."""

    phase: str  # as when it started
    seconds: float  # how long it took
    round: int | None = None  # as when it started


@dataclass(frozen=True, kw_only=True)
class Progress(Event, name="progress"):
    """How far a phase is."""

    phase: str  # the phase, or `evaluate`
    done: int  # what is done of `total`
    total: int  # what there is to do
    unit: str  # what is counted (steps, rows, rounds)
    loss: float | None = None  # the present loss, where there is one
    round: int | None = None  # the round, where the phase belongs to one
    model: str | None = None  # the model that is evaluated


@dataclass(frozen=True, kw_only=True)
class Waiting(Event, name="waiting"):
    """The run waits for others; said again every few seconds."""

    what: str  # nodes | replies
    done: int  # how many are there
    total: int  # how many are waited for
    seconds_left: float  # until the wait is given up


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event, name="run_finished"):
    """The run has ended well."""

    seconds: float  # how long it took, from its start or resumption


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event, name="run_failed"):
    """The run has ended early."""

    reason: str  # one sentence
    again: bool = False  # a simulated client's process died: from a checkpoint it can go on


@dataclass(frozen=True, kw_only=True)
class Warned(Event, name="warning"):
    """Something a person should know."""

    text: str  # one sentence


@dataclass(frozen=True, kw_only=True)
class Memory(Event, name="memory"):
    """Memory in use so far."""

    process: str  # which process (`server`, or several summed)
    peak_rss_bytes: int  # its largest resident memory, bytes


@dataclass(frozen=True, kw_only=True)
class Files(Event, name="files"):
    """Files the run has written."""

    paths: dict[str, str]  # path by name
