"""How one key of the configuration is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    joined: bool = False,
) -> Any:
    """Declare one key: default, one-line doc with unit, and the range or values it admits.

    Args:
        default: taken where the key is absent.
        doc: one line, with the unit.
        low: the least value.
        high: the largest value.
        above: what the value must be more than.
        choices: the only values admitted; empty for any.
        joined: several choices in a row, `a+b`, will do; `none` stands alone.

    Returns:
        The dataclass field, with all but the default as its metadata.
    """
    meta = {
        "doc": doc, "low": low, "high": high, "above": above, "choices": choices, "joined": joined
    }  # fmt: skip
    return field(default=default, metadata=meta)
