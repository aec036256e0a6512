"""Plugging in: the FM's head is refitted to the features that the FM has."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

from fedpft_core.adapter import plug
from fedpft_core.data.batches import batches
from fedpft_core.seeds import numpy_stream
from server_app.bench import Bench
from server_app.run import schema as ev
from server_app.state import Events


def refits(bench: Bench) -> bool:
    """Whether the head is refitted when the adapter is plugged in."""
    source = bench.config.plug.refit
    return (
        bench.rows.task.refits
        and not bench.models.plan.is_full
        and (
            source == "public"
            or (source in ("better", "validation") and len(bench.rows.data.validation) > 0)
        )
    )


def refit(bench: Bench, round: int, events: Events | None = None) -> bool:
    """Refit the FM's head to the adapter now plugged in.

    Returns:
        Whether the head is another now.
    """
    if not refits(bench):
        return False
    start, p = time.perf_counter(), bench.config.plug
    judge = (lambda: _rows(bench, others=True)) if p.refit == "better" else None
    models = bench.models
    result = plug.refit_head(
        models.fm, models.proxy, bench.rows.task, lambda: _rows(bench), p.ridge, judge
    )
    (events or bench.events).emit(ev.Refit(
        round=round, source=p.refit, error_before=result.map.error_before,
        error_after=result.map.error_after, score_before=result.right_before,
        score_after=result.right_after, taken=result.taken,
        seconds=time.perf_counter() - start,
    ))  # fmt: skip
    return result.taken


def _rows(bench: Bench, others: bool = False) -> Iterable[Any]:
    """The batches to fit to, the same each time, or those of the other validation rows."""
    config, n = bench.config, bench.config.plug.rows
    if config.plug.refit == "public":
        return bench.rows.public_batches(math.ceil(n / config.distill.batch_size), "refit")
    stream = numpy_stream(config.run.seed, "refit-rows")
    order = stream.permutation(len(bench.rows.data.validation))
    rows = bench.rows.validation.select(order[n:] if others else order[:n])
    return batches(rows, config.run.eval_batch_size, None)
