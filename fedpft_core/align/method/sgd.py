"""AdamW on the blocks' output error, each model on its own inputs, paper eqs. 3-6."""

from __future__ import annotations

from fedpft_core.align import distill
from fedpft_core.align.losses import Objective, hidden_objective
from fedpft_core.align.method import Job

LAYER_DROP = True


def align(job: Job, objective: Objective | None = None) -> tuple[float, float]:
    """Run `distill.distil` for `job.steps` steps.

    Source: FedPFT, eqs. (3) to (6).

    Args:
        job: the alignment.
        objective: replaces the output error; step, schedule and noise stay the same.

    Returns:
        Loss of the first and of the last step.
    """
    first, last, _ = distill.distil(
        job.teacher, job.student, job.plan, job.batches(job.steps), job.cfg,
        steps=job.steps, lr=job.lr, alpha=job.alpha, chosen=job.chosen, noise_seed=job.seed,
        on_step=job.on_step, objective=objective,
    )  # fmt: skip
    return first, last


def objective_of(job: Job) -> Objective:
    """The loss of a step, for alignments of several widths at once.

    Args:
        job: the alignment of one of them.

    Returns:
        A function from a batch on the models' device to a scalar.
    """
    return hidden_objective(job.teacher, job.student, job.plan)
