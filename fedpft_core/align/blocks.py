"""What alignment sees of the two models: the blocks it trains, their outputs, their inner values.

Shape letters: B rows, L positions, D model width, F neurons of the FM, K neurons kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedpft_core.model.batch import by_row, real_positions
from fedpft_core.model.device import Batch
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.model.taps import keep, run_to


def targets(plan: Plan) -> dict[int, int]:
    """Which FM block's output each trained block of the proxy should have, by FM index.

    A pruned block stands for its own original. In layer-drop proxies the first and the last block
    stay as they are, as in offsite tuning; each kept block between them is trained to give what
    the next kept block gets in the FM, so it stands for the dropped ones after it too.

    Source: for pruned blocks FedPFT, eq. (3); for layer-drop proxies offsite tuning
    (arXiv:2302.04870), section 3.

    Args:
        plan: what the proxy keeps of each block.

    Returns:
        FM index of the trained block → FM index of the block whose output it should have; empty
        where the proxy leaves nothing to train.
    """
    if plan.pruned:
        return {b: b for b in plan.pruned}
    present = plan.present
    if len(present) == len(plan.blocks):
        return {}
    return {b: after - 1 for b, after in pairwise(present[1:])}


def moving_parts(student: nn.Module, plan: Plan) -> dict[tuple[int, str], Tensor]:
    """What alignment may move, by FM block and part.

    These are the FFN parts of pruned blocks (`FFN.parts`), or every weight of a layer-drop proxy's
    trained blocks but the adapter's.

    Args:
        student: the proxy, with or without adapter.
        plan: its plan.

    Returns:
        The live parameters, by FM block index and the part's name.
    """
    if plan.pruned:
        ffns = pruned_ffns(student, plan)
        return {(b, part): p for b, ffn in ffns.items() for part, p in ffn.parts().items()}
    blocks = family_of(plan.model_type).block_list(student)
    position = {fm: i for i, fm in enumerate(plan.present)}
    return {
        (b, name): p
        for b in targets(plan)
        for name, p in blocks[position[b]].named_parameters()
        if ".lora_" not in name
    }


def outputs(
    model: nn.Module,
    plan: Plan,
    batch: Batch,
    own_index: bool,
    wanted: Collection[int] | None = None,
) -> dict[int, Tensor]:
    """Outputs of the wanted blocks, by FM block index.

    Taken at the blocks, because `hidden_states[-1]` of some families is after the final norm;
    nothing after the last of them is run.

    Args:
        model: FM or proxy, run as it is: in its present mode, with gradients if they are on.
        plan: the plan that relates the two.
        batch: what the model reads, on its device.
        own_index: whether the model numbers its blocks for itself (a proxy) or as the FM does.
        wanted: FM indices of blocks that the model has; None for the pruned ones.

    Returns:
        Outputs [B, L, D], by FM block index.
    """
    blocks = family_of(plan.model_type).block_list(model)
    where = {fm: i for i, fm in enumerate(plan.present)} if own_index else None
    chosen = sorted(plan.pruned if wanted is None else wanted)
    return run_to(model, batch, {b: blocks[where[b] if where else b] for b in chosen})


def outputs_of_both(
    teacher: nn.Module, student: nn.Module, plan: Plan, batch: Batch
) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    """What each trained block should put out, what it does, and the mask of real positions.

    Args:
        teacher: the FM, which is run without gradients.
        student: the proxy, run as it is.
        plan: the plan that relates the two.
        batch: what the models read, on their device.

    Returns:
        Wanted and present outputs [B, L, D] by FM index of the trained block, and bool [B, L],
        False on padding.
    """
    pairs = targets(plan)
    with torch.no_grad():
        h_FM = outputs(teacher, plan, batch, own_index=False, wanted=sorted(pairs.values()))
    h_S = outputs(student, plan, batch, own_index=True, wanted=tuple(pairs))
    real = real_positions(batch, next(iter(h_FM.values())).shape[1])
    return {b: h_FM[fm] for b, fm in pairs.items()}, h_S, real


@dataclass(frozen=True)
class LocalView:
    """What one block's FFN works on in one forward pass.

    Attributes:
        x: the FFN's input [B, L, D].
        a: what enters its out-projection, [B, L, F]; [B, L, K] in a pruned block of the proxy.
        y: its output [B, L, D].
        total: the sum with the residual before the output norm [B, L, D]; the block's output where
            there is no such norm.
        out: the block's output [B, L, D].
    """

    x: Tensor
    a: Tensor
    y: Tensor
    total: Tensor
    out: Tensor


def local_views(
    model: nn.Module,
    plan: Plan,
    batch: Batch,
    own_index: bool = False,
    wanted: Collection[int] | None = None,
) -> tuple[dict[int, LocalView], Tensor]:
    """Views of the wanted blocks in a forward pass, and the mask of real positions.

    Nothing after the last of the blocks is run.

    Args:
        model: FM or proxy, run as it is.
        plan: the plan that relates the two.
        batch: what the model reads, on its device.
        own_index: whether the model numbers its blocks for itself (a proxy) or as the FM does.
        wanted: FM indices of blocks that the model has; None for the pruned ones.

    Returns:
        The views by FM block index, and the mask, bool [B, L], False on padding.
    """
    wanted = plan.pruned if wanted is None else wanted
    ffns = family_of(plan.model_type).ffns(model)
    position = {fm: i for i, fm in enumerate(plan.present)} if own_index else None
    chosen = {b: ffns[position[b] if position else b] for b in wanted}
    norms = {b: ffn.norm for b, ffn in chosen.items() if ffn.norm is not None}
    outs = {b: ffn.out for b, ffn in chosen.items()}
    with (
        keep({b: ffn.ins[0] for b, ffn in chosen.items()}, inputs=True) as x,
        keep(outs, inputs=True) as a,
        keep(outs) as y,
        keep(norms, inputs=True) as total,
    ):
        out = outputs(model, plan, batch, own_index, wanted)
    real = real_positions(batch, next(iter(out.values())).shape[1])
    views = {}
    for b in wanted:
        passed = {"x": x[b], "a": a[b], "y": y[b]}
        inside = {name: by_row(value, batch) for name, value in passed.items()}
        views[b] = LocalView(**inside, total=total.get(b, out[b]), out=out[b])
    return views, real
