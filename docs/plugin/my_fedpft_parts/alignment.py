"""The FFN's mean output error, mended by the out-projection's bias alone."""

from __future__ import annotations

import torch

from fedpft_core.align.blocks import local_views
from fedpft_core.align.method import Job
from fedpft_core.model.device import device_of, to_device
from fedpft_core.model.plan import pruned_ffns


@torch.no_grad()
def align(job: Job) -> tuple[float, float]:
    """Add the mean error on one public batch to each compressed FFN's bias.

    Args:
        job: both models with the plan, and public batches.

    Returns:
        Mean square of the error over the blocks, before and after.
    """
    ffns = pruned_ffns(job.student, job.plan)
    job.teacher.eval()
    (batch,) = job.batches(1)
    batch = to_device(batch, device_of(job.student))
    views, real = local_views(job.teacher, job.plan, batch)
    before = after = 0.0
    for b, ffn in ffns.items():
        error = (views[b].y - ffn(views[b].x))[real]
        before += float(error.square().mean()) / len(ffns)
        ffn.out.bias += error.mean(0)
        after += float((error - error.mean(0)).square().mean()) / len(ffns)
    return before, after
