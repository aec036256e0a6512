"""Weights in few bits: exact products, rounding that settles, and forms that keep every bit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.wire import rounding
from fedpft_core.wire.coded import PACKAGE_FORMATS, Coded, rounded, smallest
from fedpft_core.wire.identity import tensor_digest

matrices = st.tuples(st.integers(1, 70), st.integers(1, 70))
FORMATS = (*PACKAGE_FORMATS, "int4")


def draw(shape: tuple[int, ...], seed: int, power: int = 0) -> Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-4, 3, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return 2.0**power * size * torch.randn(shape, generator=generator)


def bits(t: Tensor) -> str:
    return tensor_digest(t)


@settings(max_examples=150, deadline=None)
@given(matrices, st.integers(0, 10**6), st.sampled_from(FORMATS), st.integers(-60, 60))
def test_rounding_once_more_changes_no_bit(
    shape: tuple[int, int], seed: int, fmt: str, power: int
) -> None:
    t = draw(shape, seed, 0 if fmt == "fp16" else power)
    for axis in (0, 1):
        once = rounded(t, fmt, axis)
        assert bits(rounded(once, fmt, axis)) == bits(once)


@pytest.mark.parametrize("most", [127, 7])
def test_the_largest_number_of_a_row_is_the_largest_there_is(most: int) -> None:
    """However its scale is rounded: over all 24 bits that a significand can begin with."""
    top = torch.arange(2**23, 2**24, 37, dtype=torch.float32)[:, None]
    if most == 127:
        q, scale = rounding.to_int8(torch.cat([top, top / 3], 1), 0)
        again, same = rounding.to_int8(rounding.of_int8(q, scale), 0)
    else:
        codes, scale = rounding.to_int4(top)
        q = (codes & 15).to(torch.int8) - 8
        again, same = rounding.to_int4(rounding.of_int4(codes, scale, 1))
        again = (again & 15).to(torch.int8) - 8
    assert bool((q[:, 0] == most).all())
    assert torch.equal(again, q) and torch.equal(same, scale)


@settings(max_examples=30, deadline=None)
@given(matrices, st.integers(0, 10**6), st.sampled_from(["int8", "int4"]))
def test_values_are_products_without_rounding(shape: tuple[int, int], seed: int, fmt: str) -> None:
    """Against the definition in fractions, value by value."""
    t = draw(shape, seed)
    out = rounded(t, fmt)
    size = shape[1] if fmt == "int8" else rounding.GROUP
    most = 127 if fmt == "int8" else 7
    for i in range(min(4, shape[0])):
        for start in range(0, shape[1], size):
            row = [Fraction(v) for v in t[i, start : start + size].tolist()]
            exact = max(map(abs, row)) / most
            scale = Fraction(float(torch.tensor(float(exact)).to(torch.bfloat16)))
            for j, value in enumerate(row):
                q = max(-most, min(most, round(value / scale))) if scale else 0
                got = Fraction(float(out[i, start + j]))
                # A quotient next to a half may fall on either side of it in float32.
                assert (
                    got == q * scale
                    or abs(value / scale - (q + Fraction(1, 2))) < 1e-4
                    or (abs(value / scale - (q - Fraction(1, 2))) < 1e-4)
                )


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "shape", [(5, 64), (64, 5), (7, 33), (1, 1), (6,), (), (4, 3, 2, 2), (0, 3)]
)
def test_the_smallest_form_gives_back_every_bit(
    fmt: str, axis: int, shape: tuple[int, ...]
) -> None:
    t = draw(shape, 3) if shape and shape[0] else torch.zeros(shape)
    kept = t.clone()
    out = rounded(t, "int8" if fmt == "int4" and len(shape) != 2 else fmt, axis)
    assert bits(t) == bits(kept), "what was given has changed"
    form = smallest(out)
    assert bits(form.decoded(torch.float32, shape)) == bits(out)


def test_the_smallest_form_is_as_small_as_the_format() -> None:
    t = draw((64, 96), 0)
    sizes = {fmt: smallest(rounded(t, fmt)).nbytes for fmt in FORMATS}
    assert sizes == {
        "fp32": 4 * 64 * 96, "bf16": 2 * 64 * 96, "fp16": 2 * 64 * 96,
        "int8": 64 * 96 + 2 * 64, "int4": 32 * 96 + 2 * 64 * 3,
    }  # fmt: skip
    across = smallest(rounded(t, "int8", 1))
    assert across.nbytes == 64 * 96 + 2 * 96 and across.scale is not None
    assert across.scale.shape == (1, 96)


def test_signs_of_zeros_and_what_is_no_number_survive() -> None:
    odd = torch.tensor([[0.0, -0.0], [math.nan, 1.0], [math.inf, -math.inf]])
    for t in (odd[:1], odd[1:2], odd[2:], odd, torch.arange(6), torch.ones(2, 2, dtype=torch.bool)):
        form = smallest(t)
        assert bits(form.decoded(t.dtype, tuple(t.shape))) == bits(t)


def test_numbers_too_large_for_a_format_are_refused() -> None:
    with pytest.raises(ValueError, match="fp16 cannot hold numbers as large as 7e"):
        rounded(torch.full((2, 2), 7e4), "fp16")
    assert rounded(torch.full((2, 2), 7e4), "int8").isfinite().all()


def test_vectors_are_not_rounded_to_whole_numbers() -> None:
    t = draw((9,), 0)
    assert bits(rounded(t, "int8")) == bits(rounded(t, "int4")) == bits(t)


def test_tiny_rows_become_zero_and_stay_so() -> None:
    t = torch.full((2, 40), 1e-40)
    for fmt in ("int8", "int4"):
        out = rounded(t, fmt)
        assert bool((out == 0).all()) and bits(rounded(out, fmt)) == bits(out)


_Q = torch.zeros(4, 6, dtype=torch.int8)
_S = torch.ones(4, 1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (torch.zeros(6, 4), None),
        (torch.zeros(4, 6, dtype=torch.float64), None),
        (_Q, None),
        (_Q, _S.float()),
        (_Q, _S[:3]),
        (_Q, _S.reshape(4)),
        (_Q, torch.ones(4, 6, dtype=torch.bfloat16)),
        (_Q[:3], _S),
        (torch.zeros(4, 6), _S),
        (torch.zeros(4, 2, dtype=torch.uint8), _S),
        (torch.zeros(4, 3, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.bfloat16)),
        (torch.zeros(2**20, dtype=torch.uint8), _S),
    ],
)
def test_what_is_no_form_of_a_tensor_is_refused(values: Tensor, scale: Tensor | None) -> None:
    with pytest.raises(ReplyError, match="no form of float32"):
        Coded(values, scale).decoded(torch.float32, (4, 6))
    with pytest.raises(ReplyError, match="no form of int64"):
        Coded(values, scale).decoded(torch.int64, (4, 6))
