"""By chance, a function of seed and round."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.align.selection import View
from fedpft_core.seeds import torch_stream


def scores(view: View) -> dict[int, Tensor]:
    """Scores that put the neurons of each block in a random order.

    Args:
        view: with the seed, and the plan or rates that tell the blocks' sizes.

    Returns:
        float32 [K] by FM block index.
    """
    out = {}
    for block, k in view.sizes().items():
        order = torch.randperm(k, generator=torch_stream(view.seed, "neurons", block))
        # The first of the permutation has the highest score.
        out[block] = -torch.empty(k).index_copy_(0, order, torch.arange(k, dtype=torch.float32))
    return out
