"""Scoring the proxy and the FM with the adapter now plugged in."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from fedpft_core.adapter import lora as adapters
from fedpft_core.disk import whole
from fedpft_core.model.families import base_model, family_of
from fedpft_core.task import Painter, Score, Writer
from fedpft_core.task.painting import prompts_of, side_by_side
from fedpft_core.train.evaluate import evaluate
from server_app.bench import Bench
from server_app.phases import reference, widths
from server_app.phases.plug import refit, refits
from server_app.phases.reporting import progress
from server_app.run import schema as ev
from server_app.state import State

_SHOWN = 1000  # characters of a text that are kept for the report


def score(bench: Bench, round: int, which: str) -> Score:
    """Evaluate the `proxy` or the FM with the adapter now plugged in.

    The FM is called `fm`, or `fm-as-trained` where its head is still to be refitted.

    Args:
        bench: models, the rows of run.eval-split, and the log.
        round: rounds done.
        which: `proxy`, `fm` or `fm-as-trained`.

    Returns:
        The score, which has been emitted.
    """
    result = _written(bench, round, which, measure(bench, round, which))
    _painted(bench, round, which)
    _emit(bench, round, which, result)
    if which == "proxy":
        widths.score(bench, round)
    return result


def measure(bench: Bench, round: int, which: str) -> Score:
    """Evaluate the `proxy` or the FM, as :func:`score` does, without event and samples.

    Args:
        bench: models, the rows of run.eval-split, and the log, which gets the progress.
        round: rounds done, or under way.
        which: `proxy`, `fm` or `fm-as-trained`.

    Returns:
        The score.
    """
    model = bench.models.proxy if which == "proxy" else bench.models.fm
    rows = bench.rows.scored
    report = progress(bench.events, "evaluate", "rows", round=round, model=which)
    return evaluate(
        model, bench.rows.task, rows, bench.config.run.eval_batch_size,
        lambda n: report(n, len(rows)),
    )  # fmt: skip


def _written(bench: Bench, round: int, which: str, result: Score) -> Score:
    """The score with what the model's writing adds to it, where the task is to write."""
    task, config = bench.rows.task, bench.config
    rows = bench.rows.samples
    if not isinstance(task, Writer) or not len(rows):
        return result
    start = time.perf_counter()
    model = bench.models.proxy if which == "proxy" else bench.models.fm
    # What is written must fit behind the prompt.
    shape = family_of(bench.models.plan.model_type).shape(base_model(model).config)
    written = min(config.run.sample_tokens, shape.positions - 1)
    longest = min(config.data.max_length, shape.positions - written)
    found = task.write(
        model, rows, bench.rows.processor, longest, written, config.run.eval_batch_size
    )
    seconds = time.perf_counter() - start
    bench.events.emit(ev.Samples(
        round=round, model=which, seconds=seconds,
        samples=[
            ev.Sample(
                prompt=s.prompt[-_SHOWN:], reference=s.reference[:_SHOWN],
                response=s.response[:_SHOWN],
            )
            for s in found
        ],
    ))  # fmt: skip
    return replace(
        result, more={**result.more, **task.judge(found)}, seconds=result.seconds + seconds
    )


def _painted(bench: Bench, round: int, which: str) -> None:
    """Images of the model's making, as a file of the run, where the task is to make some."""
    task, config, rows = bench.rows.task, bench.config, bench.rows.samples
    if not isinstance(task, Painter) or not len(rows):
        return
    start = time.perf_counter()
    model = bench.models.proxy if which == "proxy" else bench.models.fm
    made = task.paint(
        model, rows, bench.rows.processor, config.run.sample_steps, config.run.eval_batch_size
    )
    file = f"pictures/round-{round}-{which}.png"
    path = Path(config.run.dir) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write(path, side_by_side(made))
    bench.events.emit(ev.Pictures(
        round=round, model=which, prompts=[prompt[-_SHOWN:] for prompt in prompts_of(rows)],
        file=file, seconds=time.perf_counter() - start,
    ))  # fmt: skip


def _emit(bench: Bench, round: int, which: str, result: Score) -> None:
    bench.events.emit(ev.Evaluation(
        round=round, model=which, split=bench.config.run.eval_split,
        **result.fields(), seconds=result.seconds,
    ))  # fmt: skip
    reference.labels_given(bench, round, which, result)


def score_all(bench: Bench, round: int) -> tuple[Score, Score, float]:
    """Evaluate the proxy, the FM with the head as trained, and the product.

    The product is what the FM is afterwards.

    Args:
        bench: models with the adapter plugged in.
        round: rounds done.

    Returns:
        The first two scores and the seconds of it all.
    """
    start = time.perf_counter()
    proxy = score(bench, round, "proxy")
    if not refits(bench):
        trained = score(bench, round, "fm")
    else:
        trained = score(bench, round, "fm-as-trained")
        if refit(bench, round):
            score(bench, round, "fm")
        else:
            # The product has the head as trained, which has its score.
            _emit(bench, round, "fm", replace(trained, seconds=0.0))
    return proxy, trained, time.perf_counter() - start


def score_validation(bench: Bench, round: int) -> None:
    """Score proxy and product on the server's validation rows, on which settings are chosen.

    Nothing is done where there are none, or where they are what run.eval-split scores anyway.

    Args:
        bench: models as they are to be scored.
        round: rounds done.
    """
    if bench.config.run.eval_split == "validation" or not len(bench.rows.data.validation):
        return
    for which, model in (("proxy", bench.models.proxy), ("fm", bench.models.fm)):
        size = bench.config.run.eval_batch_size
        result = evaluate(model, bench.rows.task, bench.rows.validation, size)
        bench.events.emit(ev.Validation(
            round=round, model=which,
            **result.fields(), seconds=result.seconds,
        ))  # fmt: skip


def score_final(bench: Bench, state: State) -> None:
    """Evaluate the proxy, the FM with the adapter as clients left it, and the product.

    The product is what the FM is now; it is that again afterwards.

    Args:
        bench: the FM is the product; the proxy gets the adapter of `state`.
        state: after the last round.
    """
    models = bench.models
    product = adapters.read(models.fm)
    models.plug(state.adapter)
    score(bench, state.round, "proxy")
    if not models.plan.is_full:
        score(bench, state.round, "fm-as-trained")
    adapters.load(models.fm, product)
    score(bench, state.round, "fm")
