"""Mean of replies in which only LoRA's B was trained; A is then re-made with orthonormal rows.

A becomes the right singular vectors of the mean product, and B what keeps that product as it is: no
approximation, but a better basis for the next round's B.
Source: FedSVD, arXiv:2505.12805, section 3.
"""

from __future__ import annotations

import torch

from fedpft_core.aggregation import Replies
from fedpft_core.aggregation._product import orthonormal, pairs
from fedpft_core.aggregation.average import aggregate as average
from fedpft_core.aggregation.frozen_a import factors as b_alone
from fedpft_core.tensors import Tensors

factors = b_alone


def aggregate(replies: Replies) -> Tensors:
    """The weighted mean of B and the head, and A from the product.

    Args:
        replies: at least one, with the A that was sent.

    Returns:
        Float32 tensors by FM name.
    """
    out = average(replies)
    for name_a, name_b in pairs(out):
        b, a = orthonormal(out[name_b].double(), out[name_a].double())
        out[name_a], out[name_b] = a.to(torch.float32), b.to(torch.float32)
    return out
