"""How alike the adapter's gradients are on FM and proxy."""

from __future__ import annotations

from typing import Any

from fedpft_core.train import agreement as measure
from server_app.bench import Bench
from server_app.run import schema as ev


def record(bench: Bench, round: int, when: str, start: bool = False) -> None:
    """Record the agreement on validation rows; at the `start` of LoRA's B alone, as A has none."""
    if not len(bench.rows.gradient) or bench.models.plan.is_full:
        return
    found = agreement(bench, b_only=start)
    bench.events.emit(ev.Agreement(round=round, when=when, **found))


def agreement(bench: Bench, b_only: bool) -> dict[str, Any]:
    """The figures of `gradient_agreement` on the bench's gradient rows."""
    m, rows, size = bench.models, bench.rows, bench.config.train.batch_size
    return measure.gradient_agreement(
        m.fm, m.proxy, m.plan, rows.task, rows.gradient, size, b_only
    )  # fmt: skip
