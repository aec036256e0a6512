"""What the figures of validation rows that a client sends are held against, whatever the task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf


def announced(sums: Mapping[str, float], sent: Collection[str], rows: int) -> bool:
    """Whether there are figures to check: those of the task, over as many rows as announced.

    Args:
        sums: figures that a client has sent.
        sent: `Task.sent`.
        rows: rows that the client announced it keeps from training.

    Returns:
        False where there are neither rows nor figures.

    Raises:
        ValueError: the figures are others than these, or of another number of rows.
    """
    if not sums and not rows:
        return False
    if sums.keys() != set(sent):
        raise ValueError(f"the figures of validation rows are {', '.join(sorted(sums))[:100]}")
    if sums["rows"] != rows:
        raise ValueError(f"validation row count {sums['rows']} is not the {rows} announced")
    return True


def check_loss(loss: float, terms: float = 1) -> None:
    """Refuse a sum of losses of which none is below 0, where it cannot be one.

    Args:
        loss: the sum.
        terms: how many terms it has; without any it is 0.

    Raises:
        ValueError: it is negative, not finite, or a sum of nothing that is not 0.
    """
    if not 0 <= loss < inf or (not terms and loss):
        raise ValueError("the loss of the validation rows is no finite number of at least 0")


__all__ = ["announced", "check_loss"]
