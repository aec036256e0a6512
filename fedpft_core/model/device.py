"""Which processor a model is on, and getting batches there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedpft_core.errors import UserError

Batch = dict[str, Tensor]


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Bring a batch to where the model is.

    Args:
        batch: tensors by name, on the CPU as `batches` serves them.
        device: where they are wanted; for `cpu` the batch itself is given back.

    Returns:
        The batch on that device.
    """
    if str(device) == "cpu":
        return batch
    return {k: v.to(device) for k, v in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """The device a model is on.

    Args:
        model: any with a parameter, all of them on one device.

    Returns:
        The device of its first parameter.
    """
    return next(model.parameters()).device


def pick_device(wanted: str, key: str) -> torch.device:
    """The device that a setting names; `auto` is the first accelerator, else the CPU.

    Args:
        wanted: `auto`, `cpu`, `cuda` or `cuda:N`.
        key: the setting's name, for messages.

    Returns:
        The device.

    Raises:
        UserError: the text names no device, or CUDA where there is none; names `key`.
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
