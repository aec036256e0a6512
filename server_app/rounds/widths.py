"""What a client's width adds to what its reply weighs (federation.width-weighting)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedpft_core.config import Config
from fedpft_core.model.plan import Plan
from server_app.state import Given, State

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
    shares = {name: value / largest for name, value in found.items()}
    return lambda client: shares[state.given.get(client, Given()).width or state.width]


__all__ = ["Agreement", "factor", "share_of"]
