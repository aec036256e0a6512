"""The sub-FMs of the other widths: distilled, re-aligned and measured beside the widest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedpft_core.align import method as alignment
from fedpft_core.align.joint import Smaller
from fedpft_core.align.losses import output_error
from fedpft_core.errors import UserError
from fedpft_core.model.families import family_of
from fedpft_core.proxy import cost
from fedpft_core.proxy.nested import positions
from fedpft_core.proxy.patch import make_patch
from fedpft_core.seeds import derive
from fedpft_core.train import agreement as measure
from fedpft_core.train.evaluate import evaluate
from server_app.bench import Bench
from server_app.models import Width
from server_app.rounds.matching import needs
from server_app.rounds.widths import share_of
from server_app.run import schema as ev
from server_app.state import State


def pruned(bench: Bench) -> tuple[Width, ...]:
    """The other widths that are no FM, narrowest first.

    Args:
        bench: its models.

    Returns:
        Those that alignment is about; none where there is one sub-FM.
    """
    return tuple(w for w in bench.models.others if not w.plan.is_full)


def shared(bench: Bench) -> bool:
    """Whether the widths share their weights.

    Args:
        bench: its distill.widths decides.

    Returns:
        False also where there are no others.
    """
    return bool(pruned(bench)) and bench.config.distill.widths == "joint"


def smaller(bench: Bench) -> list[Smaller]:
    """The narrower proxies, for an alignment of all of them.

    Args:
        bench: its models.

    Returns:
        Them and their plans, narrowest first.
    """
    return [Smaller(w.proxy, w.plan) for w in pruned(bench)]


def distil_apart(bench: Bench, job: alignment.Job) -> None:
    """Distil each of the other widths alone, where they do not share their weights; report all.

    Args:
        bench: its other proxies are changed in place.
        job: the distillation of the widest.
    """
    for w in pruned(bench):
        seconds = 0.0
        if not shared(bench):
            own = replace(job, student=w.proxy, plan=w.plan)
            seconds = alignment.run(bench.config.distill.method, own)[2]
        found = output_error(bench.models.fm, w.proxy, w.plan, bench.rows.probe())
        bench.events.emit(ev.WidthDistilled(width=w.name, output_error=found, seconds=seconds))


def realign(
    bench: Bench, state: State, round: int, job: alignment.Job, chosen: Mapping[int, Tensor]
) -> None:
    """Bring the other widths after an alignment of the widest; extends each by a patch.

    Where weights are shared the others have moved with it, in the same neurons. Otherwise each is
    aligned alone, all of its neurons.

    Args:
        bench: its other proxies; the widest has its aligned weights as clients decode them.
        state: its other sub-FMs get the patches.
        round: the round just done.
        job: the alignment of the widest.
        chosen: the neurons of the widest that have moved, by FM block.
    """
    config = bench.config
    for w in pruned(bench):
        version = state.others[w.name]
        if shared(bench):
            at = positions(bench.models.plan, w.plan)
            moved = {b: _among(at[b], chosen.get(b)) for b in w.plan.pruned}
        else:
            moved = {b: torch.arange(len(w.plan.blocks[b].kept)) for b in w.plan.pruned}
            own = replace(
                job, student=w.proxy, plan=w.plan, chosen=moved,
                seed=derive(config.run.seed, "align", round, w.name),
            )  # fmt: skip
            alignment.run(config.align.method, own, "align.method")
        patch, version.package = make_patch(
            w.proxy,
            w.plan,
            moved,
            version.package,
            version.digests,
            config.wire.patch_format,
        )
        version.digest = patch.target
        version.patches.append(patch)


def _among(at: Tensor, moved: Tensor | None) -> Tensor:
    """Places in a narrower block of those neurons of the wider one that have moved."""
    if moved is None:  # the block is whole there, and never moves
        return torch.zeros(0, dtype=torch.int64)
    return torch.isin(at, moved.cpu()).nonzero().flatten()


def score(bench: Bench, round: int) -> None:
    """Score the sub-FMs of the other widths at the adapter they carry.

    Args:
        bench: the scores are of the rows of run.eval-split.
        round: rounds done.
    """
    rows, size = bench.rows, bench.config.run.eval_batch_size
    for w in bench.models.others:
        found = evaluate(w.proxy, rows.task, rows.scored, size)
        bench.events.emit(ev.WidthScored(
            round=round, width=w.name, split=bench.config.run.eval_split, **found.fields(),
        ))  # fmt: skip


def agreement_of(bench: Bench) -> Callable[[State], dict[str, float]] | None:
    """How the server measures how well each width stands for the FM.

    Args:
        bench: models and rows.

    Returns:
        A function from a state to the cosine of the LoRA gradients by width, on the server's rows;
        None where nobody asks for it.

    Raises:
        UserError: it is asked for, and there are no validation rows.
    """
    config = bench.config
    if not bench.models.others or config.federation.width_weighting != "agreement":
        return None
    if not len(bench.rows.gradient):
        raise UserError(
            "federation.width-weighting = agreement needs validation rows: set data.validation or "
            "data.validation-share, and run.gradient-rows above 0."
        )

    def found(state: State) -> dict[str, float]:
        bench.models.plug(state.adapter)
        made = {}
        for w in bench.models.widths:
            if w.plan.is_full:
                made[w.name] = 1.0
                continue
            figures = measure.gradient_agreement(
                bench.models.fm, w.proxy, w.plan, bench.rows.task, bench.rows.gradient,
                config.train.batch_size, b_only=state.round == 0,
            )  # fmt: skip
            cosine = figures["cosine"]
            bench.events.emit(ev.WidthAgreement(
                round=state.round, width=w.name, cosine=cosine, relative_l2=figures["relative_l2"],
            ))  # fmt: skip
            made[w.name] = cosine if cosine == cosine else 0.0
        return made

    return found


def announce(bench: Bench) -> None:
    """Say in the log which widths there are, and what each takes.

    Args:
        bench: with the proxies built.
    """
    if not bench.models.others:
        return
    config = bench.config
    packages = {bench.models.width: bench.package(), **bench.others()}
    sizes: list[ev.WidthSize] = []
    for w in bench.models.widths:
        package, memory = needs(packages[w.name], config.train.batch_size)
        family = family_of(w.plan.model_type)
        sizes.append({
            "width": w.name, "share": share_of(w.plan),
            "parameters": sum(t.numel() for t in packages[w.name].weights.values()),
            "package": package, "memory": memory,
            "step_flops": cost.step_flops(family, w.proxy, config.lora.rank),
        })  # fmt: skip
    bench.events.emit(ev.Widths(sizes=sizes, proxy=bench.models.width))


__all__ = [
    "agreement_of", "announce", "distil_apart", "pruned", "realign", "score", "shared", "smaller",
]  # fmt: skip
