"""Scoring a model on labelled rows."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.model.device import device_of, to_device
from fedpft_core.task import Score, Task


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    task: Task,
    data: Encoded,
    batch_size: int,
    on_rows: Callable[[int], None] | None = None,
) -> Score:
    """Score a model in eval mode.

    Args:
        model: a model of the task.
        task: says what a score is.
        data: labelled rows.
        batch_size: rows at once.
        on_rows: told how many rows are done.

    Returns:
        The task's score over all rows, with the seconds it took.
    """
    model.eval()
    device = device_of(model)
    total: dict[str, float] = {}
    start = time.perf_counter()
    for batch in batches(data, batch_size, None):
        for name, value in task.sums(model, to_device(batch, device)).items():
            total[name] = total.get(name, 0) + value
        if on_rows:
            on_rows(int(total["rows"]))
    return task.score(total, time.perf_counter() - start)
