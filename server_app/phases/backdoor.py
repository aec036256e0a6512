"""How far a simulated backdoor got: which rows the models give class 0 for the trigger's sake."""

from __future__ import annotations

import numpy as np
from torch import nn

from fedpft_core.data.encoded import Encoded
from fedpft_core.data.trigger import triggered
from fedpft_core.task import Classify, confusion
from fedpft_core.train.evaluate import evaluate
from server_app.bench import Bench
from server_app.run import schema as ev


def score(bench: Bench, round: int) -> None:
    """Note how many rows of other classes proxy and product give class 0, with trigger and without.

    Nothing is done where no backdoor is simulated, where the rows are no texts, or all of class 0.

    Args:
        bench: models as they are to be scored; the rows are those of run.eval-split.
        round: rounds done.
    """
    simulate, task = bench.config.simulate, bench.rows.task
    if simulate.attack != "backdoor" or not isinstance(task, Classify) or task.reads != "text":
        return
    data = bench.rows.data
    rows = data.test if bench.config.run.eval_split == "test" else data.validation
    others = np.flatnonzero(rows.labels != 0)
    if not len(others):
        return
    plain = bench.rows.scored.select(others)
    marked = bench.rows.encode(triggered(rows.select(others), simulate.trigger))
    for which, model in (("proxy", bench.models.proxy), ("fm", bench.models.fm)):
        bench.events.emit(ev.Backdoor(
            round=round, model=which, rows=len(others),
            obeyed=_first(bench, model, marked), before=_first(bench, model, plain),
        ))  # fmt: skip


def _first(bench: Bench, model: nn.Module, rows: Encoded) -> float:
    """Share of rows that a model gives class 0."""
    found = evaluate(model, bench.rows.task, rows, bench.config.run.eval_batch_size)
    return sum(n for _, given, n in confusion(found.sums) if given == 0) / len(rows)
