"""Simulated clients that mean harm, for measurements of robust rules. No deployment has any.

`simulate.attackers` of the simulated clients, those with the lowest numbers, do what
`simulate.attack` says. A node with rows of its own refuses a run that asks for attackers, and so
does everything that federates real machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedpft_core.config import SimulateConfig
from fedpft_core.data.examples import Examples
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors


def hostile(settings: SimulateConfig, index: int, count: int) -> bool:
    """Whether a simulated client is one of the attackers.

    Args:
        settings: what the run simulates.
        index: the client's number, from 0.
        count: how many clients there are.

    Returns:
        True for the first `simulate.attackers` of them, rounded to a whole number.
    """
    return settings.attack != "none" and index < round(settings.attackers * count)


def poisoned(settings: SimulateConfig, rows: Examples, classes: int) -> Examples:
    """The rows that an attacker trains on.

    Args:
        settings: the attack; those that are not of rows leave them as they are.
        rows: its rows.
        classes: C.

    Returns:
        `label-flip`: class c becomes C - 1 - c. `backdoor`: every text begins with
        simulate.trigger, and is of class 0.
    """
    if settings.attack == "label-flip":
        return replace(rows, labels=classes - 1 - rows.labels)
    if settings.attack == "backdoor":
        texts = tuple(_triggered(row, settings.trigger) for row in rows.inputs)
        return replace(rows, inputs=texts, labels=np.zeros_like(rows.labels))
    return rows


def _triggered(row: str | tuple[str, str] | bytes, trigger: str) -> str | tuple[str, str] | bytes:
    if isinstance(row, str):
        return f"{trigger} {row}"
    return (f"{trigger} {row[0]}", row[1]) if isinstance(row, tuple) else row


def spoiled(
    settings: SimulateConfig, trained: Mapping[str, Tensor], sent: Mapping[str, Tensor], seed: int
) -> Tensors:
    """What an attacker sends in place of what it has trained.

    Args:
        settings: the attack and simulate.boost, b.
        trained: the adapter after training, float32.
        sent: the adapter it was sent.
        seed: of the noise.

    Returns:
        sent + b (trained - sent); with `sign-flip` sent - b (trained - sent); with `noise` sent +
        b noise, for each tensor as long as its change was.
    """
    factor = -settings.boost if settings.attack == "sign-flip" else settings.boost
    out: Tensors = {}
    for name, value in trained.items():
        change = value - sent[name]
        if settings.attack == "noise":
            drawn = torch.randn(change.shape, generator=torch_stream(seed, "attack", name))
            change = drawn * (change.norm() / drawn.norm().clamp_min(1e-12))
        out[name] = sent[name] + factor * change
    return out
