"""The permanent lines an event is worth on a console, in plain text."""

from __future__ import annotations

from functools import singledispatch

from fedpft_console.text import (
    BASELINES,
    MODELS,
    Measure,
    human_bytes,
    human_count,
    human_seconds,
    number,
    percent,
)
from server_app.run import schema as ev
from server_app.run.record import Record

_FEW_ROWS = 30  # on which one label is three points


@singledispatch
def lines_for(event: ev.Event, record: Record) -> list[str]:
    """The lines of an event.

    Args:
        event: the event; of most kinds there is nothing to say.
        record: the run so far, this event included.

    Returns:
        Lines without their ends.
    """
    return []


@lines_for.register
def _(event: ev.RunStarted, record: Record) -> list[str]:
    resumed = f", resumed after round {event.resumed_from}" if event.resumed_from else ""
    if event.kept:
        resumed = f", resumed with {event.kept} replies of round {(event.resumed_from or 0) + 1}"
    return [
        f"{event.method or 'federation'}: {event.rounds} rounds of {event.clients_per_round} "
        f"clients, seed {event.seed}{resumed}"
    ]


@lines_for.register
def _(event: ev.Task, record: Record) -> list[str]:
    labels = f", {len(event.labels)} labels" if event.labels else ""
    return [
        f"task {event.name} ({event.kind}): {event.train} training, {event.validation} validation "
        f"and {event.test} test rows{labels}; {event.public} public rows"
    ]


@lines_for.register
def _(event: ev.Model, record: Record) -> list[str]:
    before, after = event.fm_parameters, event.proxy_parameters
    share = f" ({100 * after / before:.0f} %)" if before else ""
    return [
        f"foundation model {human_count(before)} parameters, {human_bytes(event.fm_bytes)} -> "
        f"sub-FM {human_count(after)} parameters, {human_bytes(event.proxy_bytes)}{share}"
    ]


@lines_for.register
def _(event: ev.Nodes, record: Record) -> list[str]:
    return [f"{event.count} clients connected"]


def _scored(event: ev.Scored, record: Record) -> str:
    """The score in words, as in `accuracy 57.1 %, macro-F1 55.2 %`."""
    found = [f"{event.metric} {Measure.of(record.task).shown(event.value)}"]
    for measure in Measure.further(record.task, event.more):
        if measure.name in event.more:
            found.append(f"{measure.name} {measure.shown(event.more[measure.name])}")
    return ", ".join(found)


@lines_for.register
def _(event: ev.Baseline, record: Record) -> list[str]:
    return [f"baseline {BASELINES.get(event.name, event.name)}: {_scored(event, record)}"]


@lines_for.register
def _(event: ev.Distilled, record: Record) -> list[str]:
    return [
        f"distilled {event.steps} steps in {human_seconds(event.seconds)}: "
        f"loss {number(event.loss_first)} -> {number(event.loss_last)}"
    ]


@lines_for.register
def _(event: ev.RoundStarted, record: Record) -> list[str]:
    again = f", attempt {event.attempt}" if event.attempt > 1 else ""
    return [f"round {event.round}/{event.rounds}{again}: clients {', '.join(event.clients)}"]


@lines_for.register
def _(event: ev.Reply, record: Record) -> list[str]:
    where = f"round {event.round}: client {event.client}"
    if event.status != "ok":
        reason = f": {event.reason}" if event.reason else ""
        said = {
            "need": "asks for the sub-FM", "late": "replied too late", "again": "replied once more"
        }.get(event.status, event.status)  # fmt: skip
        return [f"{where} {said}{reason}"]
    at = record.round(event.round)
    expected = len(at.started.clients) if at.started else "?"
    stale = f", {event.staleness} merges stale" if event.staleness else ""
    return [
        f"{where} replied ({at.got}/{expected}), {event.examples} rows, loss {number(event.loss)}, "
        f"{human_seconds(event.seconds)}{stale}"
    ]


@lines_for.register
def _(event: ev.Joined, record: Record) -> list[str]:
    return [f"round {event.round}: client {event.client} has joined"]


@lines_for.register
def _(event: ev.Merged, record: Record) -> list[str]:
    scored = ""
    if event.value is not None:
        scored = f": FM {event.metric} {Measure.of(record.task).shown(event.value)}"
    return [f"round {event.round}: {event.replies} replies merged{scored}"]


@lines_for.register
def _(event: ev.Aggregated, record: Record) -> list[str]:
    found = ", ".join(f"{name} {number(value)}" for name, value in event.figures.items())
    return [f"round {event.round}: aggregated by {event.rule}, {found}"]


@lines_for.register
def _(event: ev.RoundFinished, record: Record) -> list[str]:
    left = seconds_left(record)
    tail = f"; about {human_seconds(left)} left" if left else ""
    return [
        f"round {event.round}/{rounds_planned(record) or '?'} done in "
        f"{human_seconds(event.seconds)}: {event.good} good replies, {event.bad} bad, "
        f"loss {number(event.loss)}{tail}"
    ]


@lines_for.register
def _(event: ev.PrivacySpent, record: Record) -> list[str]:
    limit = f" of {number(event.target)}" if event.target else ""
    return [
        f"round {event.round}: epsilon {number(event.epsilon)}{limit} spent at delta "
        f"{number(event.delta)}, changes clipped to {number(event.bound)}"
    ]


@lines_for.register
def _(event: ev.Evaluation, record: Record) -> list[str]:
    model = MODELS.get(event.model, event.model)
    return [f"round {event.round}: {model} {_scored(event, record)} ({event.split})"]


@lines_for.register
def _(event: ev.ClientValidation, record: Record) -> list[str]:
    return [
        f"round {event.round}: sub-FM {_scored(event, record)} on {event.rows} rows that "
        f"{event.clients} clients keep from training"
    ]


@lines_for.register
def _(event: ev.Check, record: Record) -> list[str]:
    return [
        f"round {event.round}: sub-FM {_scored(event, record)} on the server's validation rows, "
        f"best after round {event.best}"
    ]


@lines_for.register
def _(event: ev.Stopped, record: Record) -> list[str]:
    return [
        f"rounds have ended after {event.round} of {event.rounds}: the adapter of round "
        f"{event.best} is kept, which did best on validation rows"
    ]


@lines_for.register
def _(event: ev.Validation, record: Record) -> list[str]:
    model = MODELS.get(event.model, event.model)
    return [f"end: {model} {_scored(event, record)} (validation rows)"]


@lines_for.register
def _(event: ev.Backdoor, record: Record) -> list[str]:
    model = MODELS.get(event.model, event.model)
    return [
        f"end: {model} gives {percent(event.obeyed)} of {event.rows} rows of other classes the "
        f"backdoor's with the trigger, {percent(event.before)} without"
    ]


@lines_for.register
def _(event: ev.Alignment, record: Record) -> list[str]:
    return [
        f"round {event.round}: re-aligned {event.neurons} neurons in "
        f"{human_seconds(event.seconds)}, loss {number(event.loss_before)} -> "
        f"{number(event.loss_after)}, sub-FM {event.digest_from[:8]} -> {event.digest_to[:8]}"
    ]


@lines_for.register
def _(event: ev.Agreement, record: Record) -> list[str]:
    return [
        f"round {event.round} ({event.when}): gradient cosine {number(event.cosine)}, "
        f"relative difference {number(event.relative_l2)}"
    ]


@lines_for.register
def _(event: ev.Warned, record: Record) -> list[str]:
    return [f"warning: {event.text}"]


@lines_for.register
def _(event: ev.RunFinished, record: Record) -> list[str]:
    return [f"run finished in {human_seconds(event.seconds)}"]


# ---------------------------------------------------------------- how much there is to do


def rounds_planned(record: Record) -> int:
    """Rounds the run is to have; 0 where that is not known.

    Args:
        record: the run so far.

    Returns:
        Rounds as the latest round's start has them, else as the run's start has them.
    """
    started = [r.started for r in record.rounds if r.started]
    if started:
        return started[-1].rounds
    return record.run.rounds if record.run else 0


def seconds_left(record: Record) -> float | None:
    """Time the rounds to come will take, by those that are done; None before the first is.

    Args:
        record: the run so far.

    Returns:
        Seconds, with evaluation and alignment included as soon as two rounds are done.
    """
    done = [r for r in record.rounds if r.finished and r.ended is not None]
    if not done:
        return None
    last = done[-1]
    todo = max(0, rounds_planned(record) - last.number)
    times = [r.ended for r in done if r.ended is not None]
    if len(times) > 1:
        # From one round's end to the next, so that evaluation and alignment are included.
        return todo * (times[-1] - times[0]) / (len(times) - 1)
    return todo * last.finished.seconds if last.finished else None


@lines_for.register
def _(event: ev.HeadSet, record: Record) -> list[str]:
    kept = "" if event.taken else "; the tuned head is better on unseen rows and stays"
    parts = [f"{event.classes} classes"] if event.classes else []
    if event.descent:
        parts.append(f"tuned by {event.descent} of {event.exchanges} slopes")
    elif event.exchanges:
        parts.append(f"which {event.exchanges} slopes made no better")
    more = f", {', '.join(parts)}," if parts else ""
    return [
        f"head from the statistics of {human_count(event.rows)} rows{more} in "
        f"{human_seconds(event.seconds)}{kept}"
    ]


@lines_for.register
def _(event: ev.Guarded, record: Record) -> list[str]:
    of = f" of width {event.width}" if event.width else ""
    judged = (
        f"statistics of {event.clients} clients{of} held against {event.rows} validation rows in "
        f"{human_seconds(event.seconds)}"
    )
    if not event.left_out:
        return [f"{judged}: nobody left out"]
    names = ", ".join(out["client"] for out in event.left_out)
    return [f"{judged}: left out {names}; loss {number(event.before)} -> {number(event.after)}"]


@lines_for.register
def _(event: ev.Plugged, record: Record) -> list[str]:
    # A log without the name is of a version that knew rows right alone.
    measure = Measure(event.judged or "rows right", share=event.share or not event.judged)
    found = [
        f"{name} {measure.shown(n / event.rows)}" for name, n in event.right.items() if event.rows
    ]
    judged = f" ({measure.name} of {event.rows} unseen: {', '.join(found)})" if found else ""
    out = [f"plugged in by {event.method}{judged}, {human_seconds(event.seconds)}"]
    if found and event.rows < _FEW_ROWS:
        out.append(
            f"{event.rows} rows tell little of which way is best, nor how far to trust the head: "
            "give the server more (data.validation, data.validation-share)"
        )
    return out


@lines_for.register
def _(event: ev.Widths, record: Record) -> list[str]:
    return [
        f"width {w['width']}: {100 * w['share']:.0f} % of the FFN neurons, package "
        f"{human_bytes(w['package'])}, about {human_bytes(w['memory'])} of memory"
        for w in event.sizes
    ]


@lines_for.register
def _(event: ev.WidthGiven, record: Record) -> list[str]:
    blocks = f", LoRA in blocks {event.blocks}" if event.blocks else ""
    if event.before:
        return [
            f"round {event.round}: client {event.client} is moved from width {event.before} to "
            f"{event.width}: {event.reason}{blocks}"
        ]
    width = f"width {event.width}" if event.width else "the sub-FM"
    return [f"client {event.client} gets {width}: {event.reason}{blocks}"]


@lines_for.register
def _(event: ev.WidthScored, record: Record) -> list[str]:
    return [f"round {event.round}: sub-FM of width {event.width} {_scored(event, record)}"]


@lines_for.register
def _(event: ev.WidthAgreement, record: Record) -> list[str]:
    return [
        f"round {event.round}: width {event.width}, cosine of its gradients with the FM's "
        f"{number(event.cosine)}"
    ]
