"""Tensor formats on the wire, and the safetensors bytes they travel in.

fp32, bf16, fp16: a cast. int8: one scale per row, q = round(x / s), s = max|row| / 127.
A decoded tensor is always float32; tensors that are not floating point travel as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from .errors import ReplyError

Tensors = dict[str, Tensor]

_CASTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE = "//scale"  # suffix of a scale tensor; no parameter name has a slash
FORMATS = (*_CASTS, "int8")


def encode(tensors: Mapping[str, Tensor], fmt: str) -> Tensors:
    """Put float tensors into a wire format. Raises KeyError for an unknown format.

    Values beyond fp16's range become infinite there, and are then refused by validation.
    """
    out: Tensors = {}
    for name, t in tensors.items():
        t = t.detach().cpu()
        if not t.is_floating_point():
            out[name] = t.contiguous()
        elif fmt == "int8":
            rows = t.float().reshape(t.shape[0] if t.dim() > 1 else 1, -1)
            scale = rows.abs().amax(1).div(127)
            safe = torch.where(scale > 0, scale, torch.ones_like(scale))
            out[name] = (rows / safe[:, None]).round().to(torch.int8).reshape(t.shape)
            out[name + _SCALE] = scale
        else:
            out[name] = t.to(_CASTS[fmt]).contiguous()
    return out


def decode(tensors: Mapping[str, Tensor], fmt: str) -> Tensors:
    """The inverse of `encode`, to float32. Raises ReplyError for tensors not in the format."""
    out: Tensors = {}
    for name, t in tensors.items():
        if name.endswith(_SCALE):
            continue
        if fmt == "int8" and t.dtype == torch.int8:
            scale = tensors.get(name + _SCALE)
            rows = t.shape[0] if t.dim() > 1 else 1
            if scale is None or scale.dtype != torch.float32 or scale.shape != (rows,):
                raise ReplyError(f"{name}: int8 without one float32 scale per row")
            out[name] = (t.reshape(rows, -1).float() * scale[:, None]).reshape(t.shape)
        elif t.is_floating_point():
            if fmt == "int8" or t.dtype != _CASTS[fmt]:
                raise ReplyError(f"{name}: dtype {str(t.dtype)[6:]} is not the agreed {fmt}")
            out[name] = t.to(torch.float32)
        else:
            out[name] = t
    return out


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors → safetensors bytes; names sorted, so equal tensors give equal bytes."""
    return _save({k: tensors[k].detach().cpu().contiguous() for k in sorted(tensors)})


def unpack(data: bytes) -> Tensors:
    """The inverse of `pack`. Raises ReplyError when the bytes are no safetensors."""
    try:
        return _load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ReplyError(f"not safetensors ({error})") from error
