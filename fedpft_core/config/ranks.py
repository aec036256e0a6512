"""Ranks of single clients: `federation.ranks` as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from fedpft_core.config.keys import Config


def ranks_of(text: str) -> dict[str, int]:
    """The ranks that federation.ranks gives.

    Args:
        text: `name=rank` with commas between; empty for none.

    Returns:
        Ranks by client name.

    Raises:
        UserError: an entry is no name with a whole number of at least 1, or a name is there twice.
    """
    out: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, rank = (part.strip() for part in entry.rpartition("="))
        if not name or not rank.isdecimal() or not int(rank):
            raise UserError(
                f"federation.ranks has {entry!r}: expected name=rank, with commas between."
            )
        if name in out:
            raise UserError(f"federation.ranks names {name} twice.")
        out[name] = int(rank)
    return out


def check_ranks(config: Config) -> None:
    """Refuse ranks that the run cannot have.

    Args:
        config: a whole run.

    Raises:
        UserError: naming the key.
    """
    f = config.federation
    for name, rank in ranks_of(f.ranks).items():
        if rank > config.lora.rank:
            raise UserError(
                f"federation.ranks gives {name} the rank {rank}, more than lora.rank = "
                f"{config.lora.rank}."
            )
    if f.ranks and config.privacy.secure:
        raise UserError(
            "privacy.secure = true adds masked numbers up one by one, so that all clients need one "
            "rank: leave federation.ranks empty."
        )
