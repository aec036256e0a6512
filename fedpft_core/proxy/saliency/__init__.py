"""How neurons are ranked when the sub-FM is cut: one file per choice of `plan.saliency`.

Each file has `score(probe) -> list[Tensor]`, one tensor [F] float64 per block of the FM, in order;
the neurons with the largest scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpft_core import registry
from fedpft_core.errors import UserError
from fedpft_core.model.batch import inputs_of, real_positions
from fedpft_core.model.families import FFN, family_of_model

Batch = dict[str, Tensor]
Public = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Probe:
    """What a saliency may look at: the FM without adapter, public batches, the run's seed."""

    fm: nn.Module
    seed: int
    public: Public | None = None

    @property
    def ffns(self) -> list[FFN]:
        return family_of_model(self.fm).ffns(self.fm)

    def batches(self) -> Iterable[Batch]:
        """Public batches. Raises UserError where there are none to be had."""
        if self.public is None:
            raise UserError("plan.saliency: this choice needs public rows, and there are none.")
        return self.public()


def scores(name: str, probe: Probe) -> list[Tensor]:
    """Scores of every neuron, [F] float64 per block, by the choice called `name`."""
    found: list[Tensor] = registry.load("saliency", name).score(probe)
    return found


def last_block(model: nn.Module) -> nn.Module:
    return family_of_model(model).block_list(model)[-1]


def functional(h_BLD: Tensor, stream: torch.Generator) -> Tensor:
    """A loss without labels: ⟨v, h⟩ at the first position, where the head reads, summed over rows.

    v is drawn for every row from a standard normal, so that over many rows no direction of the
    output is preferred. Returns a scalar.
    """
    v_BD = torch.randn(h_BLD[:, 0].shape, generator=stream).to(h_BLD)
    return (v_BD * h_BLD[:, 0]).sum()


__all__ = [
    "Batch", "Probe", "functional", "inputs_of", "last_block", "real_positions", "scores",
]  # fmt: skip
