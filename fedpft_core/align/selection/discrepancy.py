"""Steepest descent of the output error on public rows at the present adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.align import distill
from fedpft_core.align.losses import hidden_objective
from fedpft_core.align.selection import View
from fedpft_core.model.families import FFN
from fedpft_core.model.plan import pruned_ffns


def scores(view: View) -> dict[int, Tensor]:
    """How fast the output error falls when a neuron moves.

    s_j = ‖∂E/∂(W1[j,:], b1[j], W2[:,j])‖₂, E the mean hidden-state error of the pruned blocks
    (FedPFT, eq. (3)) summed over the public batches.

    Args:
        view: with both models, their plan, and public batches.

    Returns:
        float64 [K] by FM block index.
    """
    assert view.teacher and view.student and view.plan
    ffns = pruned_ffns(view.student, view.plan)
    objective = hidden_objective(view.teacher, view.student, view.plan)
    parts = {
        (b, part): p
        for b, ffn in ffns.items()
        for part, p in ffn.parts().items()
        if FFN.neuron_axis(part) is not None
    }
    total = {key: torch.zeros_like(p) for key, p in parts.items()}
    with distill.only_trained(view.student, parts.values()):
        for batch in view.batches():
            grads = torch.autograd.grad(objective(batch), list(parts.values()))
            for key, g in zip(parts, grads, strict=True):
                total[key] += g
    out = {b: torch.zeros(ffn.neurons, dtype=torch.float64) for b, ffn in ffns.items()}
    for (b, part), g in total.items():
        axis = FFN.neuron_axis(part)
        square = g.double().square().cpu()
        out[b] += square if square.dim() == 1 else square.sum(1 - axis)  # type: ignore[operator]
    return {b: s.sqrt() for b, s in out.items()}
