"""The head from statistics tuned further, by slopes that all clients sum (head.descent)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from fedpft_core.errors import RunError
from fedpft_core.head.descent import Descent, descend
from fedpft_core.head.discriminant import Head
from fedpft_core.head.form import Form, Sums
from fedpft_core.head.slope import Slope
from fedpft_core.head.statistics import Statistics
from fedpft_core.tensors import Tensors
from fedpft_core.wire.validate import ExpectedStatistics
from server_app.bench import Bench
from server_app.phases.reporting import progress
from server_app.run import schema as ev
from server_app.state import State
from server_app.strategy import Strategy


def tuned(
    bench: Bench,
    strategy: Strategy,
    state: State,
    form: Form,
    want: ExpectedStatistics,
    without: Collection[str],
    found: Sums,
    head: Head,
    features: Tensor,
    labels: Tensor,
) -> Descent:
    """The best head on the way down from the one that the statistics give.

    Args:
        bench: head.descent says how many exchanges there may be.
        strategy: the clients, who are asked.
        state: at the adapter that the statistics are of.
        form: how the head follows from sums.
        want: what good statistics looked like.
        without: clients whose statistics were left out; their slopes are, too.
        found: the sum of the statistics.
        head: what they give.
        features: float64 [N, D] of the server's labelled rows.
        labels: their answers [N].

    Returns:
        The head, which is that given where nothing can be asked: without head.descent, with a head
        that is not tuned so, or without labelled rows, of which a warning tells.

    Raises:
        RunError: too few clients answered an exchange, or all of them were left out.
    """
    most = bench.config.head.descent
    if not most or not isinstance(found, Statistics):
        return Descent(head)
    if not len(labels):
        bench.events.emit(ev.Warned(
            text="head.descent: the server has no labelled rows to say where to stop, so the head "
            "stays as the statistics give it (data.validation)"
        ))  # fmt: skip
        return Descent(head)
    tell = progress(bench.events, "statistics", "exchanges")
    asked = 0

    def slope(at: Tensors) -> Slope:
        nonlocal asked
        summing = form.slopes(at, want.width)
        assert summing is not None
        there = replace(want, form=summing, head=at)
        sums = strategy.gather(
            state, there, lambda parts: [n for p in parts.values() for n in p if n in without]
        )
        asked += 1
        tell(asked, most)
        (total,) = sums.values()
        assert isinstance(total, Slope)
        if not total.rows:
            raise RunError("head.descent: no rows are left to take a slope over")
        return total

    return descend(head, found, slope, features, labels, most)
