"""AdamW on the output error and on how far the adapter's gradients of both models lie apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedpft_core.adapter import lora as adapters
from fedpft_core.align.blocks import outputs, targets
from fedpft_core.align.losses import hidden_errors
from fedpft_core.align.method import Job, sgd
from fedpft_core.model.batch import Position, real_positions
from fedpft_core.model.device import Batch
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.saliency import functional
from fedpft_core.seeds import torch_stream

LAYER_DROP = True


def align(job: Job) -> tuple[float, float]:
    """Run `sgd` with :class:`Objective` for loss.

    Args:
        job: the alignment. Both models carry the adapter.

    Returns:
        Loss of the first and of the last step.
    """
    return sgd.align(job, objective_of(job))


def objective_of(job: Job) -> Objective:
    """The loss of a step, also for alignments of several widths at once.

    Args:
        job: the alignment, of one of them.

    Returns:
        A function from a batch on the models' device to a scalar.
    """
    return Objective(
        job.teacher, job.student, job.plan, job.cfg.gradient_weight, job.seed, job.position
    )


class Objective:
    """Hidden-state error + w · ‖g_S − g_T‖² / ‖g_T‖².

    g is the gradient for LoRA's factors of a loss public rows have: a random linear functional of
    the last block's output where the head reads, drawn anew for each step and the same for both
    models. Its expectation over draws compares the Jacobians of that output in the adapter, so
    agreement does not hang on one task's labels (in the spirit of GradOT, arXiv:2507.04455, which
    matches gradients too, but by choosing what to drop).

    Source: FedPFT, eq. (3), for the first term.

    Args:
        teacher: the FM with the adapter.
        student: the proxy with the same adapter.
        plan: its plan.
        weight: w, the weight of the gradient term.
        seed: of the functionals.
        position: which positions of the last block's output the head reads.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        plan: Plan,
        weight: float,
        seed: int,
        position: Position,
    ) -> None:
        self.teacher, self.student, self.plan, self.weight = teacher, student, plan, weight
        self.position = position
        self.stream = torch_stream(seed, "gradient-matching")
        theirs, mine = adapters.parameters(teacher), adapters.parameters(student, plan)
        names = [n for n in mine if ".lora_" in n]
        self.theirs, self.mine = [theirs[n] for n in names], [mine[n] for n in names]

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of one batch, with a graph to the student's weights.

        Args:
            batch: public rows, on the models' device.

        Returns:
            A scalar.
        """
        pairs = targets(self.plan)
        last_T, last_S = len(self.plan.blocks) - 1, self.plan.present[-1]
        for p in self.mine:
            p.requires_grad_(True)
        # Fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            h_T = outputs(self.teacher, self.plan, batch, False, {*pairs.values(), last_T})
            h_S = outputs(self.student, self.plan, batch, True, {*pairs, last_S})
        state = self.stream.get_state()
        g_T = torch.autograd.grad(self._functional(h_T[last_T], batch), self.theirs)
        self.stream.set_state(state)
        g_S = torch.autograd.grad(
            self._functional(h_S[last_S], batch), self.mine, create_graph=True
        )
        for p in self.mine:
            p.requires_grad_(False)
        apart = torch.stack([(s - t).square().sum() for s, t in zip(g_S, g_T, strict=True)]).sum()
        size = torch.stack([t.square().sum() for t in g_T]).sum()
        wanted = {b: h_T[fm].detach() for b, fm in pairs.items()}
        real = real_positions(batch, h_S[last_S].shape[1])
        errors = hidden_errors(wanted, {b: h_S[b] for b in pairs}, real)
        return torch.stack(list(errors.values())).mean() + self.weight * apart / size

    def _functional(self, h_BLD: Tensor, batch: Batch) -> Tensor:
        return functional(h_BLD, batch, self.position, self.stream)
