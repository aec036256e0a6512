"""Least squares for LoRA's B on what each client's layers read, A frozen as drawn (RegMean).

Only LoRA's B and the head are trained, so that A is the same for all, and a client's B is a linear
layer that reads z = A x. Beside its adapter a client sends the mean of z zᵀ of every layer, r x r
numbers; the merged B is then the one whose outputs differ least from each client's own, on that
client's inputs. A client's moments are divided by their trace, so that in all it weighs what
federation.weighting says.
Source: Jin et al., arXiv:2212.09849, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._product import pairs
from fedpft_core.aggregation.average import aggregate as average
from fedpft_core.tensors import Tensors

MERGING = "gram"
_KEPT = 0.9  # of moments off the diagonal, as in the source
_RIDGE = 1e-6  # of the trace


def factors(round: int) -> str:
    """Which of LoRA's factors clients train.

    Args:
        round: the round's number, from 1.

    Returns:
        `b` in every round.
    """
    return "b"


def aggregate(replies: Replies) -> Tensors:
    """Solve for B layer by layer, from two running sums; average everything else.

    Args:
        replies: at least one, with Gram figures beside them. Memory is one layer of all.

    Returns:
        Float32 tensors by FM name; A as it was.
    """
    out = average(replies)
    for _, name in pairs(out):
        left = torch.zeros_like(out[name], dtype=torch.float64)
        right = torch.zeros(left.shape[1], left.shape[1], dtype=torch.float64)
        grams = replies.stacked_beside(name)
        if grams is None:  # nothing is known of what the layers read: the mean
            continue
        for b, gram, weight in zip(replies.stacked(name), grams, replies.weights, strict=True):
            g = weight * _scaled(gram.double())
            left += b.double() @ g
            right += g
        # B G = L for B; G is symmetric.
        out[name] = torch.linalg.solve(right, left.T).T.contiguous().to(torch.float32)
    return out


def _scaled(gram: Tensor) -> Tensor:
    """A client's moments at trace 1, a little nearer to their diagonal; of nothing read, I / r."""
    rank, trace = len(gram), float(gram.diagonal().sum())
    eye = torch.eye(rank, dtype=gram.dtype)
    if trace <= 0:
        return eye / rank
    shrunk = _KEPT * gram + (1 - _KEPT) * gram.diagonal().diag()
    return shrunk / trace + _RIDGE * eye
