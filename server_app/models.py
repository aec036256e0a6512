"""FM and proxy side by side on the server, with the same adapter on both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel

from fedpft_core.adapter import lora as adapters
from fedpft_core.align.blocks import moving_parts
from fedpft_core.model.names import bare
from fedpft_core.model.plan import Plan
from fedpft_core.tensors import Tensors


@dataclass
class Models:
    """FM and proxy with adapters attached, and what both were made from.

    `source` names the FM in the exported adapter; `start` is the adapter before round 1.
    """

    fm: PeftModel
    proxy: PeftModel
    plan: Plan
    spec: adapters.AdapterSpec
    source: str
    start: Tensors

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
