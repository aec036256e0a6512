"""Aligning the proxy with the FM: layer-level before FL, neuron-level between rounds.

Both minimise the hidden-state error of the compressed blocks on public data (paper eqs. 3-6);
the layer-level loss adds the error of the products W2 W1.

Shape letters: B rows, L positions, D model width, F neurons of the FM, K neurons kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.config import DistillConfig
from fedpft_core.model.batch import at_real, by_row, real_positions
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.families import FFN, family_of
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.model.taps import keep, run_to
from fedpft_core.seeds import torch_stream

Progress = Callable[[int, int, float], None]
Objective = Callable[[Batch], Tensor]


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


def _both(
    teacher: nn.Module, student: nn.Module, plan: Plan, batch: Batch
) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    """What each trained block should put out, what it does, and the mask of real positions."""
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


def hidden_errors(
    teacher: Mapping[int, Tensor], student: Mapping[int, Tensor], real_BL: Tensor
) -> dict[int, Tensor]:
    """mean[((h_T − h_S) / rms(h_T))²] per block over real positions, so that blocks weigh alike.

    Source: FedPFT, eq. (3), here divided by the teacher's mean square.

    Args:
        teacher: the outputs wanted, [B, L, D] by FM block index.
        student: the outputs there are, of the same blocks.
        real_BL: bool [B, L], True where there is no padding.

    Returns:
        A scalar for each block, with gradients where the student's outputs have them.
    """
    out = {}
    for block, h_T in teacher.items():
        t, s = at_real(h_T, real_BL), at_real(student[block], real_BL)
        out[block] = (t - s).square().mean() / t.square().mean()
    return out


def products(ffn: FFN) -> list[Tensor]:
    """W2 W1 for every in-projection; biases never enter.

    Source: FedPFT, eq. (4).

    Args:
        ffn: of FM or proxy.

    Returns:
        One [D, D] for each in-projection: of a gated FFN two (gate, up), else one.
    """
    return [ffn.out.weight @ linear.weight for linear in ffn.ins]


def weight_error(ffn: FFN, teacher: list[Tensor]) -> Tensor:
    """mean[(P_T − P_S)²] / mean[P_T²], averaged over the in-projections.

    Source: FedPFT, eq. (4), here divided by the teacher's mean square.

    Args:
        ffn: the student's.
        teacher: the :func:`products` of the FM's FFN in the same block.

    Returns:
        A scalar with gradients for the student's weights.
    """
    terms = [
        (t - s).square().mean() / t.square().mean()
        for t, s in zip(teacher, products(ffn), strict=True)
    ]
    return torch.stack(terms).mean()


def warmup_then_linear(step: int, steps: int, warmup_share: float) -> float:
    """Rate of step 0..steps−1 as a share of the peak: linear up, then linear down, never 0.

    Args:
        step: counted from 0.
        steps: of the whole alignment.
        warmup_share: share of the steps with rising rate, in [0, 1].

    Returns:
        A share above 0 and at most 1.
    """
    warmup = math.ceil(warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


@torch.inference_mode()
def output_error(
    teacher: nn.Module, student: nn.Module, plan: Plan, data: Iterable[Batch]
) -> dict[int, float]:
    """Hidden-state error per trained block, averaged over batches.

    Args:
        teacher: the FM.
        student: the proxy, at the same adapter if the models carry one.
        plan: its plan.
        data: batches, which are taken to the student's device.

    Returns:
        The error by FM block index, as a share of the teacher's mean square; 0 for no batches.
    """
    total: dict[int, float] = dict.fromkeys(targets(plan), 0.0)
    n = 0
    device = device_of(student)
    for batch in data:
        h_T, h_S, real = _both(teacher, student, plan, to_device(batch, device))
        for block, e in hidden_errors(h_T, h_S, real).items():
            total[block] += float(e)
        n += 1
    return {block: e / max(n, 1) for block, e in total.items()}


def hidden_objective(teacher: nn.Module, student: nn.Module, plan: Plan) -> Objective:
    """The mean hidden-state error of the trained blocks on a batch.

    Source: FedPFT, eq. (3).

    Args:
        teacher: the FM, which is run without gradients.
        student: the proxy.
        plan: its plan.

    Returns:
        A function from a batch on the models' device to a scalar.
    """

    def loss(batch: Batch) -> Tensor:
        h_T, h_S, real = _both(teacher, student, plan, batch)
        return torch.stack(list(hidden_errors(h_T, h_S, real).values())).mean()

    return loss


@contextmanager
def only_trained(student: nn.Module, params: Iterable[Tensor]) -> Iterator[None]:
    """For the duration these parameters require gradients and no others.

    The adapter's do not either: with those the graph would reach down to the first block.

    Args:
        student: the model whose parameters stop requiring gradients.
        params: those of its parameters that are trained.

    Yields:
        Nothing. After the block the gradients of `params` are gone, and what required gradients
        before it does so again.
    """
    chosen = list(params)
    held = [p for p in student.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    for t in chosen:
        t.requires_grad_(True)
    try:
        yield
    finally:
        for t in chosen:
            t.requires_grad_(False)
            t.grad = None
        for p in held:
            p.requires_grad_(True)


def distil(
    teacher: nn.Module,
    student: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    cfg: DistillConfig,
    *,
    steps: int,
    lr: float,
    alpha: float,
    chosen: Mapping[int, Tensor] | None = None,
    noise_seed: int = 0,
    on_step: Progress | None = None,
    objective: Objective | None = None,
) -> tuple[float, float, float]:
    """Align `student` with `teacher` by AdamW.

    Layer-level (`chosen` None): all neurons of the pruned blocks move. Neuron-level: those of
    `chosen` move, all others end bit-unchanged. Out-projection bias and post-norm LayerNorm always
    move. Whatever adapter the two models carry stays; both run in eval mode. With
    `cfg.adapter_noise` each step puts the same random LoRA factors on both, so that they agree
    around the adapter and not only at it. Layer-drop proxies have neither neurons to choose nor
    products to match.

    Source: FedPFT, eq. (5) layer-level, eq. (6) neuron-level.

    Args:
        teacher: the FM.
        student: the proxy, changed in place.
        plan: its plan.
        batches: one for each step; it may hold fewer or more than `steps`.
        cfg: weight decay, warm-up, gradient clipping and adapter noise. Its steps, rate and alpha
            are not read: the arguments stand for them.
        steps: optimiser steps at most.
        lr: peak learning rate.
        alpha: weight of the weight-product term; 0 leaves it out.
        chosen: int64 positions of the neurons that move among those kept, for each pruned block;
            None for all.
        noise_seed: seed of the adapter noise.
        on_step: called as `on_step(step, steps, loss)` after each step, counted from 1.
        objective: the loss of a batch, to which the weight-product term is added; None for the
            hidden-state error.

    Returns:
        Loss of the first step, loss of the last (both NaN without any step), and seconds.

    Raises:
        ValueError: `chosen` is not for each pruned block and no other.
    """
    teacher.eval()
    student.eval()
    device = device_of(student)
    ffns = pruned_ffns(student, plan)
    if chosen is not None and set(chosen) != set(ffns):
        raise ValueError("neurons must be chosen for each pruned block and for no other")
    moving = moving_parts(student, plan)
    fixed = _fixed(ffns, chosen)
    with torch.no_grad():
        target = {b: products(f) for b, f in _teacher_ffns(teacher, plan).items()} if alpha else {}
    noise = _AdapterNoise(teacher, student, plan, cfg.adapter_noise, noise_seed)
    error = objective or hidden_objective(teacher, student, plan)
    params = list(moving.values())
    optimiser = torch.optim.AdamW(params, lr=lr, weight_decay=cfg.weight_decay, fused=True)
    start = time.perf_counter()
    first = last = math.nan
    try:
        with only_trained(student, params):
            for step, batch in enumerate(batches):
                if step == steps:
                    break
                batch = to_device(batch, device)
                noise.draw()
                loss = error(batch)
                if target:
                    terms = [weight_error(ffn, target[b]) for b, ffn in ffns.items()]
                    loss = loss + alpha * torch.stack(terms).mean()
                # An objective may have put the adapter in its graph: it gets no gradient.
                loss.backward(inputs=params)
                for key, (_, axis, index) in fixed.items():
                    grad = moving[key].grad
                    assert grad is not None
                    grad.index_fill_(axis, index, 0.0)
                nn.utils.clip_grad_norm_(params, cfg.clip)
                for group in optimiser.param_groups:
                    group["lr"] = lr * warmup_then_linear(step, steps, cfg.warmup_share)
                optimiser.step()
                # Weight decay touches what has no gradient too: put the fixed neurons back.
                with torch.no_grad():
                    for key, (value, axis, index) in fixed.items():
                        moving[key].index_copy_(axis, index, value)
                last = float(loss.detach())
                first = last if step == 0 else first
                optimiser.zero_grad(set_to_none=True)
                if on_step:
                    on_step(step + 1, steps, last)
    finally:
        noise.restore()
    return first, last, time.perf_counter() - start


def _teacher_ffns(teacher: nn.Module, plan: Plan) -> dict[int, FFN]:
    ffns = family_of(plan.model_type).ffns(teacher)
    return {b: ffns[b] for b in plan.pruned}


def _fixed(
    ffns: Mapping[int, FFN], chosen: Mapping[int, Tensor] | None
) -> dict[tuple[int, str], tuple[Tensor, int, Tensor]]:
    """Per moving parameter: values, axis and positions of the neurons that must not move."""
    if chosen is None:
        return {}
    out = {}
    for b, ffn in ffns.items():
        stay = torch.ones(ffn.neurons, dtype=torch.bool)
        stay[chosen[b]] = False
        index = stay.nonzero().flatten().to(ffn.out.weight.device)
        for part, p in ffn.parts().items():
            axis = FFN.neuron_axis(part)
            if axis is not None:
                out[b, part] = (p.detach().index_select(axis, index), axis, index)
    return out


class _AdapterNoise:
    """Random LoRA factors on teacher and student alike, around the adapter they carry."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, plan: Plan, size: float, seed: int
    ) -> None:
        self.size = size
        if not size:
            return
        self.stream = torch_stream(seed, "adapter-noise")
        t, s = adapters.parameters(teacher), adapters.parameters(student, plan)
        self.pairs = [(t[k], s[k]) for k in s if ".lora_" in k]
        self.start = [p.detach().clone() for p, _ in self.pairs]

    @torch.no_grad()
    def draw(self) -> None:
        if not self.size:
            return
        scale = self.size * float(torch.rand((), generator=self.stream))
        for (t, s), start in zip(self.pairs, self.start, strict=True):
            noise = torch.randn(start.shape, generator=self.stream).to(start.device)
            value = start + scale * noise
            t.copy_(value)
            s.copy_(value)

    @torch.no_grad()
    def restore(self) -> None:
        if self.size:
            for (t, s), start in zip(self.pairs, self.start, strict=True):
                t.copy_(start)
                s.copy_(start)


def apoz(inactive: Tensor, tokens: int) -> Tensor:
    """APoZ_j = Σ inactive / Σ tokens over a round's clients.

    Source: FedPFT, eq. (7).

    Args:
        inactive: tokens that left each neuron of a block inactive, int64 [K], over all clients.
        tokens: real tokens counted at that block, over all clients.

    Returns:
        Shares in [0, 1], float64 [K]; 0 where there were no tokens.
    """
    return inactive.double() / max(tokens, 1)
