"""Frozen weights as they travel and lie on disk: each in the smallest form that keeps its bits.

The server rounds a sub-FM's weights to what `wire.package` says and goes on with the rounded
ones, so what has to arrive are bits of float32. `smallest` finds the form they fit into, and tries
each by reading it back: a tensor that fits into nothing smaller travels as it is. A receiver needs
to know nothing but the tensor's type and shape, and holds the digest of what it reads against the
digest it was promised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.wire import rounding

PACKAGE_FORMATS = ("fp32", "bf16", "fp16", "int8")
EMBEDDING_FORMATS = ("same", "int4")
_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLE = 4  # rows or columns that a form is tried on first


@dataclass(frozen=True)
class Coded:
    """A tensor in one of its forms: as it is, cast, or whole numbers with a scale."""

    values: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        more = self.scale.nbytes if self.scale is not None else 0
        return self.values.nbytes + more

    def decoded(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor that a form stands for.

        Args:
            dtype: the tensor's type.
            shape: the tensor's shape.

        Returns:
            The tensor, of that type and shape.

        Raises:
            ReplyError: the form is none of a tensor of that type and shape.
        """
        values, scale = self.values, self.scale
        same = tuple(values.shape) == shape
        if scale is None and same and values.dtype == dtype:
            return values
        if dtype == torch.float32 and scale is None and same and values.dtype in _CASTS.values():
            return values.float()
        if dtype == torch.float32 and scale is not None and scale.dtype == torch.bfloat16:
            own = tuple(scale.shape)
            axes = {rounding.scale_shape(shape, axis) for axis in range(len(shape))}
            if values.dtype == torch.int8 and same and own in axes:
                return rounding.of_int8(values, scale)
            if values.dtype == torch.uint8 and len(shape) == 2:
                rows, columns = shape
                want = (rows, math.ceil(columns / 2)), (rows, math.ceil(columns / rounding.GROUP))
                if (tuple(values.shape), own) == want:
                    return rounding.of_int4(values, scale, columns)
        raise ReplyError(
            f"a tensor came as {str(values.dtype)[6:]}{list(values.shape)}, which is no form of "
            f"{str(dtype)[6:]}{list(shape)}"
        )


def rounded(t: Tensor, fmt: str, axis: int = 0) -> Tensor:
    """What a wire format leaves of a weight.

    Args:
        t: any tensor. Those that are not float32 stay as they are, and in int8 vectors as well: of
            a model's numbers these are few, and much depends on each.
        fmt: one of `PACKAGE_FORMATS`, or `int4`, which is for matrices.
        axis: in int8 there is one scale for each index of this axis.

    Returns:
        float32 in the shape of `t`; rounding it once more changes nothing.

    Raises:
        ValueError: the numbers are too large for the format.
    """
    t = t.detach().cpu().contiguous()
    if t.dtype != torch.float32 or fmt == "fp32":
        return t
    if fmt in _CASTS:
        out = t.to(_CASTS[fmt]).float()
    elif t.dim() < 2:
        return t
    elif fmt == "int4" and t.dim() == 2:
        out = rounding.of_int4(*rounding.to_int4(t), t.shape[1])
    else:
        out = rounding.of_int8(*rounding.to_int8(t, axis))
    if bool((~out.isfinite() & t.isfinite()).any()):
        raise ValueError(f"{fmt} cannot hold numbers as large as {float(t.abs().max()):.3g}")
    return out


def smallest(t: Tensor) -> Coded:
    """The smallest form that keeps every bit of a tensor.

    Args:
        t: on the CPU.

    Returns:
        A form that `decoded` makes exactly `t` of.
    """
    t = t.detach().contiguous()
    if t.dtype != torch.float32 or not t.numel():
        return Coded(t)
    for sample, form in _forms(t):
        if sample is not None and not _keeps(form(sample), sample):
            continue
        found = form(t)
        if _keeps(found, t):
            return found
    return Coded(t)


def _forms(t: Tensor) -> Iterator[tuple[Tensor | None, Callable[[Tensor], Coded]]]:
    """The forms a tensor could have, smallest first, each with a part to try it on first."""
    if t.dim() == 2:
        yield t[:_SAMPLE], lambda x: Coded(*rounding.to_int4(x))
    if t.dim() > 1:
        yield t[:_SAMPLE], lambda x: Coded(*rounding.to_int8(x, 0))
        yield t[:, :_SAMPLE].contiguous(), lambda x: Coded(*rounding.to_int8(x, 1))
    for cast in _CASTS.values():
        yield t.reshape(-1)[: 2**10], lambda x, cast=cast: Coded(x.to(cast))  # type: ignore[misc]


def _keeps(form: Coded, t: Tensor) -> bool:
    """Whether a form has the very bits: zeros may have a sign, which `==` does not see."""
    found = form.decoded(torch.float32, tuple(t.shape)).contiguous()
    return torch.equal(found.view(torch.int32), t.contiguous().view(torch.int32))
