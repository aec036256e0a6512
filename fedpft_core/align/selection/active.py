"""Lowest share of inactive tokens at the clients."""

from __future__ import annotations

from torch import Tensor

from fedpft_core.align.selection import View

NEEDS_COUNTS = True


def scores(view: View) -> dict[int, Tensor]:
    """The negative of APoZ, so that the most active neurons move.

    Args:
        view: with the clients' rates.

    Returns:
        float64 [K] by FM block index.
    """
    return {b: -rate for b, rate in view.rates.items()}
