"""Inactivity counts summed over clients (paper equation 7)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fedpft_core.train.inactivity import Counts


def sum_counts(counts: Iterable[Counts]) -> Counts:
    """Σ inactive and Σ tokens per block over a round's clients (paper eq. 7)."""
    inactive: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}
    for c in counts:
        for block, value in c.inactive.items():
            inactive[block] = inactive[block] + value if block in inactive else value.clone()
            tokens[block] = tokens.get(block, 0) + c.tokens[block]
    return Counts(inactive, tokens)
