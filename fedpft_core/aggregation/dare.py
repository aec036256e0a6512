"""Changes with most values dropped at random and the rest scaled up, averaged (DARE).

Of every reply's change of the adapter the share federation.density of values stays, drawn from the
run's seed and the client's name, divided by that share.
Source: Yu et al., arXiv:2311.03099, section 3.
"""

from __future__ import annotations

import torch

from fedpft_core.aggregation import Replies
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors


def aggregate(replies: Replies) -> Tensors:
    """One pass over the replies.

    Args:
        replies: at least one; `replies.weights` is what each weighs.

    Returns:
        Float32 tensors by FM name.
    """
    settings = replies.settings
    start = {k: t.double() for k, t in replies.start.items()}
    total = {k: torch.zeros_like(t) for k, t in start.items()}
    for name, (adapter, weight) in zip(replies.names, replies, strict=True):
        for k, t in adapter.items():
            stream = torch_stream(settings.seed, "dare", name, k)
            stays = torch.rand(t.shape, generator=stream, dtype=torch.float64) < settings.density
            total[k] += torch.where(stays, weight * (t.double() - start[k]), 0.0)
    scale = sum(replies.weights) * settings.density
    return {k: (t + total[k] / scale).to(torch.float32) for k, t in start.items()}
