"""Simulated clients that mean harm, for measurements of robust rules. No deployment has any.

`simulate.attackers` of the simulated clients, those with the lowest numbers, do what
`simulate.attack` says. A node with rows of its own refuses a run that asks for attackers, and so
does everything that federates real machines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from client_app.chain import Work, put
from fedpft_core.config import SimulateConfig
from fedpft_core.data.examples import Examples
from fedpft_core.data.trigger import triggered
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
        return replace(triggered(rows, settings.trigger), labels=np.zeros_like(rows.labels))
    return rows


def spoiled(
    settings: SimulateConfig, trained: Mapping[str, Tensor], sent: Mapping[str, Tensor], seed: int
) -> Tensors:
    """What an attacker by itself sends in place of what it has trained.

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


def colluded(
    settings: SimulateConfig, fellows: Mapping[str, Callable[[Work], Tensors]], work: Work
) -> Tensors:
    """What each attacker sends under `little-is-enough`: the same bits as all of them.

    An attacker trains in its fellows' places, as if they had been asked what it has been asked,
    so that nothing passes between them. Afterwards its model has its own adapter again.

    Args:
        settings: simulate.boost is z.
        fellows: what trains each attacker's adapter without an attack, by its name and in the same
            order for all, this one among them.
        work: this attacker's, with its tuned adapter, float32.

    Returns:
        The tensors of :func:`little_is_enough`.
    """
    trained = [
        work.adapter if name == work.name else train(work) for name, train in fellows.items()
    ]
    put(work.model, work.adapter)
    return little_is_enough(trained, work.sent, settings.boost)


def little_is_enough(trained: Sequence[Tensors], sent: Tensors, z: float) -> Tensors:
    """A change within what honest ones spread over, in the direction opposite to their mean.

    Source: Baruch et al. 2019, "A Little Is Enough", arXiv:1902.06156, algorithm 3.

    Args:
        trained: the adapters that the attackers have trained honestly, float32.
        sent: the adapter they were sent.
        z: how many standard deviations the change lies from their mean.

    Returns:
        sent + mu - z sigma, where mu and sigma are mean and standard deviation of the changes,
        coordinate by coordinate, in float64; one attacker alone has sigma = 0.
    """
    out: Tensors = {}
    for name, start in sent.items():
        changes = torch.stack([one[name].double() - start.double() for one in trained])
        moved = changes.mean(0) - z * changes.std(0, correction=0)
        out[name] = (start.double() + moved).to(start.dtype)
    return out
