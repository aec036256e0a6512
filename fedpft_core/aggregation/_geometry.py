"""Inner products between the changes that clients made, and means with given coefficients.

Almost every robust rule needs no more of the replies than their Gram matrix: from it follow
distances, norms and angles, also those of every weighted mean. With `federation.distance =
product` a LoRA pair stands for its product s·BA, which is what the model adds to its weight: two
pairs may differ in every value and change the model alike, or differ in one sign and change it
oppositely. The product is never formed: <BA, B'A'> = sum((B^T B') * (A A'^T)), two r x r matrices.
The product alone can be cheated: (tA, B/t) has the product of (A, B), and spoils a mean of
factors. `both` adds the two Gram matrices, each relative to its median squared norm.

Shape letters: N replies and other points, R rank, O and I a layer's outputs and inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpft_core.aggregation import Replies
from fedpft_core.model.names import is_lora
from fedpft_core.tensors import Tensors

_A, _B = "lora_A.weight", "lora_B.weight"
_ROWS = 512  # rows of stacked factors that are multiplied at once
_ROUNDING = 1e-12
_SLICE = 2**20  # values compared at once, over all replies


def gram(replies: Replies, more: Sequence[Mapping[str, Tensor]] = ()) -> Tensor:
    """Inner products of the changes since `replies.start`.

    Memory is that of one tensor of every reply.

    Args:
        replies: N of them; `replies.settings.distance` says of what the products are taken.
        more: other adapters that are compared with them, M of them.

    Returns:
        float64 [N + M, N + M], first the replies in the order of their names. With distances of
        `both` it is relative to the median squared norm.
    """
    kind = replies.settings.distance
    if kind != "both":
        return _gram(replies, more, kind == "product")
    found = (_gram(replies, more, product) for product in (True, False))
    return sum((_relative(g) for g in found), torch.zeros(()))


def _relative(inner: Tensor) -> Tensor:
    """A Gram matrix over the median of its diagonal, where that is not 0."""
    middle = float(inner.diagonal().quantile(0.5))
    return inner / middle if middle > 0 else inner


def _gram(replies: Replies, more: Sequence[Mapping[str, Tensor]], product: bool) -> Tensor:
    size = len(replies) + len(more)
    total = torch.zeros(size, size, dtype=torch.float64)
    pairs = _pairs(replies) if product else {}
    for key in replies.start:
        if key in pairs:
            a, b = _all(replies, more, key), _all(replies, more, pairs[key])
            total += replies.settings.scaling**2 * _centred(_products(a, b))
        elif key not in pairs.values():
            total += _plain(replies, more, key)
    return total


def squared_distances(inner: Tensor) -> Tensor:
    """Squares of the distances between points.

    Args:
        inner: their Gram matrix, float64 [N, N].

    Returns:
        float64 [N, N], zeros on the diagonal, nothing negative.
    """
    norms = inner.diagonal()
    found = (norms[:, None] + norms[None, :] - 2 * inner).clamp_min(0)
    return found.fill_diagonal_(0)


def combine(
    replies: Replies, coefficients: Sequence[float], more: Sequence[float] | None = None
) -> Tensors:
    """Start + sum_i c_i (W_i - start), in float64, value by value.

    Args:
        replies: the adapters W_i.
        coefficients: c_i in the order of the names.
        more: further factors of the changes, 1 where None; c_i is multiplied by them.

    Returns:
        Float32 tensors by FM name.
    """
    scales = list(coefficients)
    if more is not None:
        scales = [c * m for c, m in zip(scales, more, strict=True)]
    # What is left of the start; nothing in a mean, where rounding must not leave a trace of it.
    rest = 1 - math.fsum(scales)
    rest = 0.0 if abs(rest) < _ROUNDING else rest
    total = {key: rest * t.double() for key, t in replies.start.items()}
    for (adapter, _), scale in zip(replies, scales, strict=True):
        if scale:
            for key, t in adapter.items():
                total[key] += scale * t.double()
    return {key: t.float() for key, t in total.items()}


def _pairs(replies: Replies) -> dict[str, str]:
    """Names of LoRA's A, each with that of its B."""
    return {
        key: key.removesuffix(_A) + _B
        for key in replies.start
        if is_lora(key) and key.endswith(_A) and key.removesuffix(_A) + _B in replies.start
    }


def _all(replies: Replies, more: Sequence[Mapping[str, Tensor]], key: str) -> Tensor:
    """One tensor of every point, the start last: float32 [N + M + 1, ...]."""
    rest = torch.stack([m[key] for m in more] + [replies.start[key]])
    return torch.cat([replies.stacked(key), rest])


def _products(a: Tensor, b: Tensor) -> Tensor:
    """<B_i A_i, B_j A_j> of A [N, R, I] and B [N, O, R]: float64 [N, N]."""
    n, r, _ = a.shape
    rows_a = a.reshape(n * r, -1)
    rows_b = b.transpose(1, 2).reshape(n * r, -1)
    out = torch.empty(n, n, dtype=torch.float64)
    step = max(1, _ROWS // r)
    whole_a, whole_b = rows_a.double().T, rows_b.double().T
    for i in range(0, n, step):
        at = slice(i * r, min(i + step, n) * r)
        both = (rows_a[at].double() @ whole_a) * (rows_b[at].double() @ whole_b)
        out[i : i + step] = both.reshape(-1, r, n, r).sum(dim=(1, 3))
    return out


def _centred(inner: Tensor) -> Tensor:
    """Inner products of the differences to the last point, without that point."""
    rows, last = inner[:-1, :-1], inner[:-1, -1]
    return rows - last[:, None] - last[None, :] + inner[-1, -1]


def _plain(replies: Replies, more: Sequence[Mapping[str, Tensor]], key: str) -> Tensor:
    """Inner products of one tensor's changes, value by value."""
    points = _all(replies, more, key).flatten(1)
    width = max(1, _SLICE // len(points))
    n = len(points) - 1
    total = torch.zeros(n, n, dtype=torch.float64)
    for at in range(0, points.shape[1], width):
        piece = points[:, at : at + width].double()
        change = piece[:-1] - piece[-1]
        total += change @ change.T
    return total
