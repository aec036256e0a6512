"""A plan: what a proxy keeps of every block of the FM, and how names differ between the two.

A `Plan` is a pure value: for every block of the FM the kept neurons, or that the block is
whole, or that it is dropped (layer-drop proxies). A proxy is always rebuilt from its plan,
because a Hugging Face config holds one FFN width and a proxy has several.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedpft_core.model.families import FFN, family_of


@dataclass(frozen=True)
class BlockPlan:
    """What the proxy keeps of one block: `whole`, `pruned` to `kept`, or `dropped`.

    In a pruned block query and key have rank `qk_rank`; 0 = as in the FM. `neurons` is the FM's FFN
    width in this block where it is not the plan's `fm_neurons`; 0 = as that.
    """

    state: str
    kept: tuple[int, ...] = ()
    qk_rank: int = 0
    neurons: int = 0

    def as_raw(self) -> dict[str, Any]:
        """The entry as JSON values.

        Returns:
            `state` and `kept`, and `qk_rank` and `neurons` where they are not 0.
        """
        # Left out where there is none, so that plans without it keep their digest.
        low = {"qk_rank": self.qk_rank} if self.qk_rank else {}
        own = {"neurons": self.neurons} if self.neurons else {}
        return {"state": self.state, "kept": list(self.kept), **low, **own}


@dataclass(frozen=True)
class Plan:
    """One entry per block of the FM, in order; `fm_neurons` is the FM's FFN width F.

    Where blocks have widths of their own (UNets) it is the first one's, and entries say theirs.
    """

    model_type: str
    fm_neurons: int
    blocks: tuple[BlockPlan, ...]

    @property
    def pruned(self) -> tuple[int, ...]:
        """FM indices of the blocks whose FFN is compressed."""
        return tuple(i for i, b in enumerate(self.blocks) if b.state == "pruned")

    @property
    def present(self) -> tuple[int, ...]:
        """FM indices of the blocks the proxy has; their position here is the proxy's index."""
        return tuple(i for i, b in enumerate(self.blocks) if b.state != "dropped")

    def neurons(self, block: int) -> int:
        """Neurons that the FM's FFN has in a block.

        Args:
            block: its position in the FM.

        Returns:
            F of this block.
        """
        return self.blocks[block].neurons or self.fm_neurons

    @property
    def is_full(self) -> bool:
        """Whether every block is whole, so that the proxy is the FM itself."""
        return all(b.state == "whole" for b in self.blocks)

    def anonymous(self) -> Plan:
        """The same plan without saying which neurons are kept.

        Returns:
            A plan that as many neurons are kept of, with the first ones in their place.
        """
        return replace(
            self, blocks=tuple(replace(b, kept=tuple(range(len(b.kept)))) for b in self.blocks)
        )

    def as_raw(self) -> dict[str, Any]:
        """The plan as JSON values.

        Returns:
            What `from_raw` reads.
        """
        return {
            "model_type": self.model_type,
            "fm_neurons": self.fm_neurons,
            "blocks": [b.as_raw() for b in self.blocks],
        }

    def to_json(self) -> str:
        """The plan as JSON text.

        Returns:
            One line without blanks; equal plans give equal texts.
        """
        return json.dumps(self.as_raw(), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Plan:
        """A plan from its JSON text.

        Args:
            text: what `to_json` has written.

        Returns:
            The plan, checked.

        Raises:
            ValueError: when the text is no valid plan.
        """
        return Plan.from_raw(json.loads(text))

    @staticmethod
    def from_raw(raw: Any) -> Plan:
        """A plan from JSON values.

        Args:
            raw: what `as_raw` gives, or anything else that came over the network.

        Returns:
            The plan: every kept neuron in range and in order, every rank on a pruned block.

        Raises:
            ValueError: when they are no valid plan.
        """
        try:
            blocks = tuple(
                BlockPlan(b["state"], tuple(b["kept"]), b.get("qk_rank", 0), b.get("neurons", 0))
                for b in raw["blocks"]
            )
            plan = Plan(raw["model_type"], raw["fm_neurons"], blocks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan: {error!r}") from error
        if not isinstance(plan.model_type, str) or type(plan.fm_neurons) is not int:
            raise ValueError("not a plan: the model's type or width is not valid")
        for i, b in enumerate(blocks):
            if type(b.neurons) is not int or b.neurons < 0:
                raise ValueError(f"not a plan: the width of block {i} is not valid")
            in_range = all(type(j) is int and 0 <= j < plan.neurons(i) for j in b.kept)
            in_order = in_range and all(x < y for x, y in zip(b.kept, b.kept[1:], strict=False))
            if b.state not in ("whole", "pruned", "dropped"):
                raise ValueError(f"not a plan: block {i} is {b.state!r}")
            if (b.state == "pruned") != bool(b.kept) or not in_order:
                raise ValueError(f"not a plan: the kept neurons of block {i} are not valid")
            rank_ok = type(b.qk_rank) is int and b.qk_rank >= 0
            if not rank_ok or (b.qk_rank and b.state != "pruned"):
                raise ValueError(f"not a plan: the rank of block {i} is not valid")
        return plan


def pruned_ffns(proxy: nn.Module, plan: Plan) -> dict[int, FFN]:
    """Views of the proxy's compressed FFNs.

    Args:
        proxy: built from the plan, bare or with the adapter.
        plan: says which blocks are pruned.

    Returns:
        By the block's position in the FM.
    """
    ffns = family_of(plan.model_type).ffns(proxy)
    position = {fm: i for i, fm in enumerate(plan.present)}
    return {i: ffns[position[i]] for i in plan.pruned}


def block_parameters(blocks: Iterable[nn.Module]) -> int:
    """Parameters inside the given blocks, which is what the paper's sizes count.

    Args:
        blocks: the blocks to count.

    Returns:
        Number of parameters.
    """
    return sum(p.numel() for b in blocks for p in b.parameters())
