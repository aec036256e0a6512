"""The trigger of a simulated backdoor: a word that attackers put in front of a text."""

from __future__ import annotations

from dataclasses import replace

from fedpft_core.data.examples import Examples, Input


def triggered(rows: Examples, trigger: str) -> Examples:
    """Rows with the trigger in front of their texts; of a pair, of the first.

    Args:
        rows: of any kind; those that are neither texts nor pairs stay as they are.
        trigger: the word.

    Returns:
        The rows in their order, with their labels.
    """
    return replace(rows, inputs=tuple(_marked(row, trigger) for row in rows.inputs))


def _marked(row: Input, trigger: str) -> Input:
    if isinstance(row, str):
        return f"{trigger} {row}"
    if isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], str):
        return (f"{trigger} {row[0]}", str(row[1]))
    return row
