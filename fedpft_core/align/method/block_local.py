"""AdamW on each pruned FFN alone, fed what the FM's FFN gets: no attention is run twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedpft_core.align.blocks import local_views
from fedpft_core.align.losses import hidden_errors
from fedpft_core.align.method import Job, sgd
from fedpft_core.model.device import Batch
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import Plan, pruned_ffns


def align(job: Job) -> tuple[float, float]:
    """Run `sgd` with the error of :func:`objective` for loss.

    Args:
        job: the alignment.

    Returns:
        Loss of the first and of the last step.
    """
    return sgd.align(job, objective(job.teacher, job.student, job.plan))


def objective(teacher: nn.Module, student: nn.Module, plan: Plan) -> sgd.Objective:
    """The error of a block's output with the student's FFN in the FM's place.

    The mean over pruned blocks: in each block alone the student's FFN, and in post-norm families
    its output norm, take the place of the FM's. A step costs one forward pass of the FM and the
    student's FFNs forward and backward.

    Source: FedPFT, eq. (3), for the error of one block.

    Args:
        teacher: the FM, which is run without gradients.
        student: the proxy.
        plan: its plan, with pruned blocks.

    Returns:
        A function from a batch on the models' device to a scalar.
    """
    ffns = pruned_ffns(student, plan)
    post_norm = bool(family_of(plan.model_type).output_norm)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            views, real = local_views(teacher, plan, batch)
        h_T, h_S = {}, {}
        for block, view in views.items():
            y = ffns[block](view.x)
            h_T[block] = view.out
            if post_norm:
                norm = ffns[block].norm
                assert norm is not None
                h_S[block] = norm(view.total + (y - view.y))
            else:
                after = ffns[block].after
                h_S[block] = view.out + (after(y) - after(view.y))
        return torch.stack(list(hidden_errors(h_T, h_S, real).values())).mean()

    return loss


def objective_of(job: Job) -> sgd.Objective:
    """The loss of a step, for alignments of several widths at once.

    Args:
        job: the alignment of one of them.

    Returns:
        A function from a batch on the models' device to a scalar.
    """
    return objective(job.teacher, job.student, job.plan)
