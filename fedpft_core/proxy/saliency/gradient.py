"""First-order change of the FM's output on public rows when the neuron is removed."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.model.taps import keep, watch
from fedpft_core.proxy.saliency import Probe, by_row, functional, inputs_of, last_block
from fedpft_core.seeds import torch_stream


def score(probe: Probe) -> list[Tensor]:
    """s_j = sqrt(mean over rows of (Σ_t a_tj · ∂L/∂a_tj)²), a the activations, t the tokens.

    L is a random linear functional of the last block's output where the head reads
    (`functional`): no labels are needed, and the mean over rows is the diagonal of a
    Gauss-Newton matrix of that output in the neurons' scales.

    Args:
        probe: gives the FM, public batches with at least one row, and the seed of L.

    Returns:
        float64 [F] per block, in order.
    """
    ffns, stream = probe.ffns, torch_stream(probe.seed, "saliency-gradient")
    squares = [torch.zeros(ffn.neurons, dtype=torch.float64) for ffn in ffns]
    rows = 0
    acts: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}

    def add_leaf(i: int, entering: Tensor) -> Tensor:
        acts[i] = entering.detach()
        leaves[i] = torch.zeros_like(acts[i], requires_grad=True)
        return entering + leaves[i]

    with (
        torch.enable_grad(),
        watch({i: ffn.out for i, ffn in enumerate(ffns)}, add_leaf, inputs=True),
        keep({"last": last_block(probe.fm)}) as seen,
    ):
        for batch in probe.batches():
            probe.fm(**inputs_of(batch))
            h = seen["last"]
            grads = torch.autograd.grad(
                functional(h, batch, probe.position, stream), list(leaves.values())
            )
            for i, g in zip(leaves, grads, strict=True):
                change = by_row(acts[i].double() * g.double(), batch).sum(1)
                squares[i] += change.square().sum(0).cpu()
            rows += len(h)
    return [(total / rows).sqrt() for total in squares]
