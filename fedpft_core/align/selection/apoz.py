"""Highest share of inactive tokens at the clients, paper eq. 7."""

from __future__ import annotations

from torch import Tensor

from fedpft_core.align.selection import View

NEEDS_COUNTS = True


def scores(view: View) -> dict[int, Tensor]:
    return dict(view.rates)
