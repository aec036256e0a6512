"""Sub-FMs of several widths of one FM: of any two, the smaller is a part of the larger.

The neurons of a block are ranked by saliency once for an FM, and a width keeps the first ones of
that order. A plan lists what it keeps in the FM's own order, so that "part" means: the kept neurons
of the smaller plan are some of the larger one's, and :func:`positions` says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedpft_core.config import PlanConfig
from fedpft_core.config.widths import shares_of, width_names
from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position
from fedpft_core.model.families import family_of_model
from fedpft_core.model.plan import BlockPlan, Plan
from fedpft_core.proxy import saliency
from fedpft_core.proxy.choose import keep_most_salient, make_plan, parse_layers

_FLOOR = 0.25  # of an even share: what every block keeps, however little its neurons stand out


def make_plans(
    model: nn.Module,
    cfg: PlanConfig,
    seed: int,
    public: saliency.Public | None = None,
    head_reads: Position | None = None,
    preferred: Sequence[Tensor] = (),
) -> dict[str, Plan]:
    """Choose what the proxy of each width keeps of the FM.

    With one share for all blocks and plan.width-budget = even, the plan of a width is that of
    :func:`make_plan` with this share.

    Source: FedPFT, section 4.1, for one width.

    Args:
        model: the FM.
        cfg: its widths say how much is kept, narrowest first.
        seed: the run's.
        public: gives the public batches that some saliencies look at; called only by those.
        head_reads: which positions the task's head reads; None for where the family's
            classification head does.
        preferred: for each block of the FM bool [F], neurons that are kept before all others;
            empty for none.

    Returns:
        Plans by the name of the width, narrowest first; one without a name where there are no
        widths.

    Raises:
        UserError: a width names another number of blocks than the FM has, widths are not nested,
            or a setting does not fit the FM; names the key.
    """
    names = width_names(cfg.widths)
    if not names:
        return {"": make_plan(model, cfg, seed, public, head_reads, preferred)}
    # What one width's plan would refuse is refused before anything is scored.
    whole = make_plan(model, replace(cfg, proxy="full", widths=""), seed)
    ffns = family_of_model(model).ffns(model)
    retained = parse_layers(cfg.retained_layers, len(ffns))
    shares = {name: _by_block(name, len(ffns), retained) for name in names}
    if all(share == 1 for of_width in shares.values() for share in of_width):
        return {names[-1]: whole}
    fewest = replace(cfg, widths="", keep_share=min(min(s) for s in shares.values()))
    make_plan(model, replace(fewest, saliency="weight-norm"), seed)  # refuses ranks and layers
    scores = saliency.scores(cfg.saliency, saliency.Probe(model, seed, public, head_reads))
    order = [torch.sort(s.cpu(), descending=True, stable=True) for s in scores]
    first: list[Tensor | None] = [*preferred] or [None] * len(ffns)
    made: dict[str, Plan] = {}
    before = [0] * len(ffns)
    for name in names:
        counts = [max(1, round(s * f.neurons)) for s, f in zip(shares[name], ffns, strict=True)]
        if cfg.width_budget == "saliency" and "/" not in name:
            free = [i for i, s in enumerate(shares[name]) if s < 1]
            counts = _by_saliency([o.values for o in order], counts, free, before)
        if any(k < b for k, b in zip(counts, before, strict=True)) or counts == before:
            block = next((i for i, k in enumerate(counts) if k < before[i]), 0)
            raise UserError(
                f"plan.widths: {name} keeps {counts[block]} neurons of block {block}, and the "
                f"width before it {before[block]}: widths must be nested, the narrowest first."
            )
        before = counts
        made[name] = Plan(
            whole.model_type,
            whole.fm_neurons,
            tuple(
                BlockPlan("whole", neurons=entry.neurons)
                if k == ffn.neurons
                else BlockPlan("pruned", keep_most_salient(s, k, own), cfg.qk_rank, entry.neurons)
                for k, ffn, s, entry, own in zip(
                    counts, ffns, scores, whole.blocks, first, strict=True
                )
            ),
        )
    return made


def trunk(plans: Mapping[str, Plan]) -> str:
    """The width that is aligned, and scored as the proxy: the widest that is not the FM itself.

    Args:
        plans: by the name of the width, narrowest first; at least one.

    Returns:
        Its name; of plans that are all the FM the last.
    """
    names = [name for name, plan in plans.items() if not plan.is_full] or list(plans)
    return names[-1]


def _by_block(name: str, blocks: int, retained: set[int]) -> list[float]:
    """The share of each block's neurons that a width keeps."""
    shares = shares_of(name)
    if len(shares) == 1:
        return [1.0 if i in retained else shares[0] for i in range(blocks)]
    if len(shares) != blocks:
        raise UserError(
            f"plan.widths: {name} has shares of {len(shares)} blocks, and the FM has {blocks}."
        )
    return shares


def _by_saliency(
    ranked: Sequence[Tensor], even: Sequence[int], free: Sequence[int], before: Sequence[int]
) -> list[int]:
    """As many neurons in all as `even` has, where they stand out most."""
    # Every block keeps a part of its even share, and no fewer than the narrower width did.
    total = sum(even[i] for i in free)
    floors = {i: max(1, round(_FLOOR * even[i]), before[i]) for i in free}
    entries = sorted(
        (-float(s) / float(ranked[i].mean() or 1.0), i, j)
        for i in free
        for j, s in enumerate(ranked[i].tolist())
    )
    counts, left = dict(floors), total - sum(floors.values())
    for _, i, j in entries:
        if left > 0 and j >= floors[i]:
            counts[i] += 1
            left -= 1
    return [counts.get(i, k) for i, k in enumerate(even)]


def positions(wide: Plan, narrow: Plan) -> dict[int, Tensor]:
    """Where the neurons of a narrower plan are among those of a wider one.

    Args:
        wide: the wider plan.
        narrow: one whose neurons are all in it.

    Returns:
        int64 [K of the narrow plan] by FM block, for each block that the narrow plan prunes.

    Raises:
        ValueError: the plans are of two FMs, or the narrower one keeps what the other does not.
    """
    if (wide.model_type, wide.fm_neurons) != (narrow.model_type, narrow.fm_neurons) or len(
        wide.blocks
    ) != len(narrow.blocks):
        raise ValueError("the plans are not of one FM")
    found = {}
    for i, (large, small) in enumerate(zip(wide.blocks, narrow.blocks, strict=True)):
        if small.state == "whole":
            if large.state != "whole":
                raise ValueError(f"block {i} is whole in the narrower plan alone")
            continue
        if "dropped" in (small.state, large.state):
            raise ValueError(f"block {i} is dropped, which no width does")
        if large.state == "whole":
            found[i] = torch.tensor(small.kept)
            continue
        at = {neuron: p for p, neuron in enumerate(large.kept)}
        if not at.keys() >= set(small.kept):
            raise ValueError(f"block {i} of the narrower plan keeps neurons the wider one does not")
        found[i] = torch.tensor([at[neuron] for neuron in small.kept])
    return found


def nested(plans: Sequence[Plan]) -> bool:
    """Whether each plan is a part of the next.

    Args:
        plans: narrowest first.

    Returns:
        True where they are, and for fewer than two.
    """
    try:
        for small, large in pairwise(plans):
            positions(large, small)
    except ValueError:
        return False
    return True


__all__ = ["make_plans", "nested", "positions", "trunk"]
