"""Which processor a model is on, and getting batches there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedpft_core.errors import UserError

Batch = dict[str, Tensor]


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
    except (RuntimeError, ValueError):
        raise UserError(f"{key}: expected auto, cpu, cuda or cuda:N, got {wanted!r}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key} = {wanted}: no CUDA device is available here.")
    return device
