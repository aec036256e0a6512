"""First-order change of the FM's output on public rows when the neuron is removed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fedpft_core.proxy.saliency import Probe, functional, inputs_of, last_block
from fedpft_core.seeds import torch_stream


def score(probe: Probe) -> list[Tensor]:
    """s_j = sqrt(mean over rows of (Σ_t a_tj · ∂L/∂a_tj)²), a the activations, t the tokens.

    L is a random linear functional of the last block's output at the first position
    (`functional`): no labels are needed, and the mean over rows is the diagonal of a
    Gauss-Newton matrix of that output in the neurons' scales.
    """
    ffns, stream = probe.ffns, torch_stream(probe.seed, "saliency-gradient")
    squares = [torch.zeros(ffn.neurons, dtype=torch.float64) for ffn in ffns]
    rows = 0
    acts: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    seen: list[Tensor] = []

    def hook(i: int) -> Any:
        def add_leaf(_m: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            acts[i] = args[0].detach()
            leaves[i] = torch.zeros_like(acts[i], requires_grad=True)
            return (args[0] + leaves[i], *args[1:])

        return add_leaf

    def tap(_m: object, _a: object, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    with ExitStack() as stack, torch.enable_grad():
        for i, ffn in enumerate(ffns):
            stack.callback(ffn.out.register_forward_pre_hook(hook(i)).remove)
        stack.callback(last_block(probe.fm).register_forward_hook(tap).remove)
        for batch in probe.batches():
            seen.clear()
            probe.fm(**inputs_of(batch))
            grads = torch.autograd.grad(functional(seen[0], stream), list(leaves.values()))
            for i, g in zip(leaves, grads, strict=True):
                change = (acts[i].double() * g.double()).sum(1)
                squares[i] += change.square().sum(0).cpu()
            rows += len(seen[0])
    return [(total / rows).sqrt() for total in squares]
