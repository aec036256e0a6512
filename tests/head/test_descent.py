"""The slope that clients sum, and the descent by it: logistic regression on the pooled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from fedpft_core.errors import ReplyError
from fedpft_core.head.closed import Classes, Labels, Values
from fedpft_core.head.descent import PATIENCE, Descent, descend
from fedpft_core.head.discriminant import Head, fitted, scores
from fedpft_core.head.fixed import Fixed
from fedpft_core.head.slope import Slope, Slopes
from fedpft_core.head.statistics import Statistics, add

F64 = torch.float64


def rows(n: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that are not Gaussian and alike: each has two centres, and a spread of its own."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, classes, d, generator=g, dtype=F64)
    labels = torch.randint(classes, (n,), generator=g)
    which = torch.randint(2, (n,), generator=g)
    spread = 0.3 + labels.double()[:, None] / classes
    noise = torch.randn(n, d, generator=g, dtype=F64)
    stretched = torch.linspace(0.01, 3, d, dtype=F64)  # directions of very different variance
    return (centres[which, labels] + spread * noise) * stretched + 1, labels


def head(d: int, classes: int, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(classes, d, generator=g, dtype=F64),
        "bias": torch.randn(classes, generator=g, dtype=F64),
    }


def test_the_slope_is_that_of_the_summed_cross_entropy() -> None:
    x, y = rows(40, 5, 3)
    at = head(5, 4)
    live = {k: t.clone().requires_grad_() for k, t in at.items()}
    F.cross_entropy(x @ live["weight"].T + live["bias"], y, reduction="sum").backward()
    got = Slopes(at["weight"], at["bias"]).of(x, y)
    assert got.rows == 40 and got.width == 5
    for have, want in (
        (got.slope[:, :-1], live["weight"].grad), (got.slope[:, -1], live["bias"].grad),
    ):  # fmt: skip
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(clients=st.integers(1, 8), skewed=st.booleans(), seed=st.integers(0, 99))
def test_any_partition_gives_the_pooled_slope(clients: int, skewed: bool, seed: int) -> None:
    x, y = rows(60, 6, 4, seed)
    owner = np.random.default_rng(seed).integers(clients, size=60)
    if skewed:  # each class lies with one client
        owner = (y % clients).numpy()
    form = Slopes(**head(6, 4))
    found = add(form.of(x[owner == k], y[owner == k]) for k in range(clients))
    whole = form.of(x, y)
    assert torch.equal(found.counts, whole.counts)
    torch.testing.assert_close(found.slope, whole.slope, rtol=1e-12, atol=1e-11)


def down(n: int = 600, most: int = 400, classes: int = 5, judging: int = 4000) -> Any:
    x, y = rows(n, 8, classes)
    judge = rows(judging + n, 8, classes)
    fx, fy = judge[0][n:], judge[1][n:]
    found = Statistics.of(x, y, classes)
    start = fitted(found, fx, fy)

    def slope(at: Any) -> Slope:
        return Slopes(at["weight"], at["bias"]).of(x, y)

    return x, y, fx, fy, start, descend(start, found, slope, fx, fy, most)


def test_the_descent_ends_where_logistic_regression_on_all_rows_does() -> None:
    x, y, _, _, start, _ = down()
    # Judged by the rows themselves nothing stops it before the end.
    found = Statistics.of(x, y, 5)
    got = descend(start, found, lambda at: Slopes(**at).of(x, y), x, y, 400)
    best = LogisticRegression(C=1e9, tol=1e-10, max_iter=5000).fit(x.numpy(), y.numpy())
    want = F.cross_entropy(torch.from_numpy(best.decision_function(x.numpy())), y)
    assert float(want) <= got.head.loss <= float(want) + 1e-4  # type: ignore[operator]
    assert got.before > float(want) + 0.05  # the discriminant was not there already


def test_the_head_that_is_taken_is_the_best_on_the_judging_rows() -> None:
    _, _, fx, fy, start, got = down(n=60)  # few rows: the end of the descent knows them by heart
    losses = [float(F.cross_entropy(scores(h, fx), fy)) for h in (start, got.head)]
    assert losses[1] == pytest.approx(got.head.loss) and losses[1] <= losses[0]
    assert losses[0] == pytest.approx(got.before)
    assert got.taken > 0 and got.exchanges == got.taken + PATIENCE < 400


def test_a_descent_that_helps_nobody_leaves_the_start_as_it_is() -> None:
    _, _, fx, fy, start, _ = down()
    x, y = rows(300, 8, 5, seed=3)
    y = (y + 1) % 5  # wrong labels at all clients
    found = Statistics.of(x, y, 5)
    got = descend(start, found, lambda at: Slopes(**at).of(x, y), fx, fy, 50)
    assert isinstance(got, Descent) and got.taken == 0 and got.exchanges == PATIENCE
    assert torch.equal(got.head.weight, start.weight) and torch.equal(got.head.bias, start.bias)


def test_a_constant_feature_and_a_class_that_nobody_has_do_no_harm() -> None:
    x, y = rows(200, 6, 3)
    x[:, 2] = 1.0
    found = Statistics.of(x, y, 5)
    start: Head = fitted(found, x, y)
    got = descend(start, found, lambda at: Slopes(**at).of(x, y), x, y, 30)
    assert bool(torch.isfinite(got.head.weight).all()) and got.head.loss < got.before


def slopes(**change: Any) -> tuple[Slopes, dict[str, torch.Tensor]]:
    x, y = rows(30, 4, 3)
    form = Slopes(**head(4, 3))
    return form, form.of(x, y).tensors() | change


def longest() -> float:
    return float(rows(30, 4, 3)[0].norm(dim=1).max())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda t: t | {"counts": torch.tensor([29])}, "29 rows, but 30"),
        (lambda t: t | {"counts": torch.tensor([30.0])}, "type or shape"),
        (lambda t: t | {"slope": t["slope"][:, :-1].contiguous()}, "type or shape"),
        (lambda t: {"slope": t["slope"]}, "need counts, slope"),
        (lambda t: t | {"slope": t["slope"] * float("nan")}, "not finite"),
        (lambda t: t | {"slope": t["slope"] * 1e3}, "longer than features"),
        (lambda t: t | {"slope": t["slope"] + torch.eye(3, 5)[:, [1, 2, 3, 4, 0]]}, "biases"),
    ],
)
def test_slopes_that_no_rows_can_have_are_refused(spoil: Any, why: str) -> None:
    form, good = slopes()
    form.check(form.read(good, 4), 30, longest(), 1)
    with pytest.raises(ReplyError, match=why):
        form.check(form.read(spoil(good), 4), 30, longest(), 1)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda h: h | {"weight": h["weight"].float()}, "type or shape"),
        (lambda h: h | {"bias": h["bias"][:2]}, "type or shape"),
        (lambda h: h | {"more": h["bias"]}, "nothing else"),
        (lambda h: h | {"bias": h["bias"] * float("inf")}, "not finite"),
    ],
)
def test_a_head_that_is_none_is_refused_before_rows_are_read(spoil: Any, why: str) -> None:
    assert isinstance(Classes(3).slopes(head(4, 3), 4), Slopes)
    with pytest.raises(ReplyError, match=why):
        Classes(3).slopes(spoil(head(4, 3)), 4)


def test_numbers_and_labels_are_not_tuned_by_slopes() -> None:
    assert Values(2).slopes(head(4, 2), 4) is None and Labels(2).slopes(head(4, 2), 4) is None


def test_under_masks_a_slope_comes_back_within_what_rounding_leaves() -> None:
    form, good = slopes()
    fixed = Fixed(form, 4, 62, 10, 64, 1, longest())
    back = fixed.restore(fixed.quantise(good))
    assert torch.equal(back["counts"], good["counts"])
    assert float((back["slope"] - good["slope"]).abs().max()) <= fixed.errors(1)["slope"]
