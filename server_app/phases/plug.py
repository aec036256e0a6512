"""Plugging in: how the tuned adapter becomes the product (plug.method)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.stream import public_batches
from fedpft_core.head import refit as plug
from fedpft_core.head.form import Sums
from fedpft_core.head.imitate import Settings, imitate
from fedpft_core.head.mapped import fit as mapped_to
from fedpft_core.head.statistics import add
from fedpft_core.model.device import Batch
from fedpft_core.seeds import derive, numpy_stream
from fedpft_core.task import Headless
from fedpft_core.tensors import Tensors
from fedpft_core.train.evaluate import evaluate
from server_app.bench import Bench
from server_app.phases import heads
from server_app.phases.reporting import progress
from server_app.run import schema as ev
from server_app.state import Events, State
from server_app.strategy import Strategy

METHODS = ("as-trained", "refit", "mapped", "distil")
"""The ways of plugging in that `best` chooses from, those that change less first."""

HEADLESS = ("as-trained", "distil")
"""The same for tasks that train no head."""

_SHORTEST = 8  # tokens of a public row, special ones included
_LOOSE = 0.01  # pull of the map on public rows towards the identity; they are many


def refits(bench: Bench) -> bool:
    """Whether the head is refitted when the adapter is plugged in.

    Args:
        bench: its task, plan, plug.refit and validation rows decide.

    Returns:
        Whether it is; never where the proxy is the FM.
    """
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

    Args:
        bench: the FM gets the head, where it is taken; the proxy stays as it is.
        round: rounds done.
        events: where what came of it is noted; None for the bench's log.

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


def settles(bench: Bench) -> bool:
    """Whether the product is settled once, after the last round, and not refitted at each score.

    Args:
        bench: its task, head.end, plug.method and federation.aggregate decide.

    Returns:
        Whether it is.
    """
    config = bench.config
    if config.federation.aggregate == "none":
        return False
    if isinstance(bench.rows.task, Headless):
        # Between the two ways of `best` there is nothing to choose by without rows.
        some = len(bench.rows.data.validation) > 1
        asked = config.plug.method == "distil" or (config.plug.method == "best" and some)
        return asked and not bench.models.plan.is_full
    late = config.head.end != "trained" or config.plug.method != "refit"
    return late and heads.wanted(bench)


def finish(bench: Bench, strategy: Strategy, state: State, events: Events) -> None:
    """After the last round: the head once more in closed form, then the best way into the FM.

    The adapter of `state` gets the head; the FM is the product afterwards.

    Args:
        bench: models and rows.
        strategy: the clients, who are asked for statistics.
        state: after the last round.
        events: where what came of it is noted.
    """
    method, models = bench.config.plug.method, bench.models
    models.plug(state.adapter)
    if not settles(bench):
        refit(bench, state.round, events)
        return
    if isinstance(bench.rows.task, Headless):
        _finish_headless(bench, state, events)
        return
    mapped = method in ("best", "mapped") and not models.plan.is_full
    sums = heads.again(bench, strategy, state, events, force=mapped)
    models.plug(state.adapter)
    if models.plan.is_full or method == "as-trained":
        return
    if method == "refit":
        refit(bench, state.round, events)
        return
    start = time.perf_counter()
    fit_rows, judge = heads.split(bench)
    if not len(fit_rows):
        fit_rows = bench.rows.public_rows(bench.config.plug.rows, "plug")
        events.emit(ev.Warned(
            text="the server has no validation rows: the adapter is fitted to the FM on public "
            "rows, and no candidate can be compared with another"
        ))  # fmt: skip
    wanted: Sequence[str] = (method,)
    if method == "best":
        wanted = METHODS if len(judge) else ("refit", "mapped")
    known = _public_features(bench) if {"refit", "mapped"} & set(wanted) else None
    made = _candidates(bench, sums, fit_rows, events, wanted, known)
    taken, right, fitted, judges = method, dict[str, float](), len(fit_rows), 0
    if len(judge):
        for name, adapter in made.items():
            adapters.load(models.fm, adapter)
            right[name], judges = heads.merit(bench, models.fm, judge)
        if method == "best":
            # Of equals the first, which changes least.
            taken = max(right, key=lambda name: right[name])
            if taken != "as-trained":
                # The choice is made; the rows that made it now serve what was chosen.
                models.plug(state.adapter)
                rows = heads.fitting(bench)
                made = _candidates(bench, sums, rows, events, (taken,), known)
                fitted = len(rows)
    elif method == "best":
        taken = "mapped" if "mapped" in made else "refit"
    adapters.load(models.fm, made[taken])
    events.emit(ev.Plugged(
        round=state.round, method=taken, right=right, rows=judges, fitted=fitted,
        judged=bench.rows.task.judged.name, share=bench.rows.task.judged.share,
        seconds=time.perf_counter() - start,
    ))  # fmt: skip


def _finish_headless(bench: Bench, state: State, events: Events) -> None:
    """The same for a task that trains no head: the adapter as it is, or the FM tuned towards it.

    Args:
        bench: models with the tuned adapter, and rows.
        state: after the last round.
        events: where what came of it is noted.
    """
    start, config, models = time.perf_counter(), bench.config, bench.models
    rows, judge = heads.split(bench)
    if len(rows) < 2:
        rows = bench.rows.public_rows(config.plug.rows, "plug")
    made = _candidates(bench, None, rows, events, HEADLESS)
    taken, losses = "distil", dict[str, float]()
    if len(judge):
        for name, adapter in made.items():
            adapters.load(models.fm, adapter)
            found = evaluate(models.fm, bench.rows.task, judge, config.run.eval_batch_size)
            losses[name] = found.loss
        if config.plug.method == "best":
            taken = min(losses, key=lambda name: losses[name])
    adapters.load(models.fm, made[taken])
    events.emit(ev.Plugged(
        round=state.round, method=taken, right={}, losses=losses, rows=len(judge),
        fitted=len(rows), seconds=time.perf_counter() - start,
    ))  # fmt: skip


def _candidates(
    bench: Bench,
    sums: Mapping[str, Sums] | None,
    rows: Encoded,
    events: Events,
    wanted: Sequence[str],
    known: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensors]:
    """What the FM's adapter may become: as trained, and by the methods that are wanted.

    Args:
        bench: the tuned adapter is plugged into both models; the proxy stays as it is.
        sums: the clients' statistics of the sub-FM's tuned features, by its width.
        rows: rows both models read; labels serve for shrinkage and scale alone, where there are
            any.
        events: where progress is noted.
        wanted: of METHODS.
        known: features of public rows in proxy and FM, which maps are fitted to first.

    Returns:
        Adapters by the candidate's name, `as-trained` first. The last one is on the FM.
    """
    p, models = bench.config.plug, bench.models
    made = {"as-trained": adapters.read(models.fm)}
    if "refit" in wanted or "mapped" in wanted:
        served = list(batches(rows, bench.config.run.eval_batch_size, None))
        f_S, f_T = (plug.features(m, served, bench.rows.task) for m in (models.proxy, models.fm))
    if "refit" in wanted:
        way = mapped_to(f_T, f_S, p.ridge, _prior(known, back=True))
        weight, bias = plug.turned(plug.last_linear(models.fm), way)
        layer = plug.last_linear(models.fm)
        plug.put(layer, weight, bias)
        made["refit"] = adapters.read(models.fm)
    if sums is not None and "mapped" in wanted:
        turn = heads.projected(bench, f_S.shape[1])
        y = f_T if turn is None else f_T @ turn
        taken = []
        for width in models.widths:
            if width.name not in sums:
                continue
            # Each width by a map of its own; what clients of the FM itself sent is there already.
            own = sums[width.name]
            if not width.plan.is_full:
                mine = width.proxy is models.proxy
                f_W = f_S if mine else plug.features(width.proxy, served, bench.rows.task)
                x = f_W if turn is None else f_W @ turn
                prior = _prior(known, turn) if mine else None
                own = heads.form(bench).taken(own, mapped_to(x, y, p.ridge, prior), x, y)
            taken.append(own)
        there = add(taken)
        told = plug.answers(served, bench.rows.task) if "labels" in served[0] else None
        head = heads.fit(bench, there, y, told)
        heads.write(bench, head, models.fm)
        made["mapped"] = adapters.read(models.fm)
    if "distil" in wanted:
        # Not from a head that was fitted to these very rows: on those of them that are kept from
        # tuning it looks better than it is, and nothing tuned would ever seem an improvement.
        adapters.load(models.fm, made["as-trained"])
        settings = Settings(p.distil_steps, p.distil_batch_size, p.distil_lr, p.distil_head_lr)
        report = progress(events, "plug", "steps")
        imitate(
            models.fm, models.proxy, bench.rows.task, rows, settings,
            derive(bench.config.run.seed, "imitate"), report,
        )  # fmt: skip
        made["distil"] = adapters.read(models.fm)
    return made


def _public_features(bench: Bench) -> tuple[Tensor, Tensor] | None:
    """What proxy and FM have of plug.map-rows public rows, texts as long as the task's own."""
    config, rows = bench.config, bench.rows
    count, size = config.plug.map_rows, config.run.eval_batch_size
    if not count:
        return None
    own = rows.validation.offsets if len(rows.data.validation) else None
    lengths = np.array([config.distill.length]) if own is None else own.diff().numpy()
    stream = numpy_stream(config.run.seed, "map-rows")
    served: list[Batch] = []
    for i in range(math.ceil(count / size)):
        length = max(int(stream.choice(lengths)), _SHORTEST)
        seed = derive(config.run.seed, "map-rows", i)
        served += public_batches(rows.public, rows.processor, size, length, 1, seed)
    found = [plug.features(m, served, rows.task) for m in (bench.models.proxy, bench.models.fm)]
    return found[0], found[1]


def _prior(
    known: tuple[Tensor, Tensor] | None, turn: Tensor | None = None, back: bool = False
) -> Tensor | None:
    """The map that public rows give, from proxy to FM or back; None without any."""
    if known is None:
        return None
    x, y = known if turn is None else (known[0] @ turn, known[1] @ turn)
    return mapped_to(y, x, _LOOSE).turn if back else mapped_to(x, y, _LOOSE).turn
