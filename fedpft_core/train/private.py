"""Local fine-tuning with example-level differential privacy (DP-SGD).

Each step takes a Poisson sample of the rows, clips the gradient of every row, adds Gaussian noise
to their sum and divides by the size that the sample has in the mean. Sample and noise are drawn
from the client's own entropy; the run's seed, which the server chose, decides the dropout only.

Source: Abadi et al. 2016 (arXiv:1607.00133), algorithm 1, with AdamW on the noised gradient.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.model.batch import rows_of
from fedpft_core.model.device import device_of, to_device
from fedpft_core.privacy.accounting import Spend
from fedpft_core.privacy.entropy import Source, gaussian, tossed
from fedpft_core.privacy.gradients import RowGradients, clipped_sum
from fedpft_core.seeds import derive
from fedpft_core.task import Task, Writer
from fedpft_core.train.tune import (
    LocalSettings,
    TrainResult,
    optimiser_for,
    steps_of,
    training_mode,
)


def spend_of(settings: LocalSettings, rows: int, noise: float) -> Spend:
    """What one step of a round spends.

    Args:
        settings: its batch size is the mean size of a sample.
        rows: N.
        noise: standard deviation of the noise over the bound on a row's gradient.

    Returns:
        One release.
    """
    return Spend(noise, rate=min(1.0, settings.batch_size / rows))


def fine_tune_private(
    model: nn.Module,
    task: Task,
    data: Encoded,
    settings: LocalSettings,
    seed: int,
    noise: float,
    bound: float,
    source: Source = os.urandom,
) -> TrainResult:
    """Train the adapter on local rows so that no single row shows.

    Args:
        model: FM or proxy with the adapter, changed in place.
        task: whose loss is minimised.
        data: labelled rows, at least one.
        settings: the round's work; its clip, which is of whole batches, is not looked at.
        seed: of the dropout.
        noise: standard deviation of the noise, in multiples of the bound.
        bound: largest L2 norm of a row's gradient.
        source: where samples and noise come from.

    Returns:
        Steps, rows and seconds; the loss, which would tell of the rows, is 0.

    Raises:
        ValueError: the task packs rows; the settings ask for a part of the adapter, or for a rate
            that falls; or a trained parameter belongs to no linear layer, has no gradient by row,
            or did not move.
    """
    if isinstance(task, Writer):
        raise ValueError("text generation packs rows together, so none has a gradient of its own")
    if settings.factors != "both" or settings.decay != "none":
        raise ValueError("all of the adapter is trained, at one rate, whatever the server asks for")
    rate = min(1.0, settings.batch_size / len(data))
    expected = rate * len(data)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    optimiser = optimiser_for(model, settings)
    optimiser.zero_grad(set_to_none=True)
    device = device_of(model)
    steps = steps_of(len(data), settings)
    seen = 0
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout"))
        with training_mode(model), RowGradients(model) as gradients:
            for _ in range(steps):
                index = tossed(len(data), rate, source)
                seen += len(index)
                total = {n: torch.zeros_like(p) for n, p in trainable.items()}
                if index:
                    rows = data.select(np.array(index))
                    _add(total, model, task, rows, settings.batch_size, bound, gradients)
                for name, p in trainable.items():
                    drawn = torch.from_numpy(gaussian(p.numel(), source)).reshape(p.shape)
                    drawn = (drawn * noise * bound).to(p)
                    p.grad = (total[name] + drawn) / expected
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
    for name, p in trainable.items():
        if steps and noise and settings.lr and torch.equal(p.detach(), before[name]):
            raise ValueError(f"{name} was not trained")
    return TrainResult(0.0, steps, seen, time.perf_counter() - start)


def _add(
    total: dict[str, Tensor], model: nn.Module, task: Task, rows: Encoded,
    size: int, bound: float, gradients: RowGradients,
) -> None:  # fmt: skip
    """Add the clipped gradients of a sample, in parts that fit the memory a batch takes."""
    for batch in batches(rows, size, None):
        batch = to_device(batch, device_of(model))
        gradients.begin(rows_of(batch))
        task.loss(model, batch, reduction="sum").backward()
        for name, g in clipped_sum(gradients.taken(), bound).items():
            total[name] += g
        model.zero_grad(set_to_none=True)
