"""Which neurons an alignment during FL moves: one file per choice of `align.selection`.

Each file has `scores(view) -> dict[int, Tensor]`, one tensor [K] per pruned block, on any device;
the share p with the largest scores moves. `NEEDS_COUNTS = True` makes clients count inactive
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedpft_core import registry
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.plan import Plan


@dataclass(frozen=True)
class View:
    """What a selection may look at.

    Attributes:
        rates: APoZ [K] of each pruned block, by FM index; empty where clients have not counted.
        seed: of what is drawn at random, another one for each round.
        teacher: the FM at the present adapter.
        student: the proxy at the same adapter.
        plan: its plan; None where `rates` alone tell the blocks.
        public: gives public batches, the same at each call, on any device; see `batches`.
    """

    rates: Mapping[int, Tensor] = field(default_factory=dict)
    seed: int = 0
    teacher: nn.Module | None = None
    student: nn.Module | None = None
    plan: Plan | None = None
    public: Callable[[], Iterable[Batch]] | None = None

    def batches(self) -> Iterator[Batch]:
        """Public batches, for one pass over them.

        Returns:
            The same batches at each call, on the models' device.
        """
        assert self.public and self.student
        device = device_of(self.student)
        return (to_device(batch, device) for batch in self.public())

    def sizes(self) -> dict[int, int]:
        """Neurons K of each pruned block.

        Returns:
            K by FM block index.
        """
        if self.plan is None:
            return {b: len(rate) for b, rate in self.rates.items()}
        return {b: len(self.plan.blocks[b].kept) for b in self.plan.pruned}


def needs_counts(name: str, proportion: float) -> bool:
    """Whether clients must count inactive tokens.

    They need not where every neuron moves anyway: counting costs each client a pass over all its
    rows.

    Args:
        name: a value of `align.selection`.
        proportion: p, the share of neurons that move.

    Returns:
        True where the selection reads counts and p is below 1.
    """
    if proportion >= 1:
        return False
    return bool(getattr(registry.load("selection", name), "NEEDS_COUNTS", False))


def choose(name: str, view: View, proportion: float) -> dict[int, Tensor]:
    """The share p of each block's neurons to re-align.

    Of equal scores the lower position is taken; at least one neuron is chosen.

    Source: FedPFT, section 4.3.

    Args:
        name: a value of `align.selection`.
        view: what the selection looks at.
        proportion: p, above 0; from 1 on all neurons are chosen and no scores are asked for.

    Returns:
        Sorted int64 positions among the block's kept neurons, by FM block index, on the CPU.
    """
    if proportion >= 1:
        return {block: torch.arange(size) for block, size in view.sizes().items()}
    out = {}
    for block, score in registry.load("selection", name).scores(view).items():
        m = max(1, round(proportion * len(score)))
        order = torch.sort(score.cpu(), descending=True, stable=True).indices
        out[block] = order[:m].sort().values
    return out
