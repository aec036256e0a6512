"""How often neurons are inactive on real tokens (paper section 4.3, the terms of APoZ)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.model.batch import by_row, inputs_of, real_positions
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.model.taps import watch


def is_inactive(activation: Tensor, rule: str) -> Tensor:
    """Which activation values count as inactive.

    GELU and SiLU are almost never exactly zero, so counting zeros would choose at random.

    Args:
        activation: values of any shape.
        rule: `exact-zero` takes zeros only; any other takes what is at most 0 (`nonpositive`).

    Returns:
        bool, of the same shape.
    """
    return activation == 0 if rule == "exact-zero" else activation <= 0


@dataclass(frozen=True)
class Counts:
    """Inactivity of each pruned block's neurons, the terms of APoZ, by FM block.

    Attributes:
        inactive: real tokens that left each neuron inactive, int64 [K].
        tokens: real tokens counted over.
    """

    inactive: dict[int, Tensor]
    tokens: dict[int, int]


def sum_counts(counts: Iterable[Counts]) -> Counts:
    """Σ inactive and Σ tokens per block over a round's clients.

    Whole numbers: any order gives the same sums.
    Source: FedPFT, section 4.3, eq. (7).

    Args:
        counts: one for each client, over the same blocks.

    Returns:
        Their sums; empty without clients.
    """
    inactive: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}
    for c in counts:
        for block, value in c.inactive.items():
            inactive[block] = inactive[block] + value if block in inactive else value.clone()
            tokens[block] = tokens.get(block, 0) + c.tokens[block]
    return Counts(inactive, tokens)


def count_inactive(
    model: nn.Module, plan: Plan, data: Encoded, batch_size: int, rule: str
) -> Counts:
    """Count, per pruned block and neuron, the real tokens that left it inactive.

    Source: FedPFT, section 4.3.

    Args:
        model: the proxy, with the adapter; left in eval mode.
        plan: what the proxy was built from.
        data: rows, with or without labels.
        batch_size: rows at once.
        rule: see :func:`is_inactive`.

    Returns:
        Counts on the CPU, by FM block.
    """
    return count_over(model, plan, batches(data, batch_size, None), rule)


@torch.inference_mode()
def count_over(model: nn.Module, plan: Plan, served: Iterable[Batch], rule: str) -> Counts:
    """The same over batches, however they are padded.

    The token total is taken at each block, where the counting happens.

    Args:
        model: the proxy, with the adapter; left in eval mode.
        plan: what the proxy was built from.
        served: what the model reads, and perhaps more.
        rule: see :func:`is_inactive`.

    Returns:
        Counts on the CPU, by FM block.
    """
    model.eval()
    device = device_of(model)
    ffns = pruned_ffns(model, plan)
    inactive = {b: torch.zeros(f.neurons, dtype=torch.int64) for b, f in ffns.items()}
    tokens = dict.fromkeys(ffns, 0)

    def count(block: int, out: Tensor) -> None:
        out = by_row(out, batch)
        real = real_positions(batch, out.shape[1])
        off = is_inactive(out, rule) & real[..., None]
        inactive[block] += off.flatten(0, 1).sum(0).cpu()
        tokens[block] += int(real.sum())

    with watch({block: ffn.activation for block, ffn in ffns.items()}, count):
        for batch in served:
            batch = to_device(batch, device)
            model(**inputs_of(batch))
    return Counts(inactive, tokens)


def apoz(inactive: Tensor, tokens: int) -> Tensor:
    """APoZ_j = Σ inactive / Σ tokens over a round's clients.

    Source: FedPFT, eq. (7).

    Args:
        inactive: tokens that left each neuron of a block inactive, int64 [K], over all clients.
        tokens: real tokens counted at that block, over all clients.

    Returns:
        Shares in [0, 1], float64 [K]; 0 where there were no tokens.
    """
    return inactive.double() / max(tokens, 1)
