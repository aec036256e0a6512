"""Root mean square of what the neuron adds to the FFN's output on public rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.model.taps import watch
from fedpft_core.proxy.saliency import Probe, by_row, inputs_of, real_positions


@torch.inference_mode()
def score(probe: Probe) -> list[Tensor]:
    """s_j = sqrt(mean over real tokens of a_j²) · ||W2[:,j]||_2, a_j the activation.

    Args:
        probe: gives the FM, run in its present mode, and public batches with at least one row.

    Returns:
        float64 [F] per block, in order.
    """
    ffns = probe.ffns
    squares = [torch.zeros(ffn.neurons, dtype=torch.float64) for ffn in ffns]
    tokens = [0] * len(ffns)

    def add(i: int, entering: Tensor) -> None:
        # What enters the out-projection; in gated FFNs that is the product with `up`.
        entering = by_row(entering, batch)
        a = entering[real_positions(batch, entering.shape[1])]
        squares[i] += a.double().square().sum(0).cpu()
        tokens[i] += len(a)

    with watch({i: ffn.out for i, ffn in enumerate(ffns)}, add, inputs=True):
        for batch in probe.batches():
            probe.fm(**inputs_of(batch))
    return [
        (total / n).sqrt() * ffn.out.weight.double().square().sum(0).sqrt().cpu()
        for total, n, ffn in zip(squares, tokens, ffns, strict=True)
    ]
