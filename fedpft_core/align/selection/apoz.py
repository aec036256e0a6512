"""Highest share of inactive tokens at the clients, paper eq. 7."""

from __future__ import annotations

from torch import Tensor

from fedpft_core.align.selection import View

NEEDS_COUNTS = True


def scores(view: View) -> dict[int, Tensor]:
    """APoZ itself, so that the most inactive neurons move.

    Source: FedPFT, eq. (7).

    Args:
        view: with the clients' rates.

    Returns:
        float64 [K] by FM block index.
    """
    return dict(view.rates)
