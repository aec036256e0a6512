"""Mean in which each value counts by the squared gradients that the client found for it (Fisher).

A client sends with its adapter the mean of each value's squared gradient over its rows. Where that
is large, its loss depends on the value, and the merge keeps more of it. A client's figures are
divided by their own mean, so that how well a client has fitted its rows, which scales all of them,
decides nothing: in all it weighs what federation.weighting says.
Source: Matena and Raffel, arXiv:2111.09832, section 3.
"""

from __future__ import annotations

import torch

from fedpft_core.aggregation import Replies
from fedpft_core.tensors import Tensors

MERGING = "fisher"
_FLOOR = 1e-6  # of a client's mean: values that no client's loss depends on are averaged


def aggregate(replies: Replies) -> Tensors:
    """One pass over the replies: two running sums, of weights and of weighted values.

    Args:
        replies: at least one, with Fisher figures beside them. Memory is a few adapters.

    Returns:
        Float32 tensors by FM name.
    """
    total = {k: torch.zeros_like(t, dtype=torch.float64) for k, t in replies.start.items()}
    weights = {k: torch.zeros_like(t) for k, t in total.items()}
    for name, (adapter, weight) in zip(replies.names, replies, strict=True):
        found = {k: t.double() for k, t in replies.beside(name).items()}
        count = sum(t.numel() for t in found.values())
        mean = float(sum(t.sum() for t in found.values())) / max(count, 1)
        for k, t in adapter.items():
            # Without any gradient, or where nothing was trained, all values are alike.
            share = found[k] / mean if k in found and mean > 0 else torch.ones_like(total[k])
            say = weight * (share + _FLOOR)
            total[k] += say * t.double()
            weights[k] += say
    return {k: (t / weights[k]).to(torch.float32) for k, t in total.items()}
