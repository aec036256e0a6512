"""What alignment minimises: the hidden-state error of the trained blocks, and that of W2 W1.

Shape letters: B rows, L positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedpft_core.align.blocks import outputs_of_both, targets
from fedpft_core.model.batch import at_real
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.families import FFN
from fedpft_core.model.plan import Plan
from fedpft_core.model.precision import widened

Objective = Callable[[Batch], Tensor]


def hidden_errors(
    teacher: Mapping[int, Tensor], student: Mapping[int, Tensor], real_BL: Tensor
) -> dict[int, Tensor]:
    """mean[((h_T − h_S) / rms(h_T))²] per block over real positions, so that blocks weigh alike.

    Source: FedPFT, eq. (3), here divided by the teacher's mean square.

    Args:
        teacher: the outputs wanted, [B, L, D] by FM block index.
        student: the outputs there are, of the same blocks.
        real_BL: bool [B, L], True where there is no padding.

    Returns:
        A scalar for each block, with gradients where the student's outputs have them.
    """
    out = {}
    for block, h_T in teacher.items():
        t, s = (widened(at_real(h, real_BL)) for h in (h_T, student[block]))
        out[block] = (t - s).square().mean() / t.square().mean()
    return out


def products(ffn: FFN) -> list[Tensor]:
    """W2 W1 for every in-projection; biases never enter.

    Source: FedPFT, eq. (4).

    Args:
        ffn: of FM or proxy.

    Returns:
        One [D, D] for each in-projection: of a gated FFN two (gate, up), else one.
    """
    return [widened(ffn.out.weight @ linear.weight) for linear in ffn.ins]


def weight_error(ffn: FFN, teacher: list[Tensor]) -> Tensor:
    """mean[(P_T − P_S)²] / mean[P_T²], averaged over the in-projections.

    Source: FedPFT, eq. (4), here divided by the teacher's mean square.

    Args:
        ffn: the student's.
        teacher: the :func:`products` of the FM's FFN in the same block.

    Returns:
        A scalar with gradients for the student's weights.
    """
    terms = [
        (t - s).square().mean() / t.square().mean()
        for t, s in zip(teacher, products(ffn), strict=True)
    ]
    return torch.stack(terms).mean()


@torch.inference_mode()
def output_error(
    teacher: nn.Module, student: nn.Module, plan: Plan, data: Iterable[Batch]
) -> dict[int, float]:
    """Hidden-state error per trained block, averaged over batches.

    Args:
        teacher: the FM.
        student: the proxy, at the same adapter if the models carry one.
        plan: its plan.
        data: batches, which are taken to the student's device.

    Returns:
        The error by FM block index, as a share of the teacher's mean square; 0 for no batches.
    """
    total: dict[int, float] = dict.fromkeys(targets(plan), 0.0)
    n = 0
    device = device_of(student)
    for batch in data:
        h_T, h_S, real = outputs_of_both(teacher, student, plan, to_device(batch, device))
        for block, e in hidden_errors(h_T, h_S, real).items():
            total[block] += float(e)
        n += 1
    return {block: e / max(n, 1) for block, e in total.items()}


def hidden_objective(teacher: nn.Module, student: nn.Module, plan: Plan) -> Objective:
    """The mean hidden-state error of the trained blocks on a batch.

    Source: FedPFT, eq. (3).

    Args:
        teacher: the FM, which is run without gradients.
        student: the proxy.
        plan: its plan.

    Returns:
        A function from a batch on the models' device to a scalar.
    """

    def loss(batch: Batch) -> Tensor:
        h_T, h_S, real = outputs_of_both(teacher, student, plan, batch)
        return torch.stack(list(hidden_errors(h_T, h_S, real).values())).mean()

    return loss
