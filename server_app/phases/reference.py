"""What a score is held against without training anything: one label for every row.

A model that says the same for every row can have a score that looks like success. So the score of
the commonest label is noted in every run, and it is said when the product is hardly more than that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from fedpft_core.data.grouping import share_out
from fedpft_core.data.partition import client_names, digest
from fedpft_core.disk import whole
from fedpft_core.task import Score, confusion
from server_app.bench import Bench
from server_app.run import schema as ev
from server_app.run.events import accuracy

MANIFEST = "partition.json"
"""The file in a simulation's run folder that says how the training rows are divided."""
_NEARLY_ALL = 0.98  # share of the rows given one label from which predictions count as constant
_EVEN = 0.95  # where so many rows do have it, that is no fault


def majority(bench: Bench) -> None:
    """Note the score of giving every row the commonest label of the training rows.

    The server's validation rows stand in where it has no training rows, then the scored ones.
    Nothing is noted of a task whose rows have no labels to count, or that is judged by another
    metric than accuracy.

    Args:
        bench: the task and its rows; the score is of the rows of run.eval-split.
    """
    data, task, split = bench.rows.data, bench.rows.task, bench.config.run.eval_split
    scored = data.test if split == "test" else data.validation
    counted = next((r for r in (data.train, data.validation, scored) if len(r)), scored)
    common, rows = task.histogram(counted), task.histogram(scored)
    total = sum(rows.values())
    if task.metric.name != "accuracy" or not common or total != len(scored) or not total:
        return
    label = max(common, key=lambda name: common[name])
    known = {m.name for m in task.further}
    more = {"macro-F1": _macro_f1(rows, label)} if "macro-F1" in known else {}
    bench.events.emit(ev.Baseline(
        name="majority-class", split=split, more=more, **accuracy(rows[label] / total, total)
    ))  # fmt: skip


def partition(bench: Bench, names: Collection[str]) -> None:
    """Note how the training rows are divided, where the clients share those of the run.

    In a deployment whose nodes have rows of their own nothing is known, and nothing is noted.

    Args:
        bench: the task, its training rows and the settings.
        names: of the clients that are there.
    """
    data, task, f = bench.rows.data, bench.rows.task, bench.config.federation
    expected = client_names(f.clients)
    if not len(data.train) or set(names) != set(expected):
        return
    run = bench.config.run
    parts = share_out(data.train, task.strata, f, f.clients, run.seed, run.dir)
    rows = {
        name: task.histogram(data.train.select(part)) or {"rows": len(part)}
        for name, part in zip(expected, parts, strict=True)
    }
    by = "source" if f.partition == "natural" else f.partition_by
    noted = ev.Partition(
        scheme=f.partition, clients=rows, by=by, seed=run.seed, digest=digest(parts)
    )
    bench.events.emit(noted)
    if run.dir:
        text = json.dumps(asdict(noted), indent=1, ensure_ascii=False) + "\n"
        whole.write(Path(run.dir) / MANIFEST, text.encode())


def _macro_f1(rows: Mapping[str, int], label: str) -> float:
    """Macro-F1 of giving every row this label: its F1, and 0 for every other that a row has."""
    total = sum(rows.values())
    seen = sum(1 for name, n in rows.items() if n or name == label)
    return 2 * rows[label] / (rows[label] + total) / seen


def labels_given(bench: Bench, round: int, which: str, result: Score) -> None:
    """Note which labels a model gave, and warn where the product gives nearly always the same.

    Args:
        bench: the task's labels, and the log.
        round: rounds done; the warning is given after the last.
        which: `proxy`, `fm` or `fm-as-trained`, of which only the first two are noted.
        result: the model's score.
    """
    counts = confusion(result.sums)
    if which not in ("proxy", "fm") or not counts:
        return
    split = bench.config.run.eval_split
    bench.events.emit(ev.Confusion(round=round, model=which, split=split, counts=counts))
    if which != "fm" or round < bench.config.federation.rounds:
        return
    given: dict[int, int] = {}
    have: dict[int, int] = {}
    for a, b, n in counts:
        have[a] = have.get(a, 0) + n
        given[b] = given.get(b, 0) + n
    top, total = max(given, key=lambda b: given[b]), sum(given.values())
    if given[top] >= _NEARLY_ALL * total and have.get(top, 0) < _EVEN * total:
        bench.events.emit(ev.Warned(
            text=f"the plugged-in FM gives {given[top]} of {total} {split} rows the label "
            f"{bench.rows.task.labels[top]!r}, which {have.get(top, 0)} have: it has learned "
            "little more than which label is common (more rounds or steps, train.lr, or "
            "train.head-lr-scale may help)",
        ))  # fmt: skip
