"""Choosing what the proxy keeps of the FM (paper section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedpft_core.config import PlanConfig
from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position
from fedpft_core.model.families import FFN, Family, family_of_model
from fedpft_core.model.plan import BlockPlan, Plan
from fedpft_core.proxy import saliency


def keep_most_salient(scores: Tensor, k: int, preferred: Tensor | None = None) -> tuple[int, ...]:
    """The neurons to keep of one block; of equal scores the lower index wins.

    Source: FedPFT, section 4.1.

    Args:
        scores: saliency of each neuron [F].
        k: K, how many are kept.
        preferred: bool [F], neurons that are kept before all others; None for none.

    Returns:
        Positions of the K largest scores, in their original order.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    if preferred is not None:
        first = preferred.to(order.device)[order]
        order = torch.cat([order[first], order[~first]])
    return tuple(sorted(order[:k].tolist()))


def parse_layers(text: str, blocks: int, key: str = "plan.retained-layers") -> set[int]:
    """Read a list of blocks such as `first,last,3,-2`.

    Args:
        text: block indices from 0, or from the end if negative, `first` and `last`, separated by
            commas; may be empty.
        blocks: how many blocks the model has.
        key: the setting's name, for messages.

    Returns:
        Block indices from 0.

    Raises:
        UserError: a word is none of these, or an index is out of range; names `key`.
    """
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
    model: nn.Module,
    cfg: PlanConfig,
    seed: int,
    public: saliency.Public | None = None,
    head_reads: Position | None = None,
    preferred: Sequence[Tensor] = (),
) -> Plan:
    """Choose what the proxy keeps of the FM.

    Source: FedPFT, section 4.1.

    Args:
        model: the FM.
        cfg: how much is kept, and how it is chosen.
        seed: the run's.
        public: gives the public batches that some saliencies look at; called only by those.
        head_reads: which positions the task's head reads; None for where the family's
            classification head does.
        preferred: for each block of the FM bool [F], neurons that are kept before all others;
            empty for none.

    Returns:
        The plan, with one entry per block of the FM.

    Raises:
        UserError: K exceeds F, a rank is too large or a retained layer is out of range; names
            the key.
    """
    family = family_of_model(model)
    ffns = family.ffns(model)
    n, f = len(ffns), ffns[0].neurons
    # What each entry says of its width: nothing where it is the first one's.
    own = [0 if ffn.neurons == f else ffn.neurons for ffn in ffns]
    if cfg.proxy == "full":
        return Plan(family.name, f, tuple(BlockPlan("whole", neurons=w) for w in own))
    fewest = min(ffn.neurons for ffn in ffns)
    if cfg.keep_neurons > fewest:
        raise UserError(
            f"plan.keep-neurons = {cfg.keep_neurons} is more than the FM's {fewest} neurons."
        )
    if cfg.proxy == "layer-drop" and not family.drops:
        raise UserError(
            f"plan.proxy = layer-drop: a {family.model_type} model has no blocks that can be left "
            "out; ffn-pruned and full are for it."
        )
    most = _largest_rank(family, model)
    if cfg.qk_rank > most:
        raise UserError(
            f"plan.qk-rank = {cfg.qk_rank} is more than the {most} that the model's query and key "
            "projections can have."
        )
    keeps = [cfg.keep_neurons or max(1, round(cfg.keep_share * ffn.neurons)) for ffn in ffns]
    k = keeps[0]
    retained = parse_layers(cfg.retained_layers, n)
    if cfg.proxy == "layer-drop":
        keep = evenly_spaced(n, cfg.drop_to or _same_budget(model, family, k, retained), cfg)
        return Plan(
            family.name,
            f,
            tuple(BlockPlan("whole" if i in keep else "dropped") for i in range(n)),
        )
    whole = [i in retained or keeps[i] == ffns[i].neurons for i in range(n)]
    if all(whole):
        return Plan(family.name, f, tuple(BlockPlan("whole", neurons=w) for w in own))
    first: list[Tensor | None] = [*preferred] or [None] * n
    scores = saliency.scores(cfg.saliency, saliency.Probe(model, seed, public, head_reads))
    return Plan(
        family.name,
        f,
        tuple(
            BlockPlan("whole", neurons=w)
            if all_of_it
            else BlockPlan("pruned", keep_most_salient(s, keep, before), cfg.qk_rank, w)
            for all_of_it, s, keep, w, before in zip(whole, scores, keeps, own, first, strict=True)
        ),
    )


def _largest_rank(family: Family, model: nn.Module) -> int:
    """The largest rank that the query projections can have; narrower keys then stay whole."""
    query, _ = family.query_key
    return min(
        min(block.get_submodule(query).get_parameter("weight").shape)
        for block in family.block_list(model)
    )


def evenly_spaced(blocks: int, keep: int, cfg: PlanConfig) -> set[int]:
    """The blocks of a layer-drop proxy: evenly spaced with the first and the last.

    Source: FedPFT, section 5 (FedOT).

    Args:
        blocks: how many blocks the FM has.
        keep: how many of them the proxy keeps, at least 1; with 1 it is the first.
        cfg: its `drop_to` is named in the message.

    Returns:
        Block indices in the FM.

    Raises:
        UserError: more blocks are to be kept than there are.
    """
    if keep > blocks:
        raise UserError(f"plan.drop-to = {cfg.drop_to} is more than the FM's {blocks} blocks.")
    if keep == 1:
        return {0}
    return {round(i * (blocks - 1) / (keep - 1)) for i in range(keep)}


def _same_budget(model: nn.Module, family: Family, k: int, retained: set[int]) -> int:
    """Whole blocks that fit the block parameters an FFN-pruned proxy would have, at least 2."""
    ffns, blocks = family.ffns(model), family.block_list(model)
    whole = [sum(p.numel() for p in block.parameters()) for block in blocks]
    per_neuron = sum(
        p.numel() // ffns[0].neurons
        for part, p in ffns[0].parts().items()
        if FFN.neuron_axis(part) is not None
    )
    budget = sum(whole) - per_neuron * (ffns[0].neurons - k) * (len(blocks) - len(retained))
    return min(len(blocks), max(2, budget // max(whole)))
