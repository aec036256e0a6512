"""What a reply weighs by its width (federation.width-weighting), and counts of several widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fedpft_core.config import Config
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.nested import positions
from fedpft_core.train.inactivity import Counts
from server_app.state import Given, State

_LEAST = 1e-3

Agreement = Callable[[State], Mapping[str, float]]
"""How well each width's gradients agree with the FM's at the adapter of a state, in [-1, 1]."""


def share_of(plan: Plan) -> float:
    """The share of the FM's FFN neurons that a plan keeps.

    Args:
        plan: of one width.

    Returns:
        In (0, 1].
    """
    every = range(len(plan.blocks))
    kept = sum(len(plan.blocks[i].kept) or plan.neurons(i) for i in every)
    return kept / sum(plan.neurons(i) for i in every)


def factor(
    config: Config, state: State, agreement: Agreement | None
) -> Callable[[str], float] | None:
    """What the weight of a reply is multiplied by.

    Args:
        config: its federation.width-weighting decides.
        state: has all widths, and what each client has been given.
        agreement: measures what `agreement` asks for.

    Returns:
        A function of a client's name; None where widths do not matter. Where no width agrees with
        the FM at all they all weigh the same.
    """
    how = config.federation.width_weighting
    if not state.others or how == "examples":
        return None
    if how == "width":
        found = {name: share_of(v.package.meta.plan) for name, v in state.widths.items()}
    else:
        assert agreement is not None
        found = {name: max(0.0, value) for name, value in agreement(state).items()}
    largest = max(found.values())
    if not largest > 0:
        return None
    # None at 0: a round of such clients alone must have a mean.
    shares = {name: max(_LEAST, value / largest) for name, value in found.items()}
    return lambda client: shares[state.given.get(client, Given()).width or state.width]


def join(state: State) -> Callable[[Sequence[tuple[str, Counts]]], Counts] | None:
    """How inactivity counts of several widths are added up.

    Args:
        state: has all widths.

    Returns:
        A function from counts with their widths to counts over the neurons of the widest pruned
        width, in which each neuron has the share of tokens that those clients found it inactive on
        who have it; None where there is one sub-FM.
    """
    if not state.others:
        return None
    widest, widths = state.package.meta.plan, state.widths

    def joined(found: Sequence[tuple[str, Counts]]) -> Counts:
        inactive, tokens = {}, {}
        for block in widest.pruned:
            off = torch.zeros(len(widest.blocks[block].kept), dtype=torch.float64)
            seen, total = torch.zeros_like(off), 0
            for width, counts in found:
                if block in counts.inactive:
                    at = positions(widest, widths[width].package.meta.plan)[block]
                    off[at] += counts.inactive[block]
                    seen[at] += counts.tokens[block]
                    total += counts.tokens[block]
            if total:
                tokens[block] = total
                inactive[block] = (off / seen.clamp_min(1) * total).round().to(torch.int64)
        return Counts(inactive, tokens)

    return joined


__all__ = ["Agreement", "factor", "join", "share_of"]
