"""Ridge regression of W2 and b2 on the FM's FFN outputs, each block fed the FM's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.align.blocks import local_views
from fedpft_core.align.method import Job
from fedpft_core.model.batch import at_real
from fedpft_core.model.device import device_of, to_device
from fedpft_core.model.families import FFN
from fedpft_core.model.plan import pruned_ffns


def align(job: Job) -> tuple[float, float]:
    """One pass over `distill.fit-batches` public batches; exact, no steps, no rate.

    Loss: mean over blocks of mean[(y_T − y_S)²] / mean[y_T²], y the FFN's output.

    Args:
        job: the alignment. Its steps, rate, alpha and seed are not looked at.

    Returns:
        Loss before and after, both on the batches that the fit was made from.
    """
    ffns = pruned_ffns(job.student, job.plan)
    fits = {b: Fit(ffn, job, b) for b, ffn in ffns.items()}
    device = device_of(job.student)
    job.teacher.eval()
    with torch.no_grad():
        for step, batch in enumerate(job.batches(job.cfg.fit_batches)):
            views, real = local_views(job.teacher, job.plan, to_device(batch, device))
            for b, view in views.items():
                a, target = ffns[b].inner(at_real(view.x, real)), at_real(view.y, real)
                fits[b].add(a, target - ffns[b].out(a), target)
            if job.on_step:
                job.on_step(step + 1, job.cfg.fit_batches, float("nan"))
        losses = [fit.solve(job.cfg.ridge) for fit in fits.values()]
    return means(losses)


def means(losses: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean error before and after over the blocks.

    Args:
        losses: (before, after) of each block, at least one.

    Returns:
        The mean of the first numbers and that of the second.
    """
    before, after = zip(*losses, strict=True)
    return sum(before) / len(before), sum(after) / len(after)


class Fit:
    """The regression of one block's residual on the activations of the neurons that move.

    Sought is the change Δ of W2's columns and b2 that minimises ‖R − A Δᵀ‖² + λ‖ΔW2‖², R the
    residual [N, D], A the activations [N, m] with a column of ones for b2. The ridge pulls
    towards the present weights and leaves b2 free. Only the normal equations are kept: (m+1)²
    numbers in float64, however many tokens.

    Args:
        ffn: the student's, which :meth:`solve` changes.
        job: the alignment, for the neurons that move.
        block: the FFN's block, by FM index.
    """

    def __init__(self, ffn: FFN, job: Job, block: int) -> None:
        self.ffn = ffn
        weight = ffn.out.weight
        every = torch.arange(ffn.neurons)
        self.index = (every if job.chosen is None else job.chosen[block]).to(weight.device)
        m, d = len(self.index), ffn.out.out_features
        self.with_bias = ffn.out.bias is not None
        m += int(self.with_bias)
        self.gram = torch.zeros(m, m, dtype=torch.float64, device=weight.device)
        self.cross = torch.zeros(m, d, dtype=torch.float64, device=weight.device)
        self.residual = self.target = 0.0

    def add(self, a: Tensor, residual: Tensor, target: Tensor) -> None:
        """Take in the tokens of a batch.

        Args:
            a: the activations of all kept neurons, [n, K].
            residual: what is to be added to the FFN's output, [n, D].
            target: the output of the FM's FFN, [n, D]. Errors are shares of its square.
        """
        a = a.index_select(1, self.index)
        if self.with_bias:
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        # Products in float32 are exact enough per batch and several times faster; sums are not.
        self.gram += (a.T @ a).double()
        self.cross += (a.T @ residual).double()
        self.residual += float(residual.double().square().sum())
        self.target += float(target.double().square().sum())

    @torch.no_grad()
    def solve(self, ridge: float) -> tuple[float, float]:
        """Write the new weights.

        λ is `ridge` times the mean square of the activations, summed over tokens.

        Args:
            ridge: a share above 0.

        Returns:
            The error before and after, as shares of the targets' square, over the tokens taken in.
        """
        m = len(self.index)
        penalised = self.gram.clone()
        diagonal = penalised.diagonal()[:m]
        diagonal.add_(ridge * diagonal.mean())
        delta = torch.linalg.solve(penalised, self.cross)
        after = (
            self.residual
            - 2 * float((delta * self.cross).sum())
            + float((delta * (self.gram @ delta)).sum())
        )
        out = self.ffn.out
        out.weight.index_add_(1, self.index, delta[:m].T.to(out.weight.dtype))
        if self.with_bias:
            out.bias.add_(delta[m].to(out.bias.dtype))
        return self.residual / self.target, max(after, 0.0) / self.target
