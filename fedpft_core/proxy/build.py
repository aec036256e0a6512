"""The sub-FM that a plan describes, built from the FM or around a blank model (paper section 4.1).

A proxy is always rebuilt from its plan, because a Hugging Face config holds one FFN width and a
proxy has several.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fedpft_core.model.families import FFN, Family, family_of
from fedpft_core.model.low_rank import LowRank, factored
from fedpft_core.model.plan import Plan


def build(fm: nn.Module, plan: Plan) -> nn.Module:
    """Copy the FM as the plan says: chosen neurons, everything else verbatim.

    Pruned FFNs and dropped blocks are never copied whole: memory is FM + proxy + one block.
    Source: FedPFT, section 4.1.

    Args:
        fm: the FM as a bare task model; left untouched.
        plan: what is kept, with one entry per block of the FM.

    Returns:
        The proxy as a bare task model, on the FM's device.

    Raises:
        ValueError: the plan has another number of blocks than the FM.
    """
    family = family_of(plan.model_type)
    blocks = family.block_list(fm)
    memo: dict[int, Any] = {}
    for i, (entry, block) in enumerate(zip(plan.blocks, blocks, strict=True)):
        if entry.state == "pruned":
            ffn = family.ffns(fm)[i]
            for path, linear in _sliced(ffn, torch.tensor(entry.kept)).items():
                memo[id(block.get_submodule(path))] = linear
            for path in family.query_key:
                whole: Any = block.get_submodule(path)
                if factored(whole, entry.qk_rank):
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
        path, _, name = family.blocks.rpartition(".")
        parent: Any = model.get_submodule(path)
        setattr(parent, name, kept)
        kinds = getattr(getattr(parent, "config", None), "layer_types", None)
        if kinds:
            # What looks up a block's kind of attention by its position must find its own. The task
            # model's config stays the FM's: packages have it, and rebuild all blocks before these.
            parent.config = copy.deepcopy(parent.config)
            parent.config.layer_types = [kinds[i] for i in plan.present]
    return model


def skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """Give a freshly made task model (any weights) the shape the plan says, in place.

    Args:
        model: a task model as large as the FM, changed in place.
        plan: what the proxy keeps, with one entry per block.

    Returns:
        The same model; the weights of pruned FFNs and of low-rank projections are uninitialised.

    Raises:
        ValueError: the plan has another number of blocks than the model.
    """
    family = family_of(plan.model_type)
    blocks = family.block_list(model)
    if len(blocks) != len(plan.blocks):
        raise ValueError(f"plan has {len(plan.blocks)} blocks, model has {len(blocks)}")
    for ffn, entry in zip(family.ffns(model), plan.blocks, strict=True):
        if entry.state == "pruned":
            for path, linear in ffn.resized(len(entry.kept)).items():
                ffn.block.set_submodule(path, linear)
            for path in family.query_key:
                old: Any = ffn.block.get_submodule(path)
                if factored(old, entry.qk_rank):
                    low = LowRank(old.in_features, old.out_features, entry.qk_rank, old)
                    ffn.block.set_submodule(path, low)
    return _without_dropped(model, family, plan)
