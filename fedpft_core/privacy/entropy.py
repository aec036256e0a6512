"""Random numbers that nobody else can know: all from the operating system's entropy.

A seed of the run is no source of noise: every node reads it in the run's configuration.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np

# Takes a number of bytes and gives as many. Tests inject one that repeats itself.
Source = Callable[[int], bytes]

_TERMS = 4  # Gaussians summed to one: what rounding gives away of one of them is lost in the sum


def uniform(count: int, source: Source = os.urandom) -> np.ndarray:
    """Uniform numbers.

    Args:
        count: how many.
        source: where bytes come from.

    Returns:
        float64 [count], in (0, 1), multiples of 2^-53 less half of that.
    """
    words = np.frombuffer(source(8 * count), dtype="<u8") >> np.uint64(11)
    return (words.astype(np.float64) + 0.5) * 2.0**-53


def gaussian(count: int, source: Source = os.urandom) -> np.ndarray:
    """Independent standard Gaussians, each the sum of four halves of one by Box and Muller.

    Floating-point numbers of a single Gaussian have gaps that can betray what it was added to; a
    sum of four leaves no such gaps that anybody can search.

    Source: Holohan and Braghin 2021 (arXiv:2107.10138).

    Args:
        count: how many.
        source: where bytes come from.

    Returns:
        float64 [count].
    """
    total = np.zeros(count)
    pairs = (count + 1) // 2
    for _ in range(_TERMS):
        radius = np.sqrt(-2 * np.log(uniform(pairs, source)))
        angle = 2 * math.pi * uniform(pairs, source)
        total += np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return total / math.sqrt(_TERMS)


def skellam(count: int, variance: float) -> np.ndarray:
    """Skellam noise, the difference of two Poisson numbers: whole, and closed under sums.

    Args:
        count: how many.
        variance: of each.

    Returns:
        int64 [count], from a generator that 256 bits of the system's entropy set, used once.
    """
    drawn = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(32), "big")))
    return drawn.poisson(variance / 2, count) - drawn.poisson(variance / 2, count)


def chosen(count: int, size: int, source: Source = os.urandom) -> list[int]:
    """A subset of fixed size, every one equally likely.

    Args:
        count: how many there are.
        size: how many are taken, at most `count`.
        source: where bytes come from.

    Returns:
        Indices below `count`, ascending.
    """
    return sorted(np.argsort(uniform(count, source), kind="stable")[:size].tolist())


def tossed(count: int, rate: float, source: Source = os.urandom) -> list[int]:
    """A Poisson sample: each one is in it by itself.

    Args:
        count: how many there are.
        rate: the probability of each, in [0, 1].
        source: where bytes come from.

    Returns:
        Indices below `count`, ascending; there may be none.
    """
    return np.flatnonzero(uniform(count, source) < rate).tolist()
