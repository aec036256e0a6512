"""How alike the adapter's gradients are on FM and proxy."""

from __future__ import annotations

from typing import Any

from fedpft_core.train import agreement as measure
from server_app.bench import Bench
from server_app.run import schema as ev


def record(bench: Bench, round: int, when: str, start: bool = False) -> None:
    """Record the agreement on validation rows, where there are any and the proxy is not the FM.

    Args:
        bench: models with the adapter plugged in, and the rows to compare gradients on.
        round: rounds done.
        when: the moment, as the event has it: `start`, `before-align`, `after-align` or `end`.
        start: whether to compare LoRA's B alone, as at the start A has no gradient.
    """
    if not len(bench.rows.gradient) or bench.models.plan.is_full:
        return
    found = agreement(bench, b_only=start)
    bench.events.emit(ev.Agreement(round=round, when=when, **found))


def agreement(bench: Bench, b_only: bool) -> dict[str, Any]:
    """The figures of `gradient_agreement` on the bench's gradient rows.

    Args:
        bench: models with the adapter plugged in, and at least one gradient row.
        b_only: whether to compare LoRA's B alone.

    Returns:
        Cosine and relative L2 distance over LoRA's factors, of the head apart, and by block; NaN
        where a gradient is zero.
    """
    m, rows, size = bench.models, bench.rows, bench.config.train.batch_size
    return measure.gradient_agreement(
        m.fm, m.proxy, m.plan, rows.task, rows.gradient, size, b_only
    )  # fmt: skip
