"""Counts as digits: the sums of digits are those of the counts, to the last one."""

from __future__ import annotations

import numpy as np
import pytest

from fedpft_core.secure import digits, ring


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("most", [0, 1, 127, 128, 2**31, 2**48])
def test_digits_add_up_to_counts(bits: int, most: int) -> None:
    n = digits.needed(most, bits)
    drawn = np.random.default_rng(bits).integers(0, most + 1, (40, 9))
    drawn[0, :2] = most, 0
    parts = [digits.split(c, n, bits) for c in drawn]
    assert all(p.min() >= 0 and p.max() <= ring.largest(bits) for p in parts)
    assert np.array_equal(digits.joined(np.sum(parts, axis=0), n, bits), drawn.sum(0))
    if most:
        assert (n - 1) * (bits - 1) < most.bit_length() <= n * (bits - 1)


def test_what_has_more_digits_is_refused() -> None:
    for bad in (-1, 2**14):
        with pytest.raises(ValueError, match="larger than"):
            digits.split(np.array([3, bad]), 2, 8)
    assert digits.split(np.array([2**14 - 1]), 2, 8).tolist() == [127, 127]
