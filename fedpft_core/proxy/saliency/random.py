"""By chance, a function of the seed."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.proxy.saliency import Probe
from fedpft_core.seeds import torch_stream


def score(probe: Probe) -> list[Tensor]:
    """Draw a score for every neuron.

    Args:
        probe: gives the FM's sizes and the seed.

    Returns:
        float32 [F] per block, in order, uniform in [0, 1).
    """
    return [
        torch.rand(ffn.neurons, generator=torch_stream(probe.seed, "saliency", i))
        for i, ffn in enumerate(probe.ffns)
    ]
