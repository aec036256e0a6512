"""Merging figures: what a client says of its rows so that a merge can weigh its adapter by it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.model.batch import inputs_of
from fedpft_core.model.device import device_of, to_device
from fedpft_core.model.names import bare, is_trained, to_fm_name
from fedpft_core.model.plan import Plan
from fedpft_core.model.taps import watch
from fedpft_core.seeds import numpy_stream
from fedpft_core.task import Task
from fedpft_core.tensors import Tensors

MOST_ROWS = 256
"""Rows that Fisher figures are of at most; each costs a forward and a backward pass of its own."""

_B = ".lora_B.default"


def fisher(
    model: nn.Module, plan: Plan, task: Task, rows: Encoded, factors: str, seed: int
) -> Tensors:
    """The mean over rows of the squared gradient of each trained value of the adapter.

    That is the diagonal of the empirical Fisher information. Each row has a pass of its own, so
    that any task will do, whatever its layers.

    Source: Matena and Raffel, arXiv:2111.09832, section 3.1.

    Args:
        model: the proxy with the tuned adapter; left in eval mode, without gradients.
        plan: what the proxy was built from.
        task: whose loss is differentiated.
        rows: labelled rows, at least one; at most `MOST_ROWS` of them are read.
        factors: which of LoRA's factors are trained.
        seed: decides which rows, where there are more.

    Returns:
        float32 tensors by FM name, shaped as the adapter's, at least 0.
    """
    model.eval()
    device = device_of(model)
    live = {k: p for k, p in adapters.parameters(model, plan).items() if is_trained(k, factors)}
    if len(rows) > MOST_ROWS:
        chosen = numpy_stream(seed, "fisher").permutation(len(rows))[:MOST_ROWS]
        rows = rows.select(np.sort(chosen))
    total = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in live.items()}
    count = 0
    for batch in batches(rows, 1, None):
        loss = task.loss(model, to_device(batch, device))
        found = torch.autograd.grad(loss, list(live.values()))
        for name, g in zip(live, found, strict=True):
            total[name] += g.double().square()
        count += 1
    return {k: (t / max(count, 1)).float().cpu() for k, t in total.items()}


@torch.inference_mode()
def gram(model: nn.Module, plan: Plan, rows: Encoded, batch_size: int) -> Tensors:
    """The mean over real positions of z zᵀ, where z = A x is what LoRA's B reads.

    With the same A everywhere the mean square error of a merged B on a client's inputs follows
    from this alone: of r x r numbers for each layer, where the layer's own inputs would need
    D x D.

    Source: RegMean, arXiv:2212.09849, section 3.1.

    Args:
        model: the proxy with the tuned adapter; left in eval mode.
        plan: what the proxy was built from.
        rows: with or without labels.
        batch_size: rows at once.

    Returns:
        float32 [r, r] by the FM name of each B, symmetric.
    """
    model.eval()
    device = device_of(model)
    read = {
        to_fm_name(bare(f"{path}.weight"), plan): module
        for path, module in model.named_modules()
        if path.endswith(_B) and isinstance(module, nn.Linear)
    }
    ranks = {name: module.in_features for name, module in read.items()}
    total = {k: torch.zeros(r, r, dtype=torch.float64, device=device) for k, r in ranks.items()}
    count = dict.fromkeys(read, 0)

    def see(name: str, value: Tensor) -> None:
        z = value.reshape(-1, ranks[name]).double()
        mask = batch.get("attention_mask")
        # Some layers read something else than the row's positions, of which none is padding.
        if mask is not None and mask.numel() == len(z):
            z = z[mask.bool().flatten()]
        total[name] += z.T @ z
        count[name] += len(z)

    with watch(read, see, inputs=True):
        for served in batches(rows, batch_size, None):
            batch = to_device(served, device)
            model(**inputs_of(batch))
    return {k: (t / max(count[k], 1)).float().cpu() for k, t in sorted(total.items())}


__all__ = ["MOST_ROWS", "fisher", "gram"]
