"""Sums as whole numbers: counts exact, the rest within the bound that is stated."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fedpft_core.head.closed import Classes, Labels, Values
from fedpft_core.head.fixed import Fixed

WIDTH, MOST = 5, 3
FORMS: dict[str, Any] = {
    "classes": Classes(3), "words": Classes(3, one_a_row=False), "values": Values(2),
    "labels": Labels(2),
}  # fmt: skip


def drawn(kind: str, rows: int, seed: int) -> Any:
    """The sums of some rows with features no longer than 2 and numbers within 3."""
    g = torch.Generator().manual_seed(seed)
    n = rows * MOST if kind == "words" else rows
    x = torch.randn(n, WIDTH, generator=g, dtype=torch.float64)
    x *= 2 / x.norm(dim=1, keepdim=True)
    if kind in ("classes", "words"):
        y = torch.randint(0, 3, (n,), generator=g)
    elif kind == "labels":
        y = torch.randint(0, 2, (n, 2), generator=g).double()
    else:
        y = 6 * torch.rand(n, 2, generator=g, dtype=torch.float64) - 3
    return FORMS[kind].of(x, y)


def fixed(kind: str, clients: int, rows: int, bits: int = 62) -> Fixed:
    return Fixed(FORMS[kind], WIDTH, bits, clients, rows, MOST, 2.0, 3.0)


@pytest.mark.parametrize("kind", list(FORMS))
@pytest.mark.parametrize(("clients", "bits"), [(3, 62), (40, 62), (5, 32)])
def test_the_sum_is_that_of_the_whole_numbers_and_within_the_bound(
    kind: str, clients: int, bits: int
) -> None:
    agreed = fixed(kind, clients, 20, bits)
    sums = [drawn(kind, 1 + i % 20, i).tensors() for i in range(clients)]
    whole = [agreed.quantise(s) for s in sums]
    total = np.sum(whole, axis=0)
    assert max(int(np.abs(w).max()) for w in whole) <= agreed.largest
    assert clients * agreed.largest < 2 ** (bits - 1)
    found = agreed.restore(total)
    at = 0
    for name in sorted(found):
        step, n = Fraction(agreed.steps[name]), found[name].numel()
        bound = Fraction(agreed.errors(clients)[name])
        for i in range(n):
            exact = sum(int(w[at + i]) for w in whole) * step
            assert float(exact) == float(found[name].reshape(-1)[i])  # nothing but the last bit
            plain = sum(Fraction(float(s[name].reshape(-1)[i])) for s in sums)
            assert abs(exact - plain) <= bound
        if bound == 0:
            assert torch.equal(found[name].double(), sum(s[name].double() for s in sums))
        at += n
    assert at == agreed.count == len(total)
    counted = {"classes": {"counts"}, "words": {"counts"}, "values": {"count"},
               "labels": {"count", "labels", "squares"}}  # fmt: skip
    assert {k for k, e in agreed.errors(clients).items() if e == 0} == counted[kind]


@pytest.mark.parametrize("kind", list(FORMS))
def test_the_bound_is_reached_by_some_number(kind: str) -> None:
    """Half a step is what rounding to the nearest can cost, and no less."""
    agreed = fixed(kind, 3, 20, 24)
    sums = drawn(kind, 20, 0).tensors()
    found = agreed.restore(agreed.quantise(sums))
    off = float((found["outer"] - sums["outer"]).abs().max()) / agreed.errors(1)["outer"]
    assert 0.5 < off <= 1


def test_a_step_is_a_power_of_two_at_which_the_largest_sum_fits() -> None:
    agreed = fixed("classes", 7, 20)
    for name, bound in (("sums", 40.0), ("outer", 80.0)):
        step = agreed.steps[name]
        assert np.frexp(step)[0] == 0.5
        assert bound / step <= agreed.largest < 2 * bound / step
    assert agreed.steps["counts"] == 1.0


def test_what_lies_outside_is_refused_not_clipped() -> None:
    agreed, sums = fixed("values", 3, 20), drawn("values", 20, 0).tensors()
    for name in ("outer", "labels", "cross"):
        far = dict(sums) | {name: sums[name] * 1e3}
        with pytest.raises(ValueError, match="larger than"):
            agreed.quantise(far)
    with pytest.raises(ValueError, match="not finite"):
        agreed.quantise(dict(sums) | {"outer": sums["outer"] * float("nan")})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"longest": 0.0}, "no number above 0"),
        ({"longest": float("nan")}, "no number above 0"),
        ({"longest": 1e300}, "no number above 0"),
        ({"label": 0.0}, "how large the numbers"),
        ({"label": float("nan")}, "how large the numbers"),
        ({"bits": 4}, "no room"),
    ],
)
def test_bounds_that_cannot_be_reckoned_with_are_refused(change: dict[str, Any], why: str) -> None:
    keys: dict[str, Any] = {"longest": 2.0, "label": 3.0, "bits": 62} | change
    agreed = Fixed(Values(1), WIDTH, keys["bits"], 3, 20, 1, keys["longest"], keys["label"])
    with pytest.raises(ValueError, match=why):
        agreed.quantise(drawn("values", 3, 0).tensors())
