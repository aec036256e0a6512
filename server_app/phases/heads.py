"""The head in closed form, before round 1 and after the last: from class statistics of all rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.head.closed import form_of
from fedpft_core.head.discriminant import Head
from fedpft_core.head.form import Form, Sums
from fedpft_core.head.mapped import fit as mapped_to
from fedpft_core.head.refit import answers, features, labelled_features, last_linear
from fedpft_core.head.statistics import add, projection
from fedpft_core.seeds import numpy_stream
from fedpft_core.tensors import Tensors
from fedpft_core.wire.validate import ExpectedStatistics
from server_app.bench import Bench
from server_app.phases import descent
from server_app.phases.guard import guard_of
from server_app.run import schema as ev
from server_app.state import Events, State
from server_app.strategy import Strategy

_ROOM = 4.0  # what clients have may be so many times larger than in any of the server's own rows


def wanted(bench: Bench) -> bool:
    """Whether the task's head can be had in closed form.

    Args:
        bench: its task decides.

    Returns:
        Whether it can.
    """
    return bool(bench.rows.task.closed_form)


def form(bench: Bench) -> Form:
    """How the head of the task follows from sums.

    Args:
        bench: its task is one that `wanted` is true of.

    Returns:
        What is summed, and the head that sums give.
    """
    found = form_of(bench.rows.task)
    assert found is not None
    return found


def computed(bench: Bench) -> bool:
    """Whether the head before round 1 is to be computed.

    Args:
        bench: its task and head.start decide.

    Returns:
        Whether head.start is not `zero` and the task's head can be had in closed form.
    """
    return bench.config.head.start != "zero" and wanted(bench)


def asked(bench: Bench) -> bool:
    """Whether clients are asked for the statistics that the head before round 1 follows from.

    Args:
        bench: its task and head.start decide.

    Returns:
        Whether head.start is `statistics` and the task's head can be had so.
    """
    return bench.config.head.start == "statistics" and wanted(bench)


def split(bench: Bench) -> tuple[Encoded, Encoded]:
    """The server's validation rows in two: to fit heads with, and to judge by.

    The latter no candidate has seen. Which rows these are is drawn from the run's seed.

    Args:
        bench: its validation rows are shared out.

    Returns:
        At most half of the rows (rounded up) and at most plug.rows of them to fit heads with, and
        all others to judge by. Both may be empty.
    """
    rows, order = bench.rows.validation, _order(bench)
    count = min(bench.config.plug.rows, (len(rows) + 1) // 2)
    return rows.select(order[:count]), rows.select(order[count:])


def fitting(bench: Bench) -> Encoded:
    """Both parts of :func:`split` together: for what is fitted once the choice is made.

    Args:
        bench: the server's rows.

    Returns:
        At most twice plug.rows of the validation rows.
    """
    return bench.rows.validation.select(_order(bench)[: 2 * bench.config.plug.rows])


def _order(bench: Bench) -> np.ndarray:
    """The order in which the validation rows are shared out, always the same in a run."""
    stream = numpy_stream(bench.config.run.seed, "plug-rows")
    return stream.permutation(len(bench.rows.validation))


def read(bench: Bench, model: torch.nn.Module, rows: Encoded) -> tuple[Tensor, Tensor]:
    """Features and labels of some rows.

    Args:
        bench: says how many rows are read at once, and how features are projected.
        model: FM or proxy, with the adapter plugged in.
        rows: labelled rows.

    Returns:
        Features float64 [N, D], projected as the clients' are, and answers [N, ...]; [0, 1] and
        [0] where there are no rows.
    """
    if not len(rows):
        return torch.zeros(0, 1, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    size, task = bench.config.run.eval_batch_size, bench.rows.task
    found, labels = labelled_features(model, rows, size, task)
    turn = projected(bench, found.shape[1])
    return (found if turn is None else found @ turn), labels


def projected(bench: Bench, width: int) -> Tensor | None:
    """The map that takes features to as many as clients sum over.

    Args:
        bench: its seed decides the map, head.max-features how many features it leaves.
        width: D, the features of a row.

    Returns:
        float64 [D, head.max-features]; None where features stay as they are.
    """
    config = bench.config
    return projection(width, config.head.max_features, config.run.seed)


@dataclass(frozen=True)
class Gathered:
    """The class statistics of the clients.

    Attributes:
        sums: by the width of the sub-FM (empty where there is one) the sum over all good replies,
            without those that head.guard leaves out.
        want: what was asked for.
        left_out: who is left out.
        judging: gives a proxy's features of the rows that heads are fitted with, and their
            answers, at the adapter that the statistics are of.
    """

    sums: dict[str, Sums]
    want: ExpectedStatistics
    left_out: tuple[str, ...]
    judging: Callable[[torch.nn.Module], tuple[Tensor, Tensor]]


def gather(bench: Bench, strategy: Strategy, state: State) -> Gathered:
    """The class statistics of all connected clients' rows, at the adapter of `state`.

    Args:
        bench: both models get the adapter; the server's rows say how long a feature vector can be.
        strategy: the clients, who are asked.
        state: has the adapter; what clients now have is noted in it.

    Returns:
        The statistics.

    Raises:
        RunError: too few clients sent any.
    """
    models, config = bench.models, bench.config
    models.plug(state.adapter)
    width = last_linear(models.proxy).in_features
    # Unlabelled rows of the server say how long a feature vector of this sub-FM can be.
    own = bench.rows.validation if len(bench.rows.data.validation) else None
    served = (
        batches(own, config.run.eval_batch_size, None) if own is not None else bench.rows.probe()
    )
    seen = features(models.proxy, served, bench.rows.task)
    longest = _ROOM * float(seen.norm(dim=1).max())
    want = ExpectedStatistics(
        round=state.round,
        digest=state.digest,
        form=form(bench),
        width=min(width, config.head.max_features),
        longest=longest,
        most=config.data.max_length,
        label=_ROOM * _farthest(bench) if config.privacy.secure else 0.0,
    )
    judging = cache(partial(_judging, bench))  # the guard and the head ask for the same
    guard = guard_of(bench, strategy.events, state.round, form(bench), judging)
    out: list[str] = []

    def noted(parts: Mapping[str, Mapping[str, Sums]]) -> list[str]:
        assert guard is not None
        out[:] = guard(parts)
        return out

    sums = strategy.gather(state, want, noted if guard else None)
    return Gathered(sums, want, tuple(out), judging)


def _judging(bench: Bench, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Features and answers of the rows that heads are fitted with."""
    return read(bench, model, split(bench)[0])


def _farthest(bench: Bench) -> float:
    """How far from zero a number to be learned is in the server's labelled rows; 0 without any."""
    if not len(bench.rows.data.validation):
        return 0.0
    served = batches(bench.rows.validation, bench.config.run.eval_batch_size, None)
    return float(answers(served, bench.rows.task).double().abs().max())


def together(bench: Bench, found: Mapping[str, Sums], target: torch.nn.Module) -> Sums:
    """Statistics of several widths as those of one model's features.

    The features of each width are taken to the model's by a map of its own, fitted on rows that the
    server has, labels or not.

    Args:
        bench: all models carry the adapter that the statistics are of.
        found: statistics by width, at least one.
        target: the proxy or the FM.

    Returns:
        Their sum, in the order of the widths. Statistics of the model itself stay as they are.
    """
    every: list[Sums] = []
    there: Tensor | None = None
    own, task = bench.models.fm is target, bench.rows.task
    for w in bench.models.widths:
        if w.name not in found:
            continue
        if w.proxy is target or (own and w.plan.is_full):
            every.append(found[w.name])
            continue
        rows = split(bench)[0]
        if not len(rows):
            rows = bench.rows.public_rows(bench.config.plug.rows, "widths")
        served = list(batches(rows, bench.config.run.eval_batch_size, None))
        here = features(w.proxy, served, task)
        turn = projected(bench, here.shape[1])
        there = features(target, served, task) if there is None else there
        x, y = (here, there) if turn is None else (here @ turn, there @ turn)
        way = mapped_to(x, y, bench.config.plug.ridge)
        every.append(form(bench).taken(found[w.name], way, x, y))
    return add(every)


def best(
    bench: Bench, strategy: Strategy, state: State, got: Gathered, found: Sums
) -> descent.Descent:
    """The proxy's head that statistics give, as it suits the server's labelled rows best.

    It is shrunk and scaled, and tuned further by clients' slopes where head.descent says so.

    Args:
        bench: its validation rows kept for fitting decide, where there are any.
        strategy: the clients, who are asked for slopes if for anything.
        state: at the adapter that the statistics are of.
        got: the statistics as they came.
        found: their sum, of the features of the proxy.

    Returns:
        The head over the features as clients sum them, and how it was found.
    """
    rows, labels = got.judging(bench.models.proxy)
    head = fit(bench, found, rows, labels)
    return descent.tuned(
        bench, strategy, state, form(bench), got.want, got.left_out, found, head, rows, labels
    )


def fit(bench: Bench, found: Sums, rows: Tensor, labels: Tensor | None) -> Head:
    """The head of some statistics, judged by labelled rows, if any.

    Args:
        bench: its head.shrinkage is used where it is above 0.
        found: statistics of the features.
        rows: float64 [N, D], features of the rows to judge by.
        labels: their answers [N, ...]; None, or N = 0, where no row judges.

    Returns:
        The head over the features as clients sum them.
    """
    fixed = bench.config.head.shrinkage or None
    if labels is None:
        rows, labels = rows[:0], torch.zeros(0)
    return form(bench).fit(found, fixed, rows, labels)


@torch.no_grad()
def write(bench: Bench, head: Head, model: torch.nn.Module) -> None:
    """Put a head on a model, in place.

    Args:
        bench: says how features are projected.
        head: over the features as clients sum them; it is turned back to those of the model.
        model: FM or proxy.
    """
    layer = last_linear(model)
    turn = projected(bench, layer.in_features)
    weight = head.weight if layer.bias is not None else head.weight + head.bias[:, None] * head.one
    weight = weight if turn is None else weight @ turn.T
    layer.weight.copy_(weight.to(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(head.bias.to(layer.bias))


def start(bench: Bench, strategy: Strategy, state: State, events: Events) -> None:
    """Set the head before round 1: from the clients' statistics, or from the server's own rows.

    Args:
        bench: both models get the adapter with the head; head.start decides.
        strategy: the clients, who are asked for statistics if for anything.
        state: before round 1; its adapter gets the head.
        events: where what came of it is noted.

    Raises:
        RunError: too few clients sent any.
    """
    began = time.perf_counter()
    proxy = bench.models.proxy
    if asked(bench):
        got = gather(bench, strategy, state)
        found = together(bench, got.sums, proxy)
        down = best(bench, strategy, state, got, found)
    else:
        bench.models.plug(state.adapter)
        found = form(bench).of(*read(bench, proxy, split(bench)[0]))
        # The rows that it is fitted to would choose no shrinkage at all.
        head = fit(bench, found, torch.zeros(0, 1, dtype=torch.float64), None)
        down = descent.Descent(head)
    state.adapter = _with(bench, down.head, state.adapter)
    _emit(events, state.round, found, down, None, True, began)


def again(
    bench: Bench, strategy: Strategy, state: State, events: Events, force: bool = False
) -> dict[str, Sums] | None:
    """Take the statistics once more, of the tuned features, and use the head they give.

    With `head.end = better` it is used only where the server's unseen rows prefer it.

    Args:
        bench: models and rows.
        strategy: who is asked.
        state: its adapter gets the head.
        events: where what came of it is noted.
        force: gather them also where only the plug-in needs them.

    Returns:
        The statistics by width, at the adapter without regard to its head; None where nobody wants
        them.

    Raises:
        RunError: too few clients sent any.
    """
    mode = bench.config.head.end
    if not wanted(bench) or (mode == "trained" and not force):
        return None
    began = time.perf_counter()
    got = gather(bench, strategy, state)
    if mode == "trained":
        return got.sums
    found = together(bench, got.sums, bench.models.proxy)
    down = best(bench, strategy, state, got, found)
    merits = None
    taken = True
    if mode == "better":
        judge = split(bench)[1]
        if not len(judge):
            return got.sums
        tuned, _ = merit(bench, bench.models.proxy, judge)
        other = _with(bench, down.head, state.adapter)
        bench.models.plug(other)
        merits = (tuned, merit(bench, bench.models.proxy, judge)[0])
        taken = merits[1] > merits[0]
    if taken:
        state.adapter = _with(bench, down.head, state.adapter)
    bench.models.plug(state.adapter)
    _emit(events, state.round, found, down, merits, taken, began)
    return got.sums


def merit(bench: Bench, model: torch.nn.Module, rows: Encoded) -> tuple[float, int]:
    """The task's merit of a model on labelled rows (rows right).

    Args:
        bench: its task judges.
        model: FM or proxy, with the head to judge.
        rows: at least one labelled row.

    Returns:
        How many of the rows it labels right, or whatever the task's merit is, and over how many
        that adds up.
    """
    size, task = bench.config.run.eval_batch_size, bench.rows.task
    read_rows, labels = labelled_features(model, rows, size, task)
    layer = last_linear(model)
    scores = read_rows @ layer.weight.detach().to(read_rows).T
    if layer.bias is not None:
        scores = scores + layer.bias.detach().to(read_rows)
    return task.merit(scores, labels), len(labels)


def _with(bench: Bench, head: Head, adapter: Tensors) -> Tensors:
    """An adapter with this head; it stays plugged in."""
    models = bench.models
    models.plug(adapter)
    write(bench, head, models.proxy)
    made = adapters.read(models.proxy, models.plan)
    models.plug(made)
    return made


def _emit(
    events: Events,
    round: int,
    found: Sums,
    down: descent.Descent,
    merits: tuple[float, float] | None,
    taken: bool,
    began: float,
) -> None:
    (before, after), head = merits or (None, None), down.head
    events.emit(ev.HeadSet(
        round=round, rows=found.rows, classes=found.groups,
        shrinkage=head.shrinkage, scale=head.scale, loss=head.loss,
        right_before=before, right_after=after, taken=taken,
        exchanges=down.exchanges, descent=down.taken,
        seconds=time.perf_counter() - began,
    ))  # fmt: skip
