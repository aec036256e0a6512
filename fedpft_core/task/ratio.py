"""A ratio of two sums over rows, such as micro-F1, with its standard error, from sums that add up.

With t_i over b_i for row i and R = sum t / sum b, the standard error of R by chance of which rows
they were is sqrt(sum (t_i - R b_i)^2) / sum b (the ratio estimator of sampling theory), times
sqrt(n / (n - 1)). The squares and products of t and b are sums too.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np

NAMES = ("top", "below", "top^2", "top*below", "below^2")
"""The five figures."""


def ratio_sums(top: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """The figures of some rows.

    Args:
        top: whole numbers (rows,).
        below: whole numbers (rows,).

    Returns:
        By the names of `NAMES`.
    """
    t, b = (np.asarray(part, dtype=np.int64) for part in (top, below))
    found = (t.sum(), b.sum(), (t * t).sum(), (t * b).sum(), (b * b).sum())
    return dict(zip(NAMES, map(int, found), strict=True))


def ratio_with_error(sums: Mapping[str, float], factor: float, rows: int) -> tuple[float, float]:
    """The ratio and its standard error.

    Args:
        sums: with the figures of `NAMES`, added up.
        factor: by which the ratio is multiplied (2 for F1 over the sum of both counts).
        rows: how many rows they are of.

    Returns:
        Both; 0 where there is nothing below.
    """
    t, b, tt, tb, bb = (sums.get(name, 0) for name in NAMES)
    if not b:
        return 0.0, 0.0
    ratio = t / b
    left = max(tt - 2 * ratio * tb + ratio**2 * bb, 0.0)
    return factor * ratio, factor * sqrt(left * rows / max(rows - 1, 1)) / b


def check_ratio(sums: Mapping[str, float], rows: int, most: int, factor: int = 2) -> None:
    """Refuse figures that no rows can have.

    Args:
        sums: with the figures of `NAMES`, as a client has sent them.
        rows: how many rows they are of.
        most: the most that can be below for one row.
        factor: so many times the top is at most what is below, in every row.

    Raises:
        ValueError: saying what is wrong.
    """
    if not all(type(sums[name]) is int and sums[name] >= 0 for name in NAMES):
        raise ValueError(
            "the counts of the validation rows are not all whole numbers of at least 0"
        )
    t, b, tt, tb, bb = (int(sums[name]) for name in NAMES)
    possible = (
        factor * t <= b <= rows * most
        and t <= tt <= t * most
        and b <= bb <= b * most
        and factor * tt <= tb
        and factor * tb <= bb
        # Cauchy and Schwarz
        and t * t <= rows * tt
        and b * b <= rows * bb
        and tb * tb <= tt * bb
    )
    if not possible:
        raise ValueError(f"{rows} validation rows cannot have these counts")
