"""What plan.widths and federation.widths say, and what they cannot be combined with."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from fedpft_core.config.keys import Config

NOBODY = "none"
"""In federation.widths: a client whose budget is below the smallest width."""


def width_names(text: str) -> list[str]:
    """The widths of a list, by their names.

    Args:
        text: plan.widths or federation.widths.

    Returns:
        Its entries without blanks around them.
    """
    return [entry.strip() for entry in text.split(",")] if text.strip() else []


def shares_of(name: str) -> list[float]:
    """What a width keeps of the neurons of each block.

    Args:
        name: a width's name: one share, or one for each block with `/` between them.

    Returns:
        The shares, each in (0, 1].

    Raises:
        UserError: it is no such list; names plan.widths.
    """
    found = []
    for part in name.split("/"):
        try:
            share = float(part)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UserError(
                f"plan.widths: expected shares above 0 and at most 1, such as 0.125,0.25,0.5, got "
                f"{name!r}."
            )
        found.append(share)
    return found


def check_widths(config: Config) -> None:
    """Refuse widths that are not nested, or that contradict other settings.

    Args:
        config: a whole run.

    Raises:
        UserError: naming the keys.
    """
    p, f = config.plan, config.federation
    if f.partition == "grouped" and not all(width_names(f.groups) or [""]):
        raise UserError(
            f"federation.partition = grouped needs federation.groups, a name for each client, as "
            f"a,a,b, not {f.groups!r}."
        )
    names = width_names(p.widths)
    for one, other in pairwise(names):
        a, b = shares_of(one), shares_of(other)
        apart = len(a) == len(b) and (a == b or any(x > y for x, y in zip(a, b, strict=True)))
        if apart:
            raise UserError(
                f"plan.widths: {other} comes after {one}, which keeps as much or more: widths must "
                "be nested, the narrowest first."
            )
    for name in names:
        shares_of(name)
    if not names:
        if f.widths:
            raise UserError(f"federation.widths = {f.widths} needs plan.widths.")
        return
    for key, value, only in (
        ("plan.proxy", p.proxy, "ffn-pruned"),
        ("plan.keep-neurons", p.keep_neurons, 0),
        ("plan.disguise", p.disguise, "none"),
        ("plan.embeddings", p.embeddings, "all"),
        ("head.descent", config.head.descent, 0),
    ):
        if value != only:
            raise UserError(f"plan.widths = {p.widths} needs {key} = {only}, not {value}.")
    if f.aggregate == "none":
        raise UserError(
            "plan.widths is for a federation, which federation.aggregate = none is not."
        )
    for entry in width_names(f.widths):
        if entry not in (*names, NOBODY):
            raise UserError(
                f"federation.widths: {entry!r} is none of plan.widths = {p.widths}, nor {NOBODY!r}."
            )


def simulated_width(config: Config, index: int) -> str:
    """The width of a simulated client.

    Args:
        config: federation.widths is dealt out to the clients one after the other, again and again.
        index: the client's number, from 0.

    Returns:
        A width's name, `none`, or empty where nothing is said.
    """
    names = width_names(config.federation.widths)
    return names[index % len(names)] if names else ""


__all__ = ["NOBODY", "check_widths", "shares_of", "simulated_width", "width_names"]
