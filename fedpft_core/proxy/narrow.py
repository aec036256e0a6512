"""A narrower sub-FM cut from a wider one, as a model and as weights by name."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.model.families import FFN, family_of
from fedpft_core.model.names import PatchedWeights
from fedpft_core.model.plan import BlockPlan, Plan, pruned_ffns
from fedpft_core.proxy.nested import positions
from fedpft_core.tensors import Tensors

Model = TypeVar("Model", bound=nn.Module)


def _as_pruned(plan: Plan) -> Plan:
    """The same plan with every whole block as one pruned to all of its neurons."""
    blocks = tuple(
        BlockPlan("pruned", tuple(range(plan.neurons(i))), 0, b.neurons)
        if b.state == "whole"
        else b
        for i, b in enumerate(plan.blocks)
    )
    return Plan(plan.model_type, plan.fm_neurons, blocks)


def narrowed(proxy: Model, wide: Plan, narrow: Plan) -> Model:
    """A copy of a wider proxy with the neurons of a narrower plan.

    What no alignment moves and no client trains is not copied: both models hold it.

    Args:
        proxy: built from the wider plan, with the adapter or without; it stays as it was.
        wide: its plan.
        narrow: a plan whose neurons are all in it, and with the same rank of query and key.

    Returns:
        The narrower proxy, with an adapter of its own where the wider one has any.

    Raises:
        ValueError: the narrower plan keeps what the wider one does not.
    """
    at = positions(wide, narrow)
    ffns = pruned_ffns(proxy, _as_pruned(wide))
    own = {id(p) for block in at for p in ffns[block].parts().values()}
    own |= {id(p) for p in adapters.parameters(proxy).values()}
    tensors = (*proxy.parameters(), *proxy.buffers())
    memo: dict[int, Any] = {id(t): t for t in tensors if id(t) not in own}
    for block, index in at.items():
        ffn = ffns[block]
        for path, linear in ffn.resized(len(index)).items():
            memo[id(ffn.block.get_submodule(path))] = linear.requires_grad_(False)
    made = copy.deepcopy(proxy, memo)
    made.eval()
    follow(made, narrow, proxy, wide)
    return made


@torch.no_grad()
def follow(small: nn.Module, narrow: Plan, large: nn.Module, wide: Plan) -> None:
    """Give a narrower proxy the FFN weights that the wider one has now.

    Args:
        small: built from the narrower plan, changed in place: in each block that it prunes its
            neurons, and what all neurons of the block share.
        narrow: its plan.
        large: the wider proxy.
        wide: its plan.

    Raises:
        ValueError: the narrower plan keeps what the wider one does not.
    """
    at = positions(wide, narrow)
    theirs, mine = pruned_ffns(large, _as_pruned(wide)), pruned_ffns(small, narrow)
    for block, index in at.items():
        own = mine[block].parts()
        for part, value in theirs[block].parts().items():
            axis = FFN.neuron_axis(part)
            device = value.device
            own[part].copy_(value if axis is None else value.index_select(axis, index.to(device)))


def cut(weights: Tensors, wide: Plan, narrow: Plan) -> Tensors:
    """The weights of a narrower proxy among those of a wider one.

    Args:
        weights: of the wider proxy, by their names in its package.
        wide: its plan.
        narrow: a plan whose neurons are all in it.

    Returns:
        The narrower proxy's, by the same names; those that are whole are not copied.

    Raises:
        ValueError: the narrower plan keeps what the wider one does not.
    """
    made = dict(weights)
    for block, index in positions(wide, narrow).items():
        for part, name in ffn_names(narrow, block, weights).items():
            axis = FFN.neuron_axis(part)
            if axis is not None:
                made[name] = weights[name].index_select(axis, index).contiguous()
    return made


def ffn_names(plan: Plan, block: int, weights: Tensors) -> dict[str, str]:
    """The names in a package of the parts of one block's FFN.

    Args:
        plan: of a package.
        block: an FM block that the package has, pruned or whole.
        weights: the package's.

    Returns:
        Names by part (:meth:`FFN.parts`), of those that the package has.
    """
    names = PatchedWeights(_as_pruned(plan))
    family = family_of(plan.model_type)
    modules = [f"in{i}" for i in range(len(family.ffn_in))] + ["out"]
    modules += ["norm"] if family.output_norm else []
    found = {f"{m}.{leaf}": "" for m in modules for leaf in ("weight", "bias")}
    found = {part: names.name(block, part) for part in found}
    return {part: name for part, name in found.items() if name in weights}


def neuron_parts(plan: Plan, weights: Tensors) -> dict[str, tuple[int, int]]:
    """Which of a package's weights have an entry for each neuron.

    Args:
        plan: the package's.
        weights: its weights by name.

    Returns:
        By name the FM block, and the axis that counts neurons.
    """
    found = {}
    for block in plan.present:
        for part, name in ffn_names(plan, block, weights).items():
            axis = FFN.neuron_axis(part)
            if axis is not None:
                found[name] = (block, axis)
    return found


def neurons_of(plan: Plan, block: int) -> Tensor:
    """The FM's neurons that a sub-FM has in a block.

    Args:
        plan: the sub-FM's.
        block: one that it has.

    Returns:
        int64 [K], in their order there.
    """
    entry = plan.blocks[block]
    return torch.tensor(entry.kept) if entry.kept else torch.arange(plan.neurons(block))


__all__ = ["cut", "ffn_names", "follow", "narrowed", "neuron_parts", "neurons_of"]
