"""Lowest share of inactive tokens at the clients."""

from __future__ import annotations

from torch import Tensor

from fedpft_core.align.selection import View

NEEDS_COUNTS = True


def scores(view: View) -> dict[int, Tensor]:
    return {b: -rate for b, rate in view.rates.items()}
