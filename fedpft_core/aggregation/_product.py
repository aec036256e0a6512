"""Sums of LoRA's products B A, without their dense matrices where that is less work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_A, _B = "lora_A.weight", "lora_B.weight"


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of LoRA's factors, two and two.

    Args:
        names: of an adapter's tensors.

    Returns:
        (A, B) of each layer, by name.
    """
    return [(n, n.removesuffix(_A) + _B) for n in sorted(names) if n.endswith(_A)]


def stack(parts: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Factors of a weighted sum of products: their product is Σ w B A, at the sum of the ranks.

    Source: FLoRA, arXiv:2409.05976, section 3.2.

    Args:
        parts: weight, B [D_out, r_i] and A [r_i, D_in] of each product; ranks may differ.

    Returns:
        B [D_out, Σ r_i] and A [Σ r_i, D_in], float64.
    """
    b = torch.cat([w * b.double() for w, b, _ in parts], dim=1)
    return b, torch.cat([a.double() for _, _, a in parts])


def truncate(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The best approximation of a product B A at a rank.

    The singular values of B A are those of R_B R_Aᵀ, of the QR factors of B and Aᵀ, so that no
    matrix is larger than the factors where they are thin; the product itself is decomposed where
    they are not.

    Args:
        b: float64 [D_out, R].
        a: float64 [R, D_in].
        rank: r, of the result; where the product has less, the rest is zero.

    Returns:
        B [D_out, r] and A [r, D_in], float64, singular values shared out evenly; and the sums of
        squares of the singular values that are left out, and of all.
    """
    if b.shape[1] < min(b.shape[0], a.shape[1]):
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        u, vh = q_b @ u[:, :rank], vh[:rank] @ q_a.T
    else:
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        u, vh = u[:, :rank], vh[:rank]
    root = s[:rank].sqrt()
    energy = s.square()
    new_b, new_a = u * root, root[:, None] * vh
    if len(root) < rank:
        more = rank - len(root)
        new_b = torch.cat([new_b, new_b.new_zeros(len(new_b), more)], dim=1)
        new_a = torch.cat([new_a, new_a.new_zeros(more, new_a.shape[1])])
    return new_b, new_a, (float(energy[rank:].sum()), float(energy.sum()))


def orthonormal(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Other factors of the same product B A: A has its right singular vectors as rows.

    Source: FedSVD, arXiv:2505.12805, section 3.

    Args:
        b: float64 [D_out, r].
        a: float64 [r, D_in], r at most D_in.

    Returns:
        B [D_out, r] and A [r, D_in], float64.
    """
    q, r = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(b @ r.T, full_matrices=False)
    if len(s) < a.shape[0]:  # fewer outputs than ranks
        u, s, vh = torch.linalg.svd(b @ r.T)
        s = torch.cat([s, s.new_zeros(a.shape[0] - len(s))])
        u = torch.cat([u, u.new_zeros(len(u), a.shape[0] - u.shape[1])], dim=1)
    return u[:, : len(s)] * s, vh @ q.T
