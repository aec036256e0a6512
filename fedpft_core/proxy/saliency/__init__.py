"""How neurons are ranked when the sub-FM is cut: one file per choice of `plan.saliency`.

Each file has `score(probe) -> list[Tensor]`, one tensor [F] of floats per block of the FM, in
order and on any device; the neurons with the largest scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpft_core import registry
from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position, by_row, inputs_of, read_at, real_positions
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.families import FFN, family_of_model

Public = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Probe:
    """What a saliency may look at.

    Attributes:
        fm: the FM without adapter.
        seed: the run's.
        public: gives public batches, on any device; None where there are none.
        head_reads: which positions the task's head reads; None for where the family's
            classification head does.
    """

    fm: nn.Module
    seed: int
    public: Public | None = None
    head_reads: Position | None = None

    @property
    def position(self) -> Position:
        """Which positions the head reads."""
        return self.head_reads or family_of_model(self.fm).summary

    @property
    def ffns(self) -> list[FFN]:
        """Views of the FM's FFNs, one per block, in order."""
        return family_of_model(self.fm).ffns(self.fm)

    def batches(self) -> Iterable[Batch]:
        """Public batches, for one pass over them.

        Returns:
            The batches, on the FM's device.

        Raises:
            UserError: there are no public rows.
        """
        if self.public is None:
            raise UserError("plan.saliency: this choice needs public rows, and there are none.")
        device = device_of(self.fm)
        return (to_device(batch, device) for batch in self.public())


def scores(name: str, probe: Probe) -> list[Tensor]:
    """Saliency of every neuron of the FM.

    Args:
        name: a choice of `plan.saliency`.
        probe: what the choice may look at.

    Returns:
        One tensor [F] per block, in order, on the device that the choice left it on; a larger
        score is kept first.

    Raises:
        KeyError: there is no such choice.
    """
    found: list[Tensor] = registry.load("saliency", name).score(probe)
    return found


def last_block(model: nn.Module) -> nn.Module:
    """The block whose output the head reads.

    Args:
        model: FM or proxy, bare or with the adapter.

    Returns:
        The last of its blocks.
    """
    return family_of_model(model).block_list(model)[-1]


def functional(h_BLD: Tensor, batch: Batch, position: Position, stream: torch.Generator) -> Tensor:
    """A loss without labels: ⟨v, h⟩ where the head reads, summed over rows.

    v is drawn for every row (or position, where the head reads every one) from a standard normal,
    so that over many rows no direction of the output is preferred.

    Args:
        h_BLD: the last block's output [B, L, D].
        batch: the batch it is of.
        position: which positions the head reads.
        stream: what v is drawn from.

    Returns:
        A scalar.
    """
    h_ND = read_at(h_BLD, batch, position)
    v_ND = torch.randn(h_ND.shape, generator=stream).to(h_ND)
    return (v_ND * h_ND).sum()


__all__ = [
    "Batch", "Probe", "by_row", "functional", "inputs_of", "last_block", "real_positions", "scores",
]  # fmt: skip
