"""FM and proxy side by side on the server, with the same adapter on both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from peft import PeftModel
from torch import Tensor

from fedpft_core.adapter import lora as adapters
from fedpft_core.align.blocks import moving_parts
from fedpft_core.model.names import bare
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.disguise import Disguise
from fedpft_core.tensors import Tensors


@dataclass(frozen=True)
class Width:
    """One of several sub-FMs of the FM, with the adapter attached.

    Attributes:
        name: its entry in plan.widths.
        plan: what it keeps.
        proxy: the model.
    """

    name: str
    plan: Plan
    proxy: PeftModel

    def trained_names(self) -> list[str]:
        """Names in the package of the weights alignment may move.

        Returns:
            The names, sorted.
        """
        moving = {id(p) for p in moving_parts(self.proxy, self.plan).values()}
        return sorted(k for k, p in self._frozen().items() if id(p) in moving)

    def _frozen(self) -> Tensors:
        """The proxy's parameters by their name in the package."""
        return {bare(k): p for k, p in self.proxy.named_parameters()}

    @torch.no_grad()
    def load_frozen(self, weights: Tensors) -> None:
        """Copy aligned weights into the proxy.

        Args:
            weights: any of the proxy's frozen weights, named as in the package.
        """
        live = self._frozen()
        for name, value in weights.items():
            live[name].copy_(value)


@dataclass
class Models:
    """FM and proxy with adapters attached, and what both were made from.

    `source` names the FM in the exported adapter; `start` is the adapter before round 1. With
    plan.widths the proxy is the widest that is not the FM itself, `width` its name, and `others`
    has all other widths, narrowest first. `withheld` are the tokens whose embeddings the proxy has
    not, None where it has all; `disguise` is what its neurons wear, the plan's kept ones being in
    its order.
    """

    fm: PeftModel
    proxy: PeftModel
    plan: Plan
    spec: adapters.AdapterSpec
    source: str
    start: Tensors
    width: str = ""
    others: tuple[Width, ...] = ()
    withheld: Tensor | None = None
    disguise: Disguise | None = None

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """All widths, narrowest first; the one proxy where there are no others."""
        own = Width(self.width, self.plan, self.proxy)
        full = [w for w in self.others if w.plan.is_full]
        return (*(w for w in self.others if w not in full), own, *full)

    def plug(self, adapter: Tensors) -> None:
        """Put one adapter on both models, which take its rank.

        Args:
            adapter: float32 tensors by their name in the FM.

        Raises:
            ValueError: names or shapes are not those of the models' adapter.
        """
        rank = adapters.rank_of(adapter) or self.spec.rank
        adapters.resize(self.fm, rank)
        adapters.resize(self.proxy, rank)
        adapters.load(self.fm, adapter)
        adapters.load(self.proxy, adapter, self.plan)
        for width in self.others:
            adapters.resize(width.proxy, rank)
            adapters.load(width.proxy, adapter, width.plan)

    def trained_names(self) -> list[str]:
        """Names in the package of the weights alignment may move.

        Returns:
            The names, sorted.
        """
        return Width(self.width, self.plan, self.proxy).trained_names()

    def load_frozen(self, weights: Tensors) -> None:
        """Copy aligned weights into the proxy.

        Args:
            weights: any of the proxy's frozen weights, named as in the package.
        """
        Width(self.width, self.plan, self.proxy).load_frozen(weights)
