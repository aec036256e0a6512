"""Instruments for the link between proxy and FM, by the adapter's gradients on both.

What clients send is a gradient of the proxy, what the owner keeps is the FM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.model.device import Batch
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import Plan
from fedpft_core.task import Task
from fedpft_core.train.gradient import adapter_gradient


@dataclass(frozen=True)
class Agreement:
    """How alike two adapter gradients are.

    Attributes:
        cosine: of the angle between them, in [-1, 1].
        relative_l2: ||g_proxy − g_fm|| / ||g_fm||.
    """

    cosine: float
    relative_l2: float


def agreement(fm: Mapping[str, Tensor], proxy: Mapping[str, Tensor]) -> Agreement:
    """Compare two gradients over the names they share (all of the proxy's).

    Args:
        fm: the FM's gradient, by FM name.
        proxy: the proxy's gradient, by FM name; every name must be one of the FM's.

    Returns:
        Cosine and relative distance; both NaN where a gradient is zero.
    """
    dot = fm_sq = proxy_sq = 0.0
    for name, g in proxy.items():
        f = fm[name]
        dot += float((f * g).sum())
        fm_sq += float(f.square().sum())
        proxy_sq += float(g.square().sum())
    if fm_sq == 0 or proxy_sq == 0:
        return Agreement(float("nan"), float("nan"))
    # Rounding can make the difference of equal gradients slightly negative.
    distance = max(0.0, fm_sq - 2 * dot + proxy_sq) ** 0.5
    return Agreement(dot / (fm_sq * proxy_sq) ** 0.5, distance / fm_sq**0.5)


def gradient_agreement(
    fm: nn.Module,
    proxy: nn.Module,
    plan: Plan,
    task: Task,
    data: Encoded,
    batch_size: int,
    b_only: bool,
) -> dict[str, Any]:
    """Compare the adapter gradients of FM and proxy on encoded rows.

    See :func:`compare_gradients`.

    Args:
        fm: the FM with the adapter.
        proxy: the proxy with the adapter.
        plan: the plan that relates their names.
        task: whose loss is differentiated.
        data: labelled rows.
        batch_size: rows at once.
        b_only: take LoRA's B alone.

    Returns:
        What :func:`compare_gradients` gives.
    """
    rows = list(batches(data, batch_size, None))
    return compare_gradients(fm, proxy, plan, task, rows, b_only)


def compare_gradients(
    fm: nn.Module,
    proxy: nn.Module,
    plan: Plan,
    task: Task,
    rows: Sequence[Batch],
    b_only: bool,
) -> dict[str, Any]:
    """Compare the adapter gradients of FM and proxy on the same labelled batches, dropout off.

    Over all LoRA parameters, per FM block, and the head apart.

    Args:
        fm: the FM with the adapter.
        proxy: the proxy with the adapter.
        plan: the plan that relates their names.
        task: whose loss is differentiated.
        rows: labelled batches.
        b_only: take LoRA's B alone: at the start B = 0 makes the gradient of A exactly 0.

    Returns:
        `cosine` and `relative_l2` over LoRA's factors, `head_cosine` and `head_relative_l2`, and
        `blocks`, one entry for each block of the proxy.
    """
    g_fm = adapter_gradient(fm, task, rows)
    g_proxy = adapter_gradient(proxy, task, rows, plan)
    suffix = ".lora_B.weight" if b_only else ".weight"
    lora = {k: g for k, g in g_proxy.items() if ".lora_" in k and k.endswith(suffix)}
    head = {k: g for k, g in g_proxy.items() if ".lora_" not in k}
    prefix = family_of(plan.model_type).blocks + "."
    blocks = []
    for block in plan.present:
        part = {k: g for k, g in lora.items() if k.startswith(f"{prefix}{block}.")}
        a = agreement(g_fm, part)
        blocks.append({"block": block, "cosine": a.cosine, "relative_l2": a.relative_l2})
    total, on_head = agreement(g_fm, lora), agreement(g_fm, head)
    return {
        "cosine": total.cosine,
        "relative_l2": total.relative_l2,
        "head_cosine": on_head.cosine,
        "head_relative_l2": on_head.relative_l2,
        "blocks": blocks,
    }
