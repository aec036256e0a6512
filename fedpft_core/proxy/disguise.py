"""A disguise: the proxy's neurons in another order and, where that is exact, on another scale.

The proxy computes what it computed before. What a client gets no longer says which neuron of the
FM is which, and a scaled neuron has none of the FM's bits. It is no secret from somebody who has
a neuron of the FM to compare with: directions of rows and columns stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_core.model.families import FFN, family_of
from fedpft_core.model.plan import Plan
from fedpft_core.tensors import Tensors

_WIDEST = 2.0  # a neuron's scale lies between 1 / this and this


@dataclass(frozen=True)
class Disguise:
    """How the neurons of each block of a proxy are hidden.

    Attributes:
        order: by FM block, int64 [K]: which neuron of the proxy as built stands at each place.
        scale: by FM block, float32 [K], in the new order; 1 where scaling is not exact.
    """

    order: Mapping[int, Tensor]
    scale: Mapping[int, Tensor]

    def tensors(self) -> Tensors:
        """The disguise as tensors, to be kept.

        Returns:
            What :meth:`read` takes.
        """
        return {f"order/{b}": t for b, t in self.order.items()} | {
            f"scale/{b}": t for b, t in self.scale.items()
        }

    @staticmethod
    def read(tensors: Tensors) -> Disguise:
        """The inverse of :meth:`tensors`.

        Args:
            tensors: by name.

        Returns:
            The disguise.

        Raises:
            ValueError: they are none.
        """
        found: dict[str, dict[int, Tensor]] = {"order": {}, "scale": {}}
        for name, value in tensors.items():
            kind, _, block = name.partition("/")
            if kind not in found or not block.isdecimal():
                raise ValueError(f"{name} is no part of a disguise")
            found[kind][int(block)] = value
        for place, order in found["order"].items():
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise ValueError(f"the order of block {place} is none")
        if found["order"].keys() != found["scale"].keys():
            raise ValueError("orders and scales are of different blocks")
        return Disguise(found["order"], found["scale"])


def scales_exactly(ffn: FFN) -> bool:
    """Whether a neuron can be scaled on its way in and back on its way out.

    Args:
        ffn: of FM or proxy.

    Returns:
        True for gated FFNs, whose up-projection is linear, and for activations f with
        f(c·x) = c·f(x) for c above 0, as ReLU.
    """
    if len(ffn.ins) > 1:
        return True
    x = torch.linspace(-4, 4, 65)
    f = ffn.activation
    return bool(torch.equal(f(2 * x), 2 * f(x)) and torch.equal(f(0.25 * x), 0.25 * f(x)))


def draw(proxy: nn.Module, plan: Plan, seed: int) -> Disguise:
    """A disguise for a proxy.

    Args:
        proxy: built from the plan; not changed.
        plan: says which blocks there are. All of their neurons are disguised, whole blocks' too.
        seed: of the system's entropy; what a seed of the run gives, every client could undo.

    Returns:
        An order of each block, uniform, and scales, log-uniform between 1/2 and 2.
    """
    stream = np.random.default_rng(seed)
    order, scale = {}, {}
    for b, ffn in _blocks(proxy, plan).items():
        order[b] = torch.from_numpy(stream.permutation(ffn.neurons))
        logs = torch.from_numpy(stream.uniform(-1, 1, ffn.neurons))
        exact = scales_exactly(ffn)
        scale[b] = (_WIDEST ** (logs if exact else 0 * logs)).float()
    return Disguise(order, scale)


@torch.no_grad()
def put_on(proxy: nn.Module, plan: Plan, disguise: Disguise) -> Plan:
    """Disguise a proxy in place.

    Args:
        proxy: bare or with the adapter attached.
        plan: what it was built from.
        disguise: drawn for this proxy.

    Returns:
        The plan with the kept neurons of pruned blocks in the proxy's new order.

    Raises:
        ValueError: the disguise is for another proxy.
    """
    blocks = _blocks(proxy, plan)
    if {b: ffn.neurons for b, ffn in blocks.items()} != {
        b: len(t) for b, t in disguise.order.items()
    }:
        raise ValueError("the disguise is for another proxy")
    entries = list(plan.blocks)
    for b, ffn in blocks.items():
        order, scale = disguise.order[b], disguise.scale[b]
        scaled = ffn.ins[-1]  # of a gated FFN the up-projection
        for part, p in ffn.parts().items():
            axis = FFN.neuron_axis(part)
            if axis is not None:
                p.copy_(p.index_select(axis, order.to(p.device)))
        s = scale.to(ffn.out.weight)
        scaled.weight.mul_(s[:, None])
        if scaled.bias is not None:
            scaled.bias.mul_(s)
        ffn.out.weight.div_(s)
        if entries[b].kept:
            kept = entries[b].kept
            entries[b] = replace(entries[b], kept=tuple(kept[i] for i in order.tolist()))
    return replace(plan, blocks=tuple(entries))


def _blocks(proxy: nn.Module, plan: Plan) -> dict[int, FFN]:
    """Views of the proxy's FFNs by FM block."""
    return dict(zip(plan.present, family_of(plan.model_type).ffns(proxy), strict=True))
