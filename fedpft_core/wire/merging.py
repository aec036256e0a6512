"""Merging figures on the wire: their format, and what they are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec

FORMATS = {"fisher": "bf16", "gram": "fp32"}
"""How merging figures travel, by what they are (see `fedpft_core.train.merging`)."""


def layout(rule: str, trained: Mapping[str, Tensor]) -> codec.Layout:
    """Names, dtypes and shapes of merging figures on the wire.

    Args:
        rule: what they are, a key of `FORMATS`, or empty for none.
        trained: the adapter's tensors that a client trains.

    Returns:
        Dtype and shape by name.
    """
    if not rule:
        return {}
    like = trained if rule == "fisher" else _grams(trained)
    return codec.update_layout(like, FORMATS[rule])


def shapes(rule: str, trained: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of merging figures.

    Args:
        rule: what they are, or empty for none.
        trained: the adapter's tensors that a client trains.

    Returns:
        Shapes by name.
    """
    return {name: shape for name, (_, shape) in layout(rule, trained).items()}


def checked(rule: str, found: Mapping[str, Tensor]) -> Tensors:
    """Merging figures as a rule of aggregation may use them.

    Args:
        rule: what they are.
        found: as they came, of the right layout.

    Returns:
        float32 tensors by name.

    Raises:
        ValueError: naming a tensor that such figures cannot be.
    """
    out = codec.decode(found, FORMATS[rule])
    for name, t in out.items():
        if not bool(t.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
        _CHECKS[rule](name, t)
    return out


def _not_negative(name: str, t: Tensor) -> None:
    if bool((t < 0).any()):
        raise ValueError(f"{name} has negative squares")


def _moments(name: str, t: Tensor) -> None:
    wide = t.double()
    size = float(wide.diagonal().sum())
    if not bool(torch.isclose(wide, wide.T, rtol=0, atol=1e-5 * abs(size)).all()):
        raise ValueError(f"{name} is not symmetric")
    if float(torch.linalg.eigvalsh(wide).min()) < -1e-4 * abs(size):
        raise ValueError(f"{name} is no mean of products z zᵀ (a negative eigenvalue)")


_CHECKS: dict[str, Callable[[str, Tensor], None]] = {"fisher": _not_negative, "gram": _moments}


def _grams(trained: Mapping[str, Tensor]) -> Tensors:
    """Tensors shaped as the Gram matrices of an adapter's B."""
    return {
        name: t.new_empty(t.shape[1], t.shape[1])
        for name, t in trained.items()
        if name.endswith("lora_B.weight")
    }


def widened(found: Tensors, wide: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Merging figures of a lower rank among those of the run's: what was not trained has no say.

    Args:
        found: float32, of the client's rank.
        wide: shapes at the run's rank.

    Returns:
        float32, of these shapes; zero where there was nothing.
    """
    out: Tensors = {}
    for name, t in found.items():
        if tuple(t.shape) == wide[name]:
            out[name] = t
            continue
        out[name] = t.new_zeros(wide[name])
        out[name][tuple(slice(0, n) for n in t.shape)] = t
    return out


__all__ = ["FORMATS", "checked", "layout", "shapes", "widened"]
