"""Norm of the neuron's weights, paper eq. 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.model.families import FFN
from fedpft_core.proxy.saliency import Probe

_NEURONS = 512


def score(probe: Probe) -> list[Tensor]:
    """The weight norm of every neuron.

    Args:
        probe: gives the FM; nothing else is looked at.

    Returns:
        float64 [F] per block, in order; see :func:`weight_norm`.
    """
    return [weight_norm(ffn) for ffn in probe.ffns]


def weight_norm(ffn: FFN) -> Tensor:
    """s_j = ||[W1[j,:]; W2[:,j]]||_2 for every neuron j of one block.

    Gated FFNs: the norm over gate row, up row and down column. Biases never enter.
    Source: FedPFT, section 4.1, eq. (1).

    Args:
        ffn: the block's FFN.

    Returns:
        float64 [F].
    """
    # Some neurons at a time: all of a block's weights in float64 are more than the block.
    starts = range(0, ffn.neurons, _NEURONS)
    return torch.cat([_norms(ffn, slice(start, start + _NEURONS)) for start in starts])


def _norms(ffn: FFN, own: slice) -> Tensor:
    total = ffn.out.weight.detach()[:, own].double().square().sum(0)
    for linear in ffn.ins:
        total = total + linear.weight.detach()[own].double().square().sum(1)
    return total.sqrt()
