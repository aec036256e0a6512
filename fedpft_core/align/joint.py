"""Aligning all widths of a nested sub-FM at once, on the weights that they share.

Each step trains the widest, the narrowest and one width between them, drawn anew, and adds up their
gradients where the neurons are the same (the sandwich rule of universally slimmable networks,
arXiv:1903.05134, without its distillation from the widest: here every width has the FM for a
teacher).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedpft_core import registry
from fedpft_core.align.blocks import moving_parts
from fedpft_core.align.distill import (
    AdapterNoise,
    fixed_neurons,
    only_trained,
    teacher_ffns,
    warmup_then_linear,
)
from fedpft_core.align.losses import Objective, products, weight_error
from fedpft_core.align.method import Job, parts
from fedpft_core.errors import UserError
from fedpft_core.model.device import device_of, to_device
from fedpft_core.model.families import FFN
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.proxy.narrow import follow
from fedpft_core.proxy.nested import positions
from fedpft_core.seeds import torch_stream


@dataclass(frozen=True)
class Smaller:
    """A narrower proxy beside the widest one.

    Attributes:
        student: the proxy, whose weights follow the widest one's.
        plan: its plan.
    """

    student: nn.Module
    plan: Plan


def run(
    name: str, job: Job, smaller: Sequence[Smaller], key: str = "distill.method"
) -> tuple[float, float, float]:
    """Align all widths by the method(s) called `name`, one after the other.

    Args:
        name: a value of `distill.method` or `align.method` that is not `none`.
        job: the alignment of the widest proxy. With `chosen` only these neurons of it move.
        smaller: the other widths, narrowest first.
        key: the configuration key that the error names.

    Returns:
        The first method's loss at its start, the last method's at its end, and seconds.

    Raises:
        UserError: one of the methods makes no steps. Nothing has been aligned then.
    """
    modules = [registry.load("alignment", part) for part in parts(name)]
    for part, module in zip(parts(name), modules, strict=True):
        if not hasattr(module, "objective_of"):
            raise UserError(
                f"{key} = {part} cannot align widths that share their weights: set distill.widths "
                "= apart, or a method that makes steps."
            )
    start = time.perf_counter()
    losses = [_align(module.objective_of, job, smaller) for module in modules]
    return losses[0][0], losses[-1][1], time.perf_counter() - start


def drawn(widths: int, step: int, seed: int) -> list[int]:
    """Which widths a step trains.

    Args:
        widths: how many there are.
        step: counted from 0.
        seed: of the draws.

    Returns:
        Their numbers, narrowest first: the narrowest, the widest, and one between them.
    """
    if widths <= 2:
        return list(range(widths))
    between = torch.randint(1, widths - 1, (), generator=torch_stream(seed, "widths", step))
    return [0, int(between), widths - 1]


def _align(
    objective_of: Callable[[Job], Objective], job: Job, smaller: Sequence[Smaller]
) -> tuple[float, float]:
    """One method's steps; losses are means over the widths that a step trains."""
    cfg, widest = job.cfg, pruned_ffns(job.student, job.plan)
    everyone = [*smaller, Smaller(job.student, job.plan)]
    jobs = [replace(job, student=w.student, plan=w.plan) for w in everyone]
    at = [positions(job.plan, w.plan) for w in everyone]
    for model in (job.teacher, *(w.student for w in everyone)):
        model.eval()
    device = device_of(job.student)
    moving = moving_parts(job.student, job.plan)
    own = [moving_parts(w.student, w.plan) for w in everyone]
    fixed = fixed_neurons(widest, job.chosen)
    with torch.no_grad():
        target = (
            {b: products(f) for b, f in teacher_ffns(job.teacher, job.plan).items()}
            if job.alpha
            else {}
        )
    noises = [
        AdapterNoise(job.teacher, w.student, w.plan, cfg.adapter_noise, job.seed) for w in everyone
    ]
    errors = [objective_of(j) for j in jobs]
    ffns = [pruned_ffns(w.student, w.plan) for w in everyone]
    params = list(moving.values())
    optimiser = torch.optim.AdamW(params, lr=job.lr, weight_decay=cfg.weight_decay, fused=True)
    first = last = math.nan
    try:
        with ExitStack() as stack:
            for w, parts_of in zip(everyone, own, strict=True):
                stack.enter_context(only_trained(w.student, parts_of.values()))
            for step, batch in enumerate(job.batches(job.steps)):
                if step == job.steps:
                    break
                batch = to_device(batch, device)
                for noise in noises:
                    noise.draw()
                total: dict[tuple[int, str], Tensor] = {}
                chosen = drawn(len(everyone), step, job.seed)
                last = 0.0
                for i in chosen:
                    loss = errors[i](batch)
                    if target:
                        terms = [
                            weight_error(ffn, target[b])
                            for b, ffn in ffns[i].items() if b in target
                        ]  # fmt: skip
                        loss = loss + job.alpha * torch.stack(terms).mean()
                    # An objective may have put the adapter in its graph: it gets no gradient.
                    loss.backward(inputs=list(own[i].values()))
                    _add(total, moving, own[i], at[i], len(chosen))
                    last += float(loss.detach()) / len(chosen)
                for key, p in moving.items():
                    p.grad = total[key]
                for key, (_, axis, index) in fixed.items():
                    total[key].index_fill_(axis, index, 0.0)
                nn.utils.clip_grad_norm_(params, cfg.clip)
                for group in optimiser.param_groups:
                    rate = warmup_then_linear(step, job.steps, cfg.warmup_share)
                    group["lr"] = job.lr * rate
                optimiser.step()
                # Weight decay touches what has no gradient too: put the fixed neurons back.
                with torch.no_grad():
                    for key, (value, axis, index) in fixed.items():
                        moving[key].index_copy_(axis, index, value)
                optimiser.zero_grad(set_to_none=True)
                for w in smaller:
                    follow(w.student, w.plan, job.student, job.plan)
                first = last if step == 0 else first
                if job.on_step:
                    job.on_step(step + 1, job.steps, last)
    finally:
        for noise in noises:
            noise.restore()
    return first, last


def _add(
    total: dict[tuple[int, str], Tensor],
    moving: Mapping[tuple[int, str], Tensor],
    own: Mapping[tuple[int, str], Tensor],
    at: Mapping[int, Tensor],
    count: int,
) -> None:
    """Add one width's gradients to those of the widest one's weights, and forget them."""
    for key, p in moving.items():
        total.setdefault(key, torch.zeros_like(p))
    for key, p in own.items():
        if p.grad is not None and key in total:
            axis = FFN.neuron_axis(key[1])
            if axis is None:
                total[key] += p.grad / count
            else:
                total[key].index_add_(axis, at[key[0]].to(p.device), p.grad / count)
        p.grad = None


__all__ = ["Smaller", "drawn", "run"]
