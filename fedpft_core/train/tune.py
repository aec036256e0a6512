"""Local fine-tuning, evaluation, inactivity counts and adapter gradients of one model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import Encoded, batches
from fedpft_core.errors import UserError
from fedpft_core.model.families import inputs_of, real_positions
from fedpft_core.proxy.plan import Plan, pruned_ffns
from fedpft_core.seeds import derive

Batch = dict[str, Tensor]


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


@dataclass(frozen=True)
class TrainResult:
    """What local training did: mean loss per row, optimiser steps, rows seen, seconds."""

    loss: float
    steps: int
    rows: int
    seconds: float


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores [B, classes] of a batch."""
    out: Tensor = model(**inputs_of(batch)).logits
    return out


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    if str(device) == "cpu":
        return batch
    return {k: v.to(device) for k, v in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def pick_device(wanted: str, key: str) -> torch.device:
    """`auto` → the first accelerator, else the CPU.

    Raises UserError naming `key` when there is none such.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"{key}: expected auto, cpu, cuda or cuda:N, got {wanted!r}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key} = {wanted}: no CUDA device is available here.")
    return device


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Dropout on for the duration, off afterwards."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def local_batches(data: Encoded, settings: LocalSettings, seed: int) -> Iterator[Batch]:
    """The batches of one round: `steps` of them, or whole epochs; a function of the seed."""
    left = settings.steps or settings.epochs * math.ceil(len(data) / settings.batch_size)
    epoch = 0
    while left > 0:
        for batch in batches(data, settings.batch_size, derive(seed, "epoch", epoch)):
            if left == 0:
                return
            left -= 1
            yield batch
        epoch += 1


def fine_tune(model: nn.Module, data: Encoded, settings: LocalSettings, seed: int) -> TrainResult:
    """Train the adapter on local rows with AdamW at a constant rate (paper section 4.2).

    The result depends on the seed, the rows, the thread count and the weights, and on nothing
    that ran before in this process. Frozen parameters get no gradient and no optimizer state.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    lora: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (lora if ".lora_" in name else head).append(p)
    groups = [
        {"params": lora, "lr": settings.lr},
        {"params": head, "lr": settings.lr * settings.head_lr_scale},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    # A round that broke off may have left gradients on a model that is kept between messages.
    optimiser.zero_grad(set_to_none=True)
    device = device_of(model)
    # Losses stay tensors until the end: reading each one would stall an accelerator.
    losses: list[Tensor] = []
    rows = 0
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout"))
        with training_mode(model):
            for batch in local_batches(data, settings, seed):
                batch = to_device(batch, device)
                loss = F.cross_entropy(logits(model, batch), batch["labels"])
                loss.backward()
                if settings.clip:
                    nn.utils.clip_grad_norm_(trainable, settings.clip)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                losses.append(loss.detach() * len(batch["labels"]))
                rows += len(batch["labels"])
    total = float(torch.stack(losses).double().sum()) if losses else math.nan
    return TrainResult(total / max(rows, 1), len(losses), rows, time.perf_counter() - start)


@dataclass(frozen=True)
class Score:
    """Accuracy (share right) and mean cross-entropy over rows."""

    accuracy: float
    loss: float
    rows: int
    seconds: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: Encoded,
    batch_size: int,
    on_rows: Callable[[int], None] | None = None,
) -> Score:
    """Score a model in eval mode; `on_rows` is told how many rows are done."""
    model.eval()
    device = device_of(model)
    right, loss, rows, start = 0, 0.0, 0, time.perf_counter()
    for batch in batches(data, batch_size, None):
        batch = to_device(batch, device)
        scores = logits(model, batch)
        right += int((scores.argmax(-1) == batch["labels"]).sum())
        loss += float(F.cross_entropy(scores, batch["labels"], reduction="sum"))
        rows += len(scores)
        if on_rows:
            on_rows(rows)
    n = max(rows, 1)
    return Score(right / n, loss / n, rows, time.perf_counter() - start)


def is_inactive(activation: Tensor, rule: str) -> Tensor:
    """Which activation values count as inactive: `nonpositive` or `exact-zero`.

    GELU and SiLU are almost never exactly zero, so counting zeros would choose at random.
    """
    return activation == 0 if rule == "exact-zero" else activation <= 0


@dataclass(frozen=True)
class Counts:
    """Inactivity of each pruned block's neurons: `inactive[block]` [K] int64 of `tokens[block]`
    real tokens (paper section 4.3, the terms of APoZ)."""

    inactive: dict[int, Tensor]
    tokens: dict[int, int]


@torch.inference_mode()
def count_inactive(
    model: nn.Module, plan: Plan, data: Encoded, batch_size: int, rule: str
) -> Counts:
    """Count, per pruned block and neuron, the real tokens that left it inactive.

    The token total is taken at each block, where the counting happens.
    """
    model.eval()
    device = device_of(model)
    ffns = pruned_ffns(model, plan)
    inactive = {b: torch.zeros(f.neurons, dtype=torch.int64) for b, f in ffns.items()}
    tokens = dict.fromkeys(ffns, 0)

    def hook(block: int) -> Any:
        def count(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            real = real_positions(batch, out.shape[1])
            off = is_inactive(out, rule) & real[..., None]
            inactive[block] += off.flatten(0, 1).sum(0).cpu()
            tokens[block] += int(real.sum())

        return count

    with ExitStack() as stack:
        for block, ffn in ffns.items():
            handle = ffn.activation.register_forward_hook(hook(block))
            stack.callback(handle.remove)
        for batch in batches(data, batch_size, None):
            batch = to_device(batch, device)
            logits(model, batch)
    return Counts(inactive, tokens)


def adapter_gradient(
    model: nn.Module, data: Iterable[Batch], plan: Plan | None = None
) -> dict[str, Tensor]:
    """Gradient of the mean loss over the batches for every adapter parameter, dropout off."""
    model.eval()
    device = device_of(model)
    live = adapters.parameters(model, plan)
    rows = 0
    total = {
        name: torch.zeros_like(p, device="cpu", dtype=torch.float64) for name, p in live.items()
    }
    for batch in data:
        batch = to_device(batch, device)
        loss = F.cross_entropy(logits(model, batch), batch["labels"], reduction="sum")
        grads = torch.autograd.grad(loss, list(live.values()))
        for name, g in zip(live, grads, strict=True):
            total[name] += g.double().cpu()
        rows += len(batch["labels"])
    return {name: g / max(rows, 1) for name, g in total.items()}
