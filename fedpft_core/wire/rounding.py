"""Numbers in 8 and 4 bits, with a bfloat16 scale for each row, column or group.

A value is q · s: q a whole number of at most 127 (8 bits) or 7 (4 bits), s = max|row| / 127 or
/ 7, rounded to bfloat16. Both have at most 8 significant bits, so their product is exact in
float32, and it is the same on every machine. Rounding what has been rounded changes nothing: the
largest q of a row is always 127 (or 7), however s was rounded, so that the same s comes out again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 32
"""Values that share a scale in 4 bits, along a row."""
_BYTE, _NIBBLE = 127, 7
_LEAST = 2.0**-126  # smaller scales have fewer significant bits, and their rows become 0


def scale_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of 8-bit scales.

    Args:
        shape: of the tensor.
        axis: one scale for each index of this axis; a vector has one in all.

    Returns:
        As many axes as the tensor has, all of them 1 but that one.
    """
    return tuple(n if i == axis and len(shape) > 1 else 1 for i, n in enumerate(shape))


def shorter_axis(shape: tuple[int, ...]) -> int:
    """The axis of a matrix along which it has fewer scales.

    A LoRA factor of rank r has r scales whichever way it lies.

    Args:
        shape: of the tensor.

    Returns:
        1 for a matrix that is taller than wide; 0 otherwise.
    """
    return 1 if len(shape) == 2 and shape[1] < shape[0] else 0


def to_int8(t: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Round a tensor to 8 bits.

    Args:
        t: of a float type and any shape.
        axis: one scale for each index of this axis; a vector has one in all.

    Returns:
        Whole numbers, int8 in the shape of `t`, and scales, bfloat16 in `scale_shape`.
    """
    t = t.float()
    keep = scale_shape(tuple(t.shape), axis)
    if not t.numel():
        return t.to(torch.int8), t.new_zeros(keep, dtype=torch.bfloat16)
    others = tuple(i for i, n in enumerate(keep) if n != t.shape[i] or n == 1)
    top = t.abs().amax(others, keepdim=True) if others else t.abs()
    return _rounded(t, top, _BYTE)


def of_int8(q: Tensor, scale: Tensor) -> Tensor:
    """The values that 8 bits stand for.

    Args:
        q: int8.
        scale: bfloat16, of a shape that goes with it.

    Returns:
        float32 in the shape of `q`.
    """
    # In place: what is made beside what is kept leaves holes in the heap, as large as the model.
    return q.float().mul_(scale.float())


def to_int4(t: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 4 bits.

    Args:
        t: [n, m] of a float type.

    Returns:
        Two numbers a byte, uint8 [n, ⌈m / 2⌉], the first in the lower bits, each 8 more than what
        it stands for; and scales, bfloat16 [n, ⌈m / GROUP⌉].
    """
    rows, columns = t.shape
    groups = math.ceil(columns / GROUP)
    padded = t.new_zeros(rows, groups * GROUP, dtype=torch.float32)
    padded[:, :columns] = t
    grouped = padded.reshape(rows, groups, GROUP)
    q, scale = _rounded(grouped, grouped.abs().amax(2, keepdim=True), _NIBBLE)
    codes = (q.reshape(padded.shape)[:, : 2 * math.ceil(columns / 2)] + 8).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, scale[:, :, 0]


def of_int4(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The values that 4 bits stand for.

    Args:
        codes: uint8 [n, ⌈columns / 2⌉].
        scale: bfloat16 [n, ⌈columns / GROUP⌉].
        columns: of the matrix.

    Returns:
        float32 [n, columns].
    """
    both = torch.stack([codes & 15, codes >> 4], 2)
    q = both.reshape(len(codes), 2 * codes.shape[1])[:, :columns]
    spread = scale.float().repeat_interleave(GROUP, 1)[:, :columns]
    return (q.float() - 8) * spread


def _rounded(t: Tensor, top: Tensor, most: int) -> tuple[Tensor, Tensor]:
    scale = (top / most).to(torch.bfloat16)
    scale = torch.where(scale.float() < _LEAST, torch.zeros_like(scale), scale)
    whole = torch.where(scale > 0, scale.float(), torch.ones_like(top))
    return (t / whole).round().clamp(-most, most).to(torch.int8), scale
