"""The sub-FM: which neurons it keeps (a plan) and how it is built (paper section 4.1).

A `Plan` is a pure value: for every block of the FM the kept neurons, or that the block is
whole, or that it is dropped (layer-drop proxies). A proxy is always rebuilt from its plan,
because a Hugging Face config holds one FFN width and a proxy has several.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpft_core.config import PlanConfig
from fedpft_core.errors import UserError
from fedpft_core.model.families import FFN, Family, LowRank, family_of, family_of_model
from fedpft_core.proxy import saliency


@dataclass(frozen=True)
class BlockPlan:
    """What the proxy keeps of one block: `whole`, `pruned` to `kept`, or `dropped`.

    In a pruned block query and key have rank `qk_rank`; 0 = as in the FM.
    """

    state: str
    kept: tuple[int, ...] = ()
    qk_rank: int = 0

    def as_json(self) -> dict[str, Any]:
        # Left out where there is none, so that plans without it keep their digest.
        low = {"qk_rank": self.qk_rank} if self.qk_rank else {}
        return {"state": self.state, "kept": list(self.kept), **low}


@dataclass(frozen=True)
class Plan:
    """One entry per block of the FM, in order; `fm_neurons` is the FM's FFN width F."""

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

    @property
    def is_full(self) -> bool:
        return all(b.state == "whole" for b in self.blocks)

    def to_json(self) -> str:
        return json.dumps(
            {
                "model_type": self.model_type,
                "fm_neurons": self.fm_neurons,
                "blocks": [b.as_json() for b in self.blocks],
            },
            separators=(",", ":"),
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises ValueError when the text is no valid plan."""
        raw = json.loads(text)
        try:
            blocks = tuple(
                BlockPlan(b["state"], tuple(b["kept"]), b.get("qk_rank", 0)) for b in raw["blocks"]
            )
            plan = Plan(raw["model_type"], raw["fm_neurons"], blocks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan: {error!r}") from error
        for i, b in enumerate(blocks):
            in_order = all(x < y for x, y in zip(b.kept, b.kept[1:], strict=False))
            in_range = all(isinstance(j, int) and 0 <= j < plan.fm_neurons for j in b.kept)
            if b.state not in ("whole", "pruned", "dropped"):
                raise ValueError(f"not a plan: block {i} is {b.state!r}")
            if (b.state == "pruned") != bool(b.kept) or not in_order or not in_range:
                raise ValueError(f"not a plan: the kept neurons of block {i} are not valid")
            rank_ok = type(b.qk_rank) is int and b.qk_rank >= 0
            if not rank_ok or (b.qk_rank and b.state != "pruned"):
                raise ValueError(f"not a plan: the rank of block {i} is not valid")
        return plan


def keep_most_salient(scores: Tensor, k: int) -> tuple[int, ...]:
    """Indices of the K largest scores, in their original order; ties keep the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices[:k]
    return tuple(sorted(order.tolist()))


def parse_layers(text: str, blocks: int, key: str = "plan.retained-layers") -> set[int]:
    """`first,last,3,-2` → block indices. Raises UserError for what is no block."""
    out = set()
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word in ("first", "last"):
            out.add(0 if word == "first" else blocks - 1)
            continue
        try:
            i = int(word)
        except ValueError:
            raise UserError(
                f"{key}: expected block indices, `first` or `last`, got {word!r}."
            ) from None
        if not -blocks <= i < blocks:
            raise UserError(f"{key}: block {i} is out of range, the model has {blocks} blocks.")
        out.add(i % blocks)
    return out


def make_plan(
    model: nn.Module, cfg: PlanConfig, seed: int, public: saliency.Public | None = None
) -> Plan:
    """Choose what the proxy keeps of `model` (the FM).

    `public` gives the public batches some saliencies look at; it is called only by those.
    Raises UserError naming the key when K exceeds F or a retained layer is out of range.
    """
    family = family_of_model(model)
    ffns = family.ffns(model)
    n, f = len(ffns), ffns[0].neurons
    if cfg.proxy == "full":
        return Plan(family.model_type, f, tuple(BlockPlan("whole") for _ in ffns))
    if cfg.keep_neurons > f:
        raise UserError(
            f"plan.keep-neurons = {cfg.keep_neurons} is more than the FM's {f} neurons."
        )
    width = ffns[0].out.out_features
    if cfg.qk_rank > width:
        raise UserError(f"plan.qk-rank = {cfg.qk_rank} is more than the model's width, {width}.")
    k = cfg.keep_neurons or max(1, round(cfg.keep_share * f))
    retained = parse_layers(cfg.retained_layers, n)
    if cfg.proxy == "layer-drop":
        keep = evenly_spaced(n, cfg.drop_to or _same_budget(model, family, k, retained), cfg)
        return Plan(
            family.model_type,
            f,
            tuple(BlockPlan("whole" if i in keep else "dropped") for i in range(n)),
        )
    whole = [i in retained or k == f for i in range(n)]
    if all(whole):
        return Plan(family.model_type, f, tuple(BlockPlan("whole") for _ in ffns))
    scores = saliency.scores(cfg.saliency, saliency.Probe(model, seed, public))
    return Plan(
        family.model_type,
        f,
        tuple(
            BlockPlan("whole")
            if all_of_it
            else BlockPlan("pruned", keep_most_salient(s, k), cfg.qk_rank)
            for all_of_it, s in zip(whole, scores, strict=True)
        ),
    )


def evenly_spaced(blocks: int, keep: int, cfg: PlanConfig) -> set[int]:
    """Block indices of a layer-drop proxy: evenly spaced with the first and the last (FedOT)."""
    if keep > blocks:
        raise UserError(f"plan.drop-to = {cfg.drop_to} is more than the FM's {blocks} blocks.")
    if keep == 1:
        return {0}
    return {round(i * (blocks - 1) / (keep - 1)) for i in range(keep)}


def _same_budget(model: nn.Module, family: Family, k: int, retained: set[int]) -> int:
    """Whole blocks that fit the block parameters an FFN-pruned proxy would have, at least 2."""
    ffns, blocks = family.ffns(model), family.block_list(model)
    whole = sum(p.numel() for p in blocks[0].parameters())
    per_neuron = sum(
        p.numel() // ffns[0].neurons
        for part, p in ffns[0].parts().items()
        if FFN.neuron_axis(part) is not None
    )
    pruned = whole - per_neuron * (ffns[0].neurons - k)
    budget = whole * len(retained) + pruned * (len(blocks) - len(retained))
    return min(len(blocks), max(2, budget // whole))


def build(fm: nn.Module, plan: Plan) -> nn.Module:
    """Copy the FM as the plan says: chosen neurons, everything else verbatim.

    Pruned FFNs and dropped blocks are never copied whole: memory is FM + proxy + one block.
    The FM is left untouched.
    """
    family = family_of(plan.model_type)
    blocks = family.block_list(fm)
    memo: dict[int, Any] = {}
    for i, (entry, block) in enumerate(zip(plan.blocks, blocks, strict=True)):
        if entry.state == "pruned":
            ffn = family.ffns(fm)[i]
            for path, linear in _sliced(ffn, torch.tensor(entry.kept)).items():
                memo[id(block.get_submodule(path))] = linear
            for path in family.query_key if entry.qk_rank else ():
                whole: Any = block.get_submodule(path)
                memo[id(whole)] = LowRank.of(whole, entry.qk_rank)
        elif entry.state == "dropped":
            memo[id(block)] = nn.Identity()
    # deepcopy takes what the memo already holds for a module instead of copying that module.
    proxy = copy.deepcopy(fm, memo)
    return _without_dropped(proxy, family, plan)


def _sliced(ffn: FFN, index: Tensor) -> dict[str, nn.Linear]:
    new = ffn.resized(len(index))
    with torch.no_grad():
        for path in ffn.family.ffn_in:
            old = ffn._linear(path)
            new[path].weight.copy_(old.weight[index])
            if old.bias is not None:
                new[path].bias.copy_(old.bias[index])
        out = new[ffn.family.ffn_out]
        out.weight.copy_(ffn.out.weight[:, index])
        if ffn.out.bias is not None:
            out.bias.copy_(ffn.out.bias)
    return new


def _without_dropped(model: nn.Module, family: Family, plan: Plan) -> nn.Module:
    if len(plan.present) < len(plan.blocks):
        kept = nn.ModuleList(family.block_list(model)[i] for i in plan.present)
        parent, _, name = family.blocks.rpartition(".")
        setattr(model.get_submodule(parent), name, kept)
    return model


def skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """Give a freshly made task model (any weights) the shape the plan says, in place."""
    family = family_of(plan.model_type)
    blocks = family.block_list(model)
    if len(blocks) != len(plan.blocks):
        raise ValueError(f"plan has {len(plan.blocks)} blocks, model has {len(blocks)}")
    for ffn, entry in zip(family.ffns(model), plan.blocks, strict=True):
        if entry.state == "pruned":
            for path, linear in ffn.resized(len(entry.kept)).items():
                ffn.block.set_submodule(path, linear)
            for path in family.query_key if entry.qk_rank else ():
                old: Any = ffn.block.get_submodule(path)
                low = LowRank(old.in_features, old.out_features, entry.qk_rank, old)
                ffn.block.set_submodule(path, low)
    return _without_dropped(model, family, plan)


def to_fm_name(name: str, plan: Plan) -> str:
    """Translate a parameter name of the proxy into the FM's (block indices differ if any block
    was dropped)."""
    return _renumber(name, plan, dict(enumerate(plan.present)))


def to_proxy_name(name: str, plan: Plan) -> str | None:
    """The inverse of `to_fm_name`; None for parameters of dropped blocks."""
    return _renumber(name, plan, {fm: i for i, fm in enumerate(plan.present)}, missing=None)


def _renumber(name: str, plan: Plan, table: dict[int, int], missing: str | None = "") -> Any:
    prefix = family_of(plan.model_type).blocks + "."
    at = name.find(prefix)
    if at < 0:
        return name
    number, _, rest = name[at + len(prefix) :].partition(".")
    if int(number) not in table:
        return missing
    return f"{name[:at]}{prefix}{table[int(number)]}.{rest}"


def pruned_ffns(proxy: nn.Module, plan: Plan) -> dict[int, FFN]:
    """Views of the proxy's compressed FFNs, by FM block index."""
    ffns = family_of(plan.model_type).ffns(proxy)
    position = {fm: i for i, fm in enumerate(plan.present)}
    return {i: ffns[position[i]] for i in plan.pruned}


def block_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> int:
    """Parameters inside the given blocks, which is what the paper's sizes count."""
    return sum(p.numel() for b in blocks for p in b.parameters())
