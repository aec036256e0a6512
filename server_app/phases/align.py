"""Neuron-level distillation between rounds: the proxy is re-aligned (paper section 4.3)."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor

from fedpft_core.align import joint, selection
from fedpft_core.align import method as alignment
from fedpft_core.align.losses import output_error
from fedpft_core.config import Config
from fedpft_core.errors import UserError
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.narrow import follow
from fedpft_core.proxy.patch import make_patch
from fedpft_core.seeds import derive
from fedpft_core.train.evaluate import evaluate
from fedpft_core.train.inactivity import Counts, apoz
from server_app.bench import Bench
from server_app.owner import disclose
from server_app.phases import agree, widths
from server_app.phases.distil import check_finite
from server_app.phases.reporting import phase, progress
from server_app.run import schema as ev
from server_app.state import State


def due(config: Config, plan: Plan, round: int) -> bool:
    """Every t rounds, and not after the last, where nobody would train on the result.

    With align.lag nobody would after the last but one either.

    With a threshold that is when disagreement is measured.

    Source: FedPFT, section 4.3.

    Args:
        config: its align.interval is t; 0 = never.
        plan: of a plan without pruned blocks nothing can be aligned.
        round: the round just done, from 1.

    Returns:
        Whether an alignment is due after this round.
    """
    t, lag = config.align.interval, config.align.lag
    follows = round + lag < config.federation.rounds
    return t > 0 and round % t == 0 and follows and bool(plan.pruned)


def count_rule(bench: Bench, round: int) -> str:
    """How the clients of a round are to count inactive neurons.

    Args:
        bench: its configuration and plan.
        round: the round that is to be asked for.

    Returns:
        align.inactive where an alignment that looks at counts follows; empty = not at all.
    """
    a = bench.config.align
    count = due(bench.config, bench.models.plan, round)
    return a.inactive if count and selection.needs_counts(a.selection, a.proportion) else ""


def disagrees(bench: Bench, state: State, round: int) -> bool:
    """Whether proxy and FM disagree enough at the aggregated adapter to be re-aligned.

    With a threshold the figure that is held against it is emitted.

    Args:
        bench: where there is a threshold, both models get the aggregated adapter.
        state: has the aggregated adapter.
        round: the round just done.

    Returns:
        Whether the disagreement is above align.threshold, or not a number; True without one.

    Raises:
        UserError: when gradients are to be compared and there are no validation rows.
    """
    a, models = bench.config.align, bench.models
    if not a.threshold:
        return True
    models.plug(state.adapter)
    if a.disagreement == "output-error":
        errors = output_error(models.fm, models.proxy, models.plan, bench.rows.probe())
        found = sum(errors.values()) / len(errors)
    else:
        if not len(bench.rows.gradient):
            raise UserError(
                f"align.disagreement = {a.disagreement} needs validation rows: set "
                "data.validation or data.validation-share."
            )
        g = agree.agreement(bench, b_only=False)
        found = 1 - g["cosine"] if a.disagreement == "cosine" else g["relative_l2"]
    # Gradients of size 0 give NaN: nothing is known, so the safe answer is to align.
    above = not found <= a.threshold
    bench.events.emit(ev.AlignmentCheck(
        round=round, measure=a.disagreement, value=found,
        threshold=a.threshold, aligned=above,
    ))  # fmt: skip
    return above


def align(
    bench: Bench,
    state: State,
    round: int,
    counts: Counts | None,
    values: tuple[float, float] | None = None,
) -> None:
    """Align the proxy at the current adapter; extends `state` by a patch.

    Teacher and student both carry the aggregate adapter, which stays as it is.

    Source: FedPFT, section 4.3.

    Args:
        bench: FM, proxy and rows.
        state: the run's state after the round.
        round: the round just done.
        counts: the clients' inactivity counts, where the selection looks at them.
        values: the metric's, of proxy and FM at this adapter; with them the plug-in gap is recorded
            before and after (the FM's value stays).

    Raises:
        RunError: when the alignment diverges.
    """
    config, models = bench.config, bench.models
    lacking = selection.needs_counts(config.align.selection, config.align.proportion) and (
        counts is None or counts.inactive.keys() != set(models.plan.pruned)
    )
    if lacking:
        # With several widths a round's clients may all have the FM itself.
        bench.events.emit(ev.Warned(
            text=f"round {round}: no client has counted inactive neurons; nothing is re-aligned"
        ))  # fmt: skip
        return
    a, d = config.align, config.distill
    noise = d.adapter_noise if a.adapter_noise < 0 else a.adapter_noise
    with phase(bench.events, "align", round=round):
        start = time.perf_counter()
        models.plug(state.adapter)
        agree.record(bench, round, "before-align")
        chosen = _chosen(bench, round, counts)
        probe = list(bench.rows.probe())
        before = output_error(models.fm, models.proxy, models.plan, probe)
        job = alignment.Job(
            models.fm, models.proxy, models.plan,
            lambda n: bench.rows.public_batches(n, "align", round),
            replace(d, adapter_noise=noise),
            steps=a.steps, lr=a.lr, chosen=chosen,
            seed=derive(config.run.seed, "align", round), head_reads=bench.head_reads,
            on_step=progress(bench.events, "align", "steps", round=round),
        )  # fmt: skip
        if widths.shared(bench):
            smaller = widths.smaller(bench)
            first, last, _ = joint.run(a.method, job, smaller, "align.method")
        else:
            first, last, _ = alignment.run(a.method, job, "align.method")
        after = output_error(models.fm, models.proxy, models.plan, probe)
        check_finite(after, "align.lr")
        patch, package = make_patch(
            models.proxy, models.plan, chosen, state.package, state.digests,
            config.wire.patch_format,
        )  # fmt: skip
        state.package, state.digest = package, patch.target
        state.patches.append(patch)
        if widths.shared(bench):
            for w in widths.pruned(bench):
                follow(w.proxy, w.plan, models.proxy, models.plan)
        widths.realign(bench, state, round, job, chosen)
        disclose.note(bench, state)
        agree.record(bench, round, "after-align")
        gap_before = gap_after = None
        if values is not None:
            proxy, fm = values
            size = config.run.eval_batch_size
            gap_before = proxy - fm
            gap_after = evaluate(models.proxy, bench.rows.task, bench.rows.scored, size).value - fm
        bench.events.emit(ev.Alignment(
            round=round, neurons=sum(len(i) for i in chosen.values()),
            gap_before=gap_before, gap_after=gap_after, share=a.proportion,
            loss_before=first, loss_after=last,
            digest_from=patch.source, digest_to=patch.target,
            seconds=time.perf_counter() - start,
            blocks=[
                {"block": b, "error_before": before[b], "error_after": after[b]}
                for b in models.plan.pruned
            ],
        ))  # fmt: skip


def _chosen(bench: Bench, round: int, counts: Counts | None) -> dict[int, Tensor]:
    """The neurons that move, by FM block."""
    a, models = bench.config.align, bench.models
    inactive, tokens = (counts.inactive, counts.tokens) if counts else ({}, {})
    view = selection.View(
        {b: apoz(inactive[b], tokens[b]) for b in inactive},
        derive(bench.config.run.seed, "choose", round), models.fm, models.proxy, models.plan,
        lambda: bench.rows.public_batches(a.selection_batches, "choose", round),
    )  # fmt: skip
    return selection.choose(a.selection, view, a.proportion)
