"""Largest in-row in the sub-FM."""

from __future__ import annotations

from torch import Tensor

from fedpft_core.align.selection import View
from fedpft_core.model.plan import pruned_ffns


def scores(view: View) -> dict[int, Tensor]:
    """The norm of what a kept neuron is made of.

    Args:
        view: with the proxy and its plan.

    Returns:
        float32 [K] by FM block index.
    """
    assert view.student and view.plan
    ffns = pruned_ffns(view.student, view.plan)
    return {b: ffn.ins[0].weight.detach().norm(dim=1) for b, ffn in ffns.items()}
