"""Aligning the proxy with the FM: layer-level before FL, neuron-level between rounds.

Both minimise the hidden-state error of the compressed blocks on public data (paper eqs. 3-6);
the layer-level loss adds the error of the products W2 W1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.align.blocks import moving_parts
from fedpft_core.align.losses import Objective, hidden_objective, products, weight_error
from fedpft_core.config import DistillConfig
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.families import FFN, family_of
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.model.precision import Masters
from fedpft_core.seeds import torch_stream

Progress = Callable[[int, int, float], None]


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
    fixed = fixed_neurons(ffns, chosen)
    with torch.no_grad():
        target = {b: products(f) for b, f in teacher_ffns(teacher, plan).items()} if alpha else {}
    noise = AdapterNoise(teacher, student, plan, cfg.adapter_noise, noise_seed)
    error = objective or hidden_objective(teacher, student, plan)
    params = list(moving.values())
    masters = Masters(params)
    optimiser = torch.optim.AdamW(masters.params, lr=lr, weight_decay=cfg.weight_decay, fused=True)
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
                masters.take_gradients()
                nn.utils.clip_grad_norm_(masters.params, cfg.clip)
                for group in optimiser.param_groups:
                    group["lr"] = lr * warmup_then_linear(step, steps, cfg.warmup_share)
                optimiser.step()
                masters.give_back()
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


def teacher_ffns(teacher: nn.Module, plan: Plan) -> dict[int, FFN]:
    """Views of the FM's FFNs in the blocks that a plan prunes.

    Args:
        teacher: the FM.
        plan: of the proxy.

    Returns:
        By FM block.
    """
    ffns = family_of(plan.model_type).ffns(teacher)
    return {b: ffns[b] for b in plan.pruned}


def fixed_neurons(
    ffns: Mapping[int, FFN], chosen: Mapping[int, Tensor] | None
) -> dict[tuple[int, str], tuple[Tensor, int, Tensor]]:
    """What must not move, to be put back after each step.

    Args:
        ffns: of the proxy, by FM block.
        chosen: positions of the neurons that move, by FM block; None for all.

    Returns:
        By block and part: values, axis and positions of the neurons that stay.
    """
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


class AdapterNoise:
    """Random LoRA factors on teacher and student alike, around the adapter they carry.

    Args:
        teacher: the FM with the adapter.
        student: a proxy with the same adapter.
        plan: its plan.
        size: largest std of the noise; 0 = none.
        seed: of the noise. Several students of one teacher with equal seeds get the same.
    """

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
        """Put other noise on both."""
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
        """Put the adapter back as it was."""
        if self.size:
            for (t, s), start in zip(self.pairs, self.start, strict=True):
                t.copy_(start)
                s.copy_(start)
