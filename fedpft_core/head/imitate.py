"""Plug-in by distillation: the FM learns to answer as the tuned sub-FM does.

Clients tuned the adapter on the sub-FM; in the FM the same adapter gives outputs that are alike but
not equal. On rows that need no labels the owner tunes the FM's own adapter (LoRA and head), from
where it was plugged in, towards the sub-FM's outputs. The sub-FM stays as it is. Not in the paper.

A part of the rows is kept from tuning: the adapter in the end is the one of those on the way that
imitates best on them, so that few rows are not learnt by heart.

Shape letters: N rows, C outputs of the head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.seeds import derive, numpy_stream
from fedpft_core.task import Headless, Task

_KEPT = 5  # one row of so many is kept from tuning
_LOOKS = 5  # times the kept rows are looked at, the start apart


@dataclass(frozen=True)
class Settings:
    """How long and how fast the FM imitates.

    Attributes:
        steps: optimiser steps at most.
        batch_size: rows a step.
        lr: AdamW rate of LoRA's factors, falling linearly to 0.
        head_lr: the same of the head.
        clip: largest gradient norm.
    """

    steps: int
    batch_size: int
    lr: float
    head_lr: float
    clip: float = 1.0


@dataclass(frozen=True)
class Imitated:
    """What came of it.

    Attributes:
        before: mean divergence of the FM's outputs from the sub-FM's on the kept rows at the start.
        after: the same of the adapter that was taken.
        steps: the step it was taken at; 0 = the start.
        seconds: all of it.
    """

    before: float
    after: float
    steps: int
    seconds: float


@torch.inference_mode()
def outputs(model: nn.Module, task: Task, rows: Encoded, batch_size: int) -> Tensor:
    """What the head puts out for each row, dropout off.

    Args:
        model: FM or proxy with its adapter; left in eval mode.
        task: says what outputs are.
        rows: at least one; labels are not looked at.
        batch_size: rows at once.

    Returns:
        float32 [N, C] on the CPU, in row order; [N, L, C] where each position has outputs, L being
        the longest row's and zeros behind shorter ones.
    """
    model.eval()
    found: Tensor | None = None
    for batch in batches(rows, batch_size, None):
        got = task.outputs(model, to_device(batch, device_of(model))).float().cpu()
        if found is None:  # the longest rows come first
            found = torch.zeros(len(rows), *got.shape[1:])
        found[batch["index"], : got.shape[1]] = got
    assert found is not None
    return found


def imitate(
    fm: nn.Module,
    proxy: nn.Module,
    task: Task,
    rows: Encoded,
    settings: Settings,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Imitated:
    """Tune the adapter now on the FM, in place, towards the outputs of the proxy.

    Dropout is off, so that the result is a function of the seed, the rows and the two models.

    Args:
        fm: with the adapter plugged in.
        proxy: tuned, with the head that is to be imitated.
        task: says what outputs are and how far apart two are.
        rows: at least two; labels are not looked at.
        settings: how long and how fast.
        seed: of the order of the rows.
        on_step: told the step and how many there are.

    Returns:
        How well it imitates on rows kept from tuning, and when that was.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError("imitation needs at least two rows")
    start = time.perf_counter()
    order = numpy_stream(seed, "kept").permutation(len(rows))
    kept_count = max(1, len(rows) // _KEPT)
    tuned, kept = rows.select(order[kept_count:]), rows.select(order[:kept_count])
    size = 4 * settings.batch_size
    loss: Callable[[Batch], Tensor]
    if isinstance(task, Headless):
        writer = task

        def distance() -> float:
            return _mean_apart(writer, fm, proxy, kept, size)

        def loss(batch: Batch) -> Tensor:
            total, terms = writer.apart(fm, proxy, batch)
            return total / max(terms, 1)

        proxy.eval()
    else:
        target, judge = (outputs(proxy, task, part, size) for part in (tuned, kept))

        def distance() -> float:
            return float(task.divergence(outputs(fm, task, kept, size), judge))

        def loss(batch: Batch) -> Tensor:
            got = task.outputs(fm, batch)
            want = target[batch["index"].cpu(), : got.shape[1]].to(got.device)
            return task.divergence(got, want)

    best, best_step, before = adapters.read(fm), 0, distance()
    after = before
    for step, _ in enumerate(_steps(fm, loss, tuned, settings, seed), start=1):
        if on_step:
            on_step(step, settings.steps)
        if step % max(1, settings.steps // _LOOKS) == 0 or step == settings.steps:
            found = distance()
            if found < after:
                best, best_step, after = adapters.read(fm), step, found
    adapters.load(fm, best)
    return Imitated(before, after, best_step, time.perf_counter() - start)


@torch.inference_mode()
def _mean_apart(
    task: Headless, fm: nn.Module, proxy: nn.Module, rows: Encoded, batch_size: int
) -> float:
    """Mean divergence over rows of a task whose outputs are too many to be kept."""
    fm.eval()
    total, terms = 0.0, 0
    for batch in batches(rows, batch_size, None):
        found, n = task.apart(fm, proxy, to_device(batch, device_of(fm)))
        total, terms = total + float(found), terms + n
    return total / max(terms, 1)


def _steps(
    fm: nn.Module, loss_of: Callable[[Batch], Tensor], rows: Encoded, settings: Settings, seed: int
) -> Iterator[None]:
    """Take the optimiser steps one by one."""
    device = device_of(fm)
    named = [(name, p) for name, p in fm.named_parameters() if p.requires_grad]
    live = [p for _, p in named]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if ".lora_" in n], "lr": settings.lr},
            {"params": [p for n, p in named if ".lora_" not in n], "lr": settings.head_lr},
        ],
        weight_decay=0.0,
        fused=True,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 1 - i / settings.steps)
    done, epoch = 0, 0
    while done < settings.steps:
        for batch in batches(rows, settings.batch_size, derive(seed, "epoch", epoch)):
            if done == settings.steps:
                return
            fm.eval()
            loss = loss_of(to_device(batch, device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(live, settings.clip)
            optimiser.step()
            rates.step()
            done += 1
            yield
        epoch += 1
