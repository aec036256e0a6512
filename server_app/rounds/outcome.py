"""What a round came to: the next adapter and the figures beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedpft_core.aggregation import Replies, aggregate
from fedpft_core.config import FederationConfig
from fedpft_core.tensors import Tensors
from fedpft_core.train.inactivity import Counts, sum_counts
from server_app.rounds import caution


@dataclass(frozen=True)
class Good:
    """The figures of a valid reply, without its adapter.

    `norms` are those of its change by what they are of. `seconds` is what the client trained,
    `arrived` the seconds since the round began.
    """

    examples: int
    loss: float
    seconds: float
    arrived: float
    validation_rows: int = 0
    validation_sums: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    counts: Counts | None = None
    width: str = ""  # of the sub-FM it was trained on, with plan.widths


@dataclass(frozen=True)
class Outcome:
    """A finished round; during `busy_seconds` a client was training, or the server was at work.

    `adapter` is what aggregation gives, `before` what the clients began with.
    """

    adapter: Tensors
    before: Tensors
    counts: Counts | None
    loss: float
    examples: int
    good: int
    bad: int
    train_seconds: float
    busy_seconds: float
    seconds: float


def training_wall(replies: Iterable[Good], worked: tuple[float, float] = (0.0, 0.0)) -> float:
    """Seconds during which at least one of these clients was training, or the server at work.

    By the clients' own figures: each trained up to when its reply arrived. One that has arrived
    while the server was at work is found after that.

    Args:
        replies: figures of the good replies of a round.
        worked: from when to when the server was at work on the round before, seconds since the
            round began.

    Returns:
        Seconds; time that several clients train in counts once.
    """
    wall, end = 0.0, 0.0
    for start, stop in sorted([worked, *((r.arrived - r.seconds, r.arrived) for r in replies)]):
        wall += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return wall


def outcome(
    f: FederationConfig, replies: Replies, good: dict[str, Good], bad: int, start: float,
    combine: Callable[[Replies], Tensors] | None = None,
    join: Callable[[Sequence[tuple[str, Counts]]], Counts] | None = None,
    worked: tuple[float, float] = (0.0, 0.0),
) -> Outcome:  # fmt: skip
    """Aggregate a round's replies by federation.aggregate.

    Args:
        f: the rule, and what a client weighs.
        replies: the adapters, by client.
        good: the figures of the same replies, by client; at least one unless `combine` can do
            without.
        bad: how many replies were not used.
        start: when the round began, `time.perf_counter()`.
        combine: makes the next adapter in place of the rule.
        join: adds up inactivity counts of several widths, each with its width's name; None where
            there is one sub-FM.
        worked: when the server was at work on the round before, as for :func:`training_wall`.

    Returns:
        The next adapter with the round's figures. The loss is the weighted mean without absurd
        ones; inactivity counts are summed where they were asked for.
    """
    began = time.perf_counter()
    adapter = combine(replies) if combine else aggregate(f.aggregate, replies)
    # In the order of the names: sums of floats depend on it.
    ordered = [good[name] for name in sorted(good)]
    examples = sum(r.examples for r in ordered)
    busy = 0.0
    for r in ordered:
        busy += r.seconds
    claims = [r.examples for r in ordered]
    parts = zip(ordered, caution.scales(claims, f), strict=True)
    counts = [(r.width, caution.scaled_counts(r.counts, p)) for r, p in parts if r.counts]
    every = (join(counts) if join else sum_counts(c for _, c in counts)) if counts else None
    done = time.perf_counter()
    return Outcome(
        adapter=adapter,
        before=replies.start,
        counts=every,
        loss=caution.mean_loss([r.loss for r in ordered], replies.weights) if good else math.nan,
        examples=examples,
        good=len(good),
        bad=bad,
        train_seconds=busy,
        busy_seconds=training_wall(ordered, worked) + done - began,
        seconds=done - start,
    )
