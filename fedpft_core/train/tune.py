"""Local fine-tuning of the adapter on one model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpft_core.data.augment import augmented
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.errors import UserError
from fedpft_core.model.batch import rows_of
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.families import base_model
from fedpft_core.model.names import is_trained
from fedpft_core.seeds import derive
from fedpft_core.task import Task

FACTORS = ("both", "a", "b")
DECAYS = ("none", "linear")


@dataclass(frozen=True)
class LocalSettings:
    """One client's work in one round; the server decides all of it."""

    lr: float
    batch_size: int
    epochs: int
    steps: int  # 0 = use epochs
    weight_decay: float
    clip: float  # 0 = no clipping
    threads: int
    head_lr_scale: float = 1.0  # the head's rate is this times lr
    b_lr_scale: float = 1.0  # the rate of LoRA's B is this times lr
    augment: float = 0.0  # of images: smallest share of the area that a crop keeps; 0 = none
    factors: str = "both"  # which of LoRA's are trained: both, a or b
    decay: str = "none"  # none, or linear: the rate falls over the steps
    blocks: str = ""  # whose LoRA is trained: `first:n` or `last:n`; empty = all
    checkpointing: bool = False  # inner values of blocks are computed again instead of kept


@dataclass(frozen=True)
class TrainResult:
    """What local training did.

    Attributes:
        loss: mean per row, or per whatever the task counts; NaN without a step.
        steps: optimiser steps.
        rows: rows seen, each as often as it was served.
        seconds: time of the steps.
    """

    loss: float
    steps: int
    rows: int
    seconds: float


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Dropout on for the duration, off afterwards.

    Args:
        model: put into training mode, and into eval mode at the end, whatever it was in before.

    Yields:
        Nothing.
    """
    model.train()
    try:
        yield
    finally:
        model.eval()


@contextmanager
def checkpointed(model: nn.Module, on: bool) -> Iterator[None]:
    """For the duration, keep only the inputs of blocks, and compute what is in them once more.

    The gradients are the same to the bit: dropout draws the same numbers again.

    Args:
        model: a model of the library in training mode, with its adapter.
        on: whether to.

    Yields:
        Nothing.

    Raises:
        UserError: the library cannot do it with this model.
    """
    bare: Any = base_model(model)
    if not on:
        yield
        return
    if not getattr(bare, "supports_gradient_checkpointing", False):
        raise UserError(
            f"train.gradient-checkpointing is not possible with a {type(bare).__name__}."
        )
    bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        bare.gradient_checkpointing_disable()


def steps_of(rows: int, settings: LocalSettings) -> int:
    """How many optimiser steps a round of local training is.

    Args:
        rows: the client's training rows.
        settings: the round's work.

    Returns:
        The steps asked for, or those of whole epochs.
    """
    return settings.steps or settings.epochs * math.ceil(rows / settings.batch_size)


@contextmanager
def only(model: nn.Module, factors: str) -> Iterator[None]:
    """Freeze the adapter's tensors that are not to be trained, for the duration.

    Args:
        model: a model with an adapter, whose parameters alone require gradients.
        factors: which of LoRA's factors are trained: `both`, `a` or `b`.

    Yields:
        Nothing.
    """
    frozen = [
        p for name, p in model.named_parameters()
        if p.requires_grad and not is_trained(name, factors)
    ]  # fmt: skip
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def local_batches(data: Encoded, settings: LocalSettings, seed: int) -> Iterator[Batch]:
    """The batches of one round: `steps` of them, or whole epochs; a function of the seed.

    Args:
        data: labelled rows.
        settings: its batch size, steps, epochs and augmentation are read.
        seed: of the order of the rows, drawn anew for each epoch.

    Yields:
        Batches on the CPU, as `fedpft_core.data.batches.batches` serves them.

    Raises:
        ValueError: steps are asked for and there are no rows.
    """
    if settings.steps and not len(data):
        raise ValueError(f"{settings.steps} steps cannot be made on no rows")
    left = steps_of(len(data), settings)
    epoch = 0
    while left > 0:
        for batch in batches(data, settings.batch_size, derive(seed, "epoch", epoch)):
            if left == 0:
                return
            left -= 1
            if settings.augment and "pixel_values" in batch:
                moved = augmented(batch["pixel_values"], settings.augment, derive(seed, left))
                batch = batch | {"pixel_values": moved}
            yield batch
        epoch += 1


def fine_tune(
    model: nn.Module, task: Task, data: Encoded, settings: LocalSettings, seed: int
) -> TrainResult:
    """Train the adapter on local rows: :func:`train_on` over :func:`local_batches`.

    The result depends on the seed, the rows, the thread count and the weights, and on nothing
    that ran before in this process.
    Source: FedPFT, sections 4.2 and 5.1.

    Args:
        model: FM or proxy with the adapter, changed in place.
        task: whose loss is minimised.
        data: labelled rows.
        settings: the round's work.
        seed: of the rows' order and of the dropout.

    Returns:
        Mean loss, steps, rows and seconds.

    Raises:
        ValueError: steps are asked for and there are no rows.
    """
    with only(model, settings.factors):
        steps = steps_of(len(data), settings)
        return train_on(model, task, local_batches(data, settings, seed), settings, seed, steps)


def optimiser_for(model: nn.Module, settings: LocalSettings) -> torch.optim.AdamW:
    """AdamW over the adapter, with rates of their own for LoRA's B and the head.

    Args:
        model: a model with an adapter.
        settings: rates and weight decay.

    Returns:
        The optimiser, at its start.
    """
    a: list[nn.Parameter] = []
    b: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (a if ".lora_A." in name else b if ".lora_B." in name else head).append(p)
    groups = [
        {"params": a, "lr": settings.lr},
        {"params": b, "lr": settings.lr * settings.b_lr_scale},
        {"params": head, "lr": settings.lr * settings.head_lr_scale},
    ]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def train_on(
    model: nn.Module, task: Task, rows: Iterable[Batch], settings: LocalSettings, seed: int,
    steps: int = 0,
) -> TrainResult:  # fmt: skip
    """Train the adapter with AdamW, at a constant rate or one that falls.

    Frozen parameters get no gradient and no optimizer state.
    Source: FedPFT, section 4.2.

    Args:
        model: a model with an adapter, changed in place.
        task: whose loss is minimised.
        rows: labelled batches, one optimiser step each.
        settings: rates, weight decay and clipping; its batch size, epochs and steps are not
            looked at.
        seed: seed of the dropout.
        steps: how many batches there are; read where the rate falls: that of step i of n, from 0,
            is lr * (n - i) / n.

    Returns:
        Mean loss (NaN without a batch), steps, rows and seconds.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = optimiser_for(model, settings)
    rates = [group["lr"] for group in optimiser.param_groups]
    # A round that broke off may have left gradients on a model that is kept between messages.
    optimiser.zero_grad(set_to_none=True)
    device = device_of(model)
    # Losses stay tensors until the end: reading each one would stall an accelerator.
    losses: list[Tensor] = []
    count = seen = 0
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout"))
        with training_mode(model), checkpointed(model, settings.checkpointing):
            for batch in rows:
                batch = to_device(batch, device)
                loss = task.loss(model, batch)
                loss.backward()
                if settings.clip:
                    nn.utils.clip_grad_norm_(trainable, settings.clip)
                if settings.decay == "linear":
                    for group, rate in zip(optimiser.param_groups, rates, strict=True):
                        group["lr"] = rate * (steps - len(losses)) / steps
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                losses.append(loss.detach() * task.count(batch))
                count += task.count(batch)
                seen += rows_of(batch)
    total = float(torch.stack(losses).double().sum()) if losses else math.nan
    return TrainResult(total / max(count, 1), len(losses), seen, time.perf_counter() - start)
