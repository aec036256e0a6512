"""Tensor formats on the wire, and the safetensors bytes they travel in.

fp32, bf16, fp16: a cast. int8: whole numbers with a scale for each index of the shorter axis (see
`fedpft_core.wire.rounding`), so a LoRA factor of rank r has r scales whichever way it lies; the
scales of all tensors travel as one.
ternary: one scale per group and two bits a value, for *changes* of tensors only (see below).
A decoded tensor is always float32; tensors that are not floating point travel as they are.

Ternary follows T-FedAvg (arXiv:2003.03564) with the threshold of ternary weight networks: of a
group d, values with |d| > t = 0.7 · mean|d| become ± s, s the mean of their |d|, the rest 0.
Groups lie along the shorter axis, so a LoRA factor of rank r has r scales whichever way it lies.
What rounding took away is handed back as a residual, to be added to the next change before it
is encoded (error feedback): over rounds no part of a change is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.tensors import Tensors
from fedpft_core.wire import rounding

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

_CASTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE = "//scale"  # suffix of a scale tensor; no parameter name has a slash
_THRESHOLD = 0.7
FORMATS = (*_CASTS, "int8")
UPDATE_FORMATS = (*FORMATS, "ternary")  # what `encode_update` takes


def encode(tensors: Mapping[str, Tensor], fmt: str) -> Tensors:
    """Put float tensors into a wire format.

    Values beyond fp16's range become infinite there, and are then refused by validation.

    Args:
        tensors: by name; those that are not floating point travel as they are.
        fmt: one of `FORMATS`.

    Returns:
        Tensors on the CPU by the same names. int8 adds `//scale`, bfloat16: for each tensor, in
        the order of their names, one per index of the shorter axis (one for a vector).

    Raises:
        KeyError: the format is unknown.
    """
    out: Tensors = {}
    scales: Tensors = {}
    for name, t in tensors.items():
        t = t.detach().cpu()
        if not t.is_floating_point():
            out[name] = t.contiguous()
        elif fmt == "int8":
            axis = rounding.shorter_axis(tuple(t.shape))
            out[name], scales[name] = rounding.to_int8(t.contiguous(), axis)
        else:
            out[name] = t.to(_CASTS[fmt]).contiguous()
    if scales:
        out[_SCALE] = torch.cat([scales[name].reshape(-1) for name in sorted(scales)])
    return out


def decode(tensors: Mapping[str, Tensor], fmt: str) -> Tensors:
    """The inverse of `encode`.

    Args:
        tensors: as they came; which there are, and their shapes, is for `check_layout` to check.
        fmt: the format that was agreed.

    Returns:
        float32 tensors by name, and those that are not floating point as they are.

    Raises:
        ReplyError: the format is unknown, or a tensor is not in it.
    """
    if fmt not in FORMATS:
        raise ReplyError(f"unknown format {str(fmt)[:40]!r}")
    scales = _split_scales(tensors) if fmt == "int8" else {}
    out: Tensors = {}
    for name, t in tensors.items():
        if name in scales:
            out[name] = rounding.of_int8(t, scales[name])
        elif t.is_floating_point() and name != _SCALE:
            if fmt == "int8" or t.dtype != _CASTS[fmt]:
                raise ReplyError(f"{name}: dtype {str(t.dtype)[6:]} is not the agreed {fmt}")
            out[name] = t.to(torch.float32)
        elif name != _SCALE:
            out[name] = t
    return out


def _split_scales(tensors: Mapping[str, Tensor]) -> Tensors:
    """The scales of each int8 tensor, in the shape that goes with it."""
    names = sorted(k for k, t in tensors.items() if t.dtype == torch.int8)
    shapes = [_scales(tuple(tensors[k].shape)) for k in names]
    counts = [math.prod(shape) for shape in shapes]
    found = tensors.get(_SCALE, torch.empty(0, dtype=torch.bfloat16))
    if found.dtype != torch.bfloat16 or found.shape != (sum(counts),):
        raise ReplyError("int8 without its bfloat16 scales")
    parts = found.split(counts) if counts else ()
    return {k: p.reshape(shape) for k, p, shape in zip(names, parts, shapes, strict=True)}


# --- updates: what a client sends back, given what it was sent ------------------------------


def encode_update(
    new: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    residual: Mapping[str, Tensor],
    fmt: str,
) -> tuple[Tensors, Tensors]:
    """Encode trained tensors for a receiver that has `base`.

    Formats that carry values ignore `base` and leave no residual. Those that carry changes
    (`ternary`) encode new − base + residual and return what that lost.

    Args:
        new: the trained float32 tensors, by name.
        base: the tensors that the receiver has, by the same names.
        residual: what earlier updates lost, float32; an absent name counts as zero.
        fmt: one of `UPDATE_FORMATS`.

    Returns:
        Wire tensors, and the new residual by name, float32.

    Raises:
        KeyError: the format is unknown.
        ValueError: the names of `new` and `base` differ.
    """
    if fmt != "ternary":
        return encode(new, fmt), {}
    if new.keys() != base.keys():
        raise ValueError("an update needs a base with the same tensors")
    out: Tensors = {}
    left: Tensors = {}
    for name, t in new.items():
        change = t.detach().cpu().float() - base[name]
        if name in residual:
            change = change + residual[name]
        codes, scale = _ternarise(change)
        out[name], out[name + _SCALE] = _pack_codes(codes), scale
        left[name] = change - _spread(codes, scale, change.shape)
    return out, left


def decode_update(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], fmt: str) -> Tensors:
    """The inverse of `encode_update`.

    Args:
        tensors: as they came.
        base: the tensors that both sides had; read by formats that carry changes only.
        fmt: the format that was agreed.

    Returns:
        The trained tensors, float32, by name.

    Raises:
        ReplyError: the tensors are not in the format, or changes do not fit `base`.
    """
    if fmt != "ternary":
        return decode(tensors, fmt)
    check_layout(tensors, update_layout(base, fmt))
    out: Tensors = {}
    for name, t in base.items():
        codes = _unpack_codes(name, tensors[name], t.numel())
        scale = tensors[name + _SCALE]
        if not bool((scale >= 0).all()):
            raise ReplyError(f"{name}: a ternary scale is negative or not a number")
        out[name] = t.float() + _spread(codes, scale, t.shape)
    return out


def update_layout(base: Mapping[str, Tensor], fmt: str) -> Layout:
    """Names, dtypes and shapes that `encode_update` gives.

    Args:
        base: tensors shaped like those encoded; their values are not looked at.
        fmt: one of `UPDATE_FORMATS`.

    Returns:
        Dtype and shape of every wire tensor, by name.

    Raises:
        KeyError: the format is unknown.
    """
    out: Layout = {}
    scales = 0
    for name, t in base.items():
        shape = tuple(t.shape)
        if fmt == "ternary":
            out[name] = (torch.uint8, (math.ceil(t.numel() / 4),))
            out[name + _SCALE] = (torch.float32, (_groups(shape),))
        elif not t.is_floating_point():
            out[name] = (t.dtype, shape)
        elif fmt == "int8":
            out[name] = (torch.int8, shape)
            scales += math.prod(_scales(shape))
        else:
            out[name] = (_CASTS[fmt], shape)
    if scales:
        out[_SCALE] = (torch.bfloat16, (scales,))
    return out


def layout_bytes(layout: Layout) -> int:
    """Size of the values of such tensors, without the safetensors header.

    Args:
        layout: what :func:`update_layout` gives.

    Returns:
        Bytes.
    """
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def check_layout(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Refuse tensors whose names, dtypes and shapes are not exactly those of the layout.

    Args:
        tensors: as they came.
        layout: what :func:`update_layout` gives.

    Raises:
        ReplyError: naming a tensor that is missing, unexpected, or of another dtype or shape.
    """
    if tensors.keys() != layout.keys():
        odd = min(tensors.keys() ^ layout.keys())
        side = "unexpected" if odd in tensors else "missing"
        raise ReplyError(f"{side} tensor {odd[:120]!r}")
    for name, (dtype, shape) in layout.items():
        t = tensors[name]
        if t.dtype != dtype or tuple(t.shape) != shape:
            raise ReplyError(
                f"tensor {name} is {str(t.dtype)[6:]}{list(t.shape)}, "
                f"not {str(dtype)[6:]}{list(shape)}"
            )


def _scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    return rounding.scale_shape(shape, rounding.shorter_axis(shape))


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _groups(shape: tuple[int, ...]) -> int:
    return min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else 1


def _grouped(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[groups, members]: rows of a wide matrix, columns of a tall one, all of a vector."""
    rows = flat.reshape(_rows(shape), -1)
    return rows if len(rows) == _groups(shape) else rows.T


def _ternarise(change: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8, −1, 0, 1, flat as the tensor lies) and one scale per group."""
    shape = tuple(change.shape)
    groups = _grouped(change, shape)
    size = groups.abs()
    large = size > _THRESHOLD * size.double().mean(1, keepdim=True)
    count = large.sum(1)
    scale = (size.double() * large).sum(1) / count.clamp(min=1)
    codes = (groups.sign() * large).to(torch.int8)
    flat = codes if len(codes) == _rows(shape) else codes.T
    return flat.reshape(-1), scale.float()


def _spread(codes: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    groups = _grouped(codes.float(), tuple(shape)) * scale[:, None]
    flat = groups if len(groups) == _rows(tuple(shape)) else groups.T
    return flat.reshape(shape)


def _pack_codes(codes: Tensor) -> Tensor:
    """Four values a byte, the first in the lowest bits: 0 → 0, +1 → 1, −1 → 2."""
    two_bits = torch.where(codes < 0, 2, codes.to(torch.int64)).to(torch.uint8)
    padded = torch.zeros(4 * math.ceil(len(codes) / 4), dtype=torch.uint8)
    padded[: len(codes)] = two_bits
    quads = padded.reshape(-1, 4)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6


def _unpack_codes(name: str, packed: Tensor, count: int) -> Tensor:
    two_bits = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], 1).reshape(-1)
    if bool((two_bits == 3).any()) or bool(two_bits[count:].any()):
        raise ReplyError(f"{name}: not ternary codes")
    codes = two_bits[:count].to(torch.int8)
    return torch.where(codes == 2, -1, codes)


# --- bytes --------------------------------------------------------------------------------


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors → safetensors bytes.

    Args:
        tensors: by name; there may be none.

    Returns:
        One blob, names sorted, so that equal tensors give equal bytes.
    """
    return _save({k: tensors[k].detach().cpu().contiguous() for k in sorted(tensors)})


def unpack(data: bytes) -> Tensors:
    """The inverse of `pack`.

    Args:
        data: bytes as they came.

    Returns:
        Tensors on the CPU, by name.

    Raises:
        ReplyError: the bytes are no safetensors.
    """
    try:
        return _load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise ReplyError(f"not safetensors ({str(error)[:200]})") from error
