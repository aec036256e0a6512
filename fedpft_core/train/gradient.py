"""The gradient of the task's loss for the adapter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.adapter import lora as adapters
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.plan import Plan
from fedpft_core.train.evaluate import logits


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
