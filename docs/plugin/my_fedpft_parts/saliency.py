"""The first neurons of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.proxy.saliency import Probe


def score(probe: Probe) -> list[Tensor]:
    """Minus the neuron's number.

    Args:
        probe: gives the FM; nothing else is looked at.

    Returns:
        float32 [F] per block, in order.
    """
    return [-torch.arange(len(ffn.ins[0].weight), dtype=torch.float32) for ffn in probe.ffns]
