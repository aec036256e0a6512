"""Counts as digits, so that numbers of any size are summed in the ring that changes are summed in.

A count is written in the base 2^(bits - 1), each digit of which is a number of so many bits with
its sign, as a value of a change is. The sums of the digits give the sum of the counts exactly:
nobody has to carry before the end.
"""

from __future__ import annotations

import numpy as np


def needed(most: int, bits: int) -> int:
    """Digits of a count.

    Args:
        most: the largest count.
        bits: of one number, with its sign; at least 2.

    Returns:
        At least 1.
    """
    return max(1, -(-most.bit_length() // (bits - 1)))


def split(counts: np.ndarray, digits: int, bits: int) -> np.ndarray:
    """Digits of counts.

    Args:
        counts: int64 [n], at least 0.
        digits: of each.
        bits: of one number, with its sign.

    Returns:
        int64 [n digits], the lowest digit of each count first.

    Raises:
        ValueError: a count is negative, or has more digits.
    """
    base = bits - 1
    if (counts < 0).any() or (counts >> min(base * digits, 63)).any():
        raise ValueError("the counts are larger than the request has room for")
    shifts = np.minimum(base * np.arange(digits, dtype=np.int64), 63)
    return ((counts[:, None] >> shifts) & np.int64(2**base - 1)).reshape(-1)


def joined(total: np.ndarray, digits: int, bits: int) -> np.ndarray:
    """The sum of counts that sums of their digits stand for.

    Args:
        total: int64 [n digits].
        digits: of each count.
        bits: of one number, with its sign.

    Returns:
        int64 [n].
    """
    places = np.int64(2) ** ((bits - 1) * np.arange(digits, dtype=np.int64))
    found: np.ndarray = total.reshape(-1, digits) @ places
    return found
