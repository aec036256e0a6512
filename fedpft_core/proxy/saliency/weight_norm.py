"""Norm of the neuron's weights, paper eq. 1."""

from __future__ import annotations

from torch import Tensor

from fedpft_core.model.families import FFN
from fedpft_core.proxy.saliency import Probe


def score(probe: Probe) -> list[Tensor]:
    return [weight_norm(ffn) for ffn in probe.ffns]


def weight_norm(ffn: FFN) -> Tensor:
    """s_j = ||[W1[j,:]; W2[:,j]]||_2 (paper eq. 1).

    Gated FFNs: the norm over gate row, up row and down column. Returns [F] float64, biases
    never enter.
    """
    total = ffn.out.weight.detach().double().square().sum(0)
    for linear in ffn.ins:
        total = total + linear.weight.detach().double().square().sum(1)
    return total.sqrt()
