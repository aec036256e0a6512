"""What a resumed run may change, and the refusal of all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What alters neither the model nor what has been drawn at random. Rounds may be added besides.
FREE_ON_RESUME = (
    "run.resume", "run.dir", "run.stop-after", "run.checkpoints", "run.proxy-cache",
    "plan.ledger", "plan.disclosure-budget",
    "federation.round-timeout", "federation.node-timeout", "federation.attempts",
)  # fmt: skip


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key that a resumed run has another value of, where it must not.

    Args:
        saved: values by dotted key, of the run as it began. A key that is not there is of a later
            version, and not looked at.
        now: every key with its value.

    Returns:
        The dotted key; None where there is none.
    """
    for name, value in now.items():
        if name in FREE_ON_RESUME or name not in saved or saved[name] == value:
            continue
        if name != "federation.rounds" or value < saved[name]:
            return name
    return None
