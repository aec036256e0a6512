"""The gradient of the task's loss for the adapter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.plan import Plan
from fedpft_core.task import Task


def adapter_gradient(
    model: nn.Module, task: Task, data: Iterable[Batch], plan: Plan | None = None
) -> dict[str, Tensor]:
    """Gradient of the mean loss over the batches for every adapter parameter, dropout off.

    Args:
        model: the FM or a proxy with the adapter on.
        task: whose loss.
        data: labelled batches.
        plan: the proxy's; None for the FM.

    Returns:
        By the parameter's FM name, float64 on the CPU, shaped as the parameter.
    """
    model.eval()
    device = device_of(model)
    live = adapters.parameters(model, plan)
    count = 0
    total = {
        name: torch.zeros_like(p, device="cpu", dtype=torch.float64) for name, p in live.items()
    }
    for batch in data:
        batch = to_device(batch, device)
        loss = task.loss(model, batch, "sum")
        grads = torch.autograd.grad(loss, list(live.values()))
        for name, g in zip(live, grads, strict=True):
            total[name] += g.double().cpu()
        count += task.count(batch)
    return {name: g / max(count, 1) for name, g in total.items()}
