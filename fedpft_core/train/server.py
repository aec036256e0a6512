"""The server's own step: what it makes of the mean of the clients' adapters.

The mean's distance from the adapter that the round began with is taken as a gradient, and an
optimiser of the server's makes a step of it.
Source: Reddi et al., Adaptive Federated Optimization, ICLR 2021 (arXiv:2003.00295), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedpft_core.config import FederationConfig
from fedpft_core.tensors import Tensors

BETA_2 = 0.99
"""Adam's decay of the mean of squares, as in the source."""
TAU = 1e-3
"""What Adam adds to the root of the mean of squares, as in the source; no rate exceeds lr / TAU."""


def step(
    settings: FederationConfig,
    before: Mapping[str, Tensor],
    mean: Tensors,
    memory: Mapping[str, Tensor],
) -> tuple[Tensors, Tensors]:
    """The adapter after a round.

    With Δ = mean - before, momentum takes m ← β m + Δ and adds lr · m; Adam takes
    m ← β m + (1 - β) Δ and v ← β₂ v + (1 - β₂) Δ², and adds lr · m / (√v + τ).
    Source: Reddi et al., algorithm 2 (FedAvgM, FedAdam).

    Args:
        settings: server_optimiser, server_lr and server_momentum are read.
        before: the adapter that the clients began the round with, float32 by FM name.
        mean: what aggregation made of theirs, the same names and shapes.
        memory: what the last call gave; empty before the first round.

    Returns:
        The next adapter, float32, and the optimiser's memory: `m/NAME` and for Adam `v/NAME`,
        float32. Without an optimiser these are `mean` itself and nothing.
    """
    if settings.server_optimiser == "none":
        return mean, {}
    beta, adam = settings.server_momentum, settings.server_optimiser == "adam"
    adapter: Tensors = {}
    kept: Tensors = {}
    for name, start in before.items():
        change = mean[name].double() - start.double()
        m = memory[f"m/{name}"].double() if memory else change.new_zeros(change.shape)
        m = beta * m + (1 - beta if adam else 1.0) * change
        move = m
        if adam:
            v = memory[f"v/{name}"].double() if memory else change.new_zeros(change.shape)
            v = BETA_2 * v + (1 - BETA_2) * change.square()
            kept[f"v/{name}"] = v.float()
            move = m / (v.sqrt() + TAU)
        kept[f"m/{name}"] = m.float()
        adapter[name] = (start.double() + settings.server_lr * move).float()
    return adapter, kept
