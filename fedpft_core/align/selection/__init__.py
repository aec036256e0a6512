"""Which neurons an alignment during FL moves: one file per choice of `align.selection`.

Each file has `scores(view) -> dict[int, Tensor]`, one tensor [K] per pruned block; the share p
with the largest scores moves. `NEEDS_COUNTS = True` makes clients count inactive tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedpft_core import registry
from fedpft_core.model.plan import Plan

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class View:
    """What a selection may look at: APoZ [K] per pruned block, and both models at the present
    adapter with public batches."""

    rates: Mapping[int, Tensor] = field(default_factory=dict)
    seed: int = 0
    teacher: nn.Module | None = None
    student: nn.Module | None = None
    plan: Plan | None = None
    public: Callable[[], Iterable[Batch]] | None = None

    def sizes(self) -> dict[int, int]:
        """Neurons K of each pruned block."""
        if self.plan is None:
            return {b: len(rate) for b, rate in self.rates.items()}
        return {b: len(self.plan.blocks[b].kept) for b in self.plan.pruned}


def needs_counts(name: str, proportion: float) -> bool:
    """Whether clients must count inactive tokens: not where every neuron moves anyway, since
    counting costs each client a pass over all its rows."""
    if proportion >= 1:
        return False
    return bool(getattr(registry.load("selection", name), "NEEDS_COUNTS", False))


def choose(name: str, view: View, proportion: float) -> dict[int, Tensor]:
    """The share p of each block's neurons to re-align, as sorted int64 positions.

    Of equal scores the lower position is taken; at least one neuron is chosen.
    """
    if proportion >= 1:
        return {block: torch.arange(size) for block, size in view.sizes().items()}
    out = {}
    for block, score in registry.load("selection", name).scores(view).items():
        m = max(1, round(proportion * len(score)))
        order = torch.sort(score, descending=True, stable=True).indices
        out[block] = order[:m].sort().values
    return out
