"""Scoring a model on labelled rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.data.batches import Encoded, batches
from fedpft_core.model.batch import inputs_of
from fedpft_core.model.device import Batch, device_of, to_device


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores [B, classes] of a batch."""
    out: Tensor = model(**inputs_of(batch)).logits
    return out


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
