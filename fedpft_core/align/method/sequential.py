"""As closed-form, but block after block on the sub-FM's own inputs: later ones mend earlier."""

from __future__ import annotations

import torch

from fedpft_core.align.blocks import local_views
from fedpft_core.align.method import Job
from fedpft_core.align.method.closed_form import Fit, means
from fedpft_core.model.batch import at_real
from fedpft_core.model.device import device_of, to_device
from fedpft_core.model.plan import pruned_ffns


def align(job: Job) -> tuple[float, float]:
    """Fit W2 and b2 of one block after the other, each to what the blocks before it leave undone.

    Each block's residual is what it adds up to in the FM (before the output norm, where there
    is one) less what it adds up to in the student, whose input already differs. Where the FFN's
    output is scaled or normed before it is added, it is the difference of these outputs alone. One
    pass of both models over `distill.fit-batches` batches for each block, up to that block.

    Args:
        job: the alignment. Its steps, rate, alpha and seed are not looked at.

    Returns:
        Loss before and after, as of `closed-form`, but each block's before is that which its
        mended predecessors leave.
    """
    device = device_of(job.student)
    job.teacher.eval()
    job.student.eval()
    ffns, n, losses = pruned_ffns(job.student, job.plan), job.cfg.fit_batches, []
    with torch.no_grad():
        for i, (b, ffn) in enumerate(ffns.items()):
            fit = Fit(ffn, job, b)
            for step, batch in enumerate(job.batches(n)):
                batch = to_device(batch, device)
                theirs, real = local_views(job.teacher, job.plan, batch, wanted=(b,))
                mine, _ = local_views(job.student, job.plan, batch, own_index=True, wanted=(b,))
                if ffn.family.after_ffn:
                    residual = theirs[b].y - mine[b].y
                else:
                    residual = theirs[b].total - mine[b].total
                fit.add(
                    at_real(mine[b].a, real), at_real(residual, real), at_real(theirs[b].y, real)
                )
                if job.on_step:
                    job.on_step(i * n + step + 1, n * len(ffns), float("nan"))
            losses.append(fit.solve(job.cfg.ridge))
    return means(losses)
