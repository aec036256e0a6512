"""Whose sums a head is better without: a slow oracle, attackers, skew, order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional as F

from fedpft_core.head import binary, discriminant, ridge
from fedpft_core.head.closed import Classes, Labels, Values
from fedpft_core.head.form import Form, Sums
from fedpft_core.head.guard import CHANCE, EACH, absences, judge, needed
from fedpft_core.head.statistics import Statistics, add

CLASSES, WIDTH, CLIENTS = 4, 40, 20
FORM = Classes(CLASSES)
Rows = dict[str, tuple[Tensor, Tensor]]


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of four classes that lie close together."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7)).double()
    y = torch.randint(0, CLASSES, (n,), generator=g)
    spread = torch.linspace(3, 0.6, WIDTH, dtype=torch.float64)
    return 0.6 * centres[y] + spread * torch.randn(n, WIDTH, generator=g, dtype=torch.float64), y


def shared(scheme: str, flipped: Collection[int] = (), n: int = 4000, seed: int = 0) -> Rows:
    """Rows by client, IID or one class a client; some clients have label C - 1 - c for c."""
    x, y = rows(n, seed)
    owner = np.random.default_rng(seed).integers(CLIENTS, size=n)
    if scheme == "one class":
        # Five clients a class: those of class c are c, c + 4, c + 8, ...
        owner = CLASSES * (owner // CLASSES) + y.numpy()
    out = {}
    for k in range(CLIENTS):
        mine = y[owner == k]
        out[f"c{k:02d}"] = (x[owner == k], CLASSES - 1 - mine if k in flipped else mine)
    return out


def sums(of: Rows, form: Form = FORM) -> dict[str, Sums]:
    return {name: form.of(x, y) for name, (x, y) in of.items()}


def naive(
    form: Form, of: Rows, x: Tensor, y: Tensor, limit: int
) -> tuple[list[tuple[str, float, float]], float, float]:
    """The rule by its words: every head from the pooled rows of all who are left, one by one."""

    def fit(names: list[str], share: float | None) -> tuple[Tensor, float]:
        pooled = form.of(*(torch.cat([of[n][i] for n in names]) for i in (0, 1)))
        if share is None:
            share = form.fit(pooled, None, x, y).shrinkage
        if isinstance(form, Classes):
            head = discriminant.solve(pooled, share)
            per_row = lambda z: F.cross_entropy(z, y, reduction="none")  # noqa: E731
        elif isinstance(form, Labels):
            head = binary.solve(pooled, share)
            per_row = lambda z: torch.stack([  # noqa: E731
                F.binary_cross_entropy_with_logits(z[:, k], y[:, k], reduction="none")
                for k in range(y.shape[1])
            ]).mean(0)  # fmt: skip
        else:
            return (discriminant.scores(ridge.solve(pooled, share), x)[:, 0] - y).square(), share
        raw = discriminant.scores(head, x)
        scale = minimize_scalar(
            lambda s: float(per_row(raw * s).mean()), bounds=(0.01, 10), method="bounded",
            options={"xatol": 1e-9},
        ).x  # fmt: skip
        return per_row(raw * float(scale)), share

    def fall(a: Tensor, b: Tensor) -> tuple[float, float]:
        d = (a - b).numpy()
        return float(d.mean()), float(d.std(ddof=1) / len(d) ** 0.5)

    left = sorted(of)
    start, share = fit(left, None)
    now, path, sure = start, [], False
    while len(path) < limit:
        tried = {n: fit([m for m in left if m != n], share)[0] for n in left}
        falls = {n: fall(now, t) for n, t in tried.items()}
        good = [n for n in left if falls[n][0] > EACH * falls[n][1]]
        if not good:
            break
        worst = max(good, key=lambda n: falls[n][0])
        path.append((worst, *falls[worst]))
        left.remove(worst)
        now = tried[worst]
        whole, error = fall(start, now)
        sets = len(list(combinations(range(len(of)), len(path))))
        sure = sure or whole > norm.isf(CHANCE / sets) * error
    if not sure:
        path, now = [], start
    return path, float(start.mean()), float(now.mean())


def numbers(of: Rows, flipped: set[int]) -> Rows:
    """The same rows with a number to learn; some clients have its opposite."""
    turn = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    return {
        n: (x, (x @ turn + 0.1 * x[:, 0].square()) * (-1 if int(n[1:]) in flipped else 1))
        for n, (x, _) in of.items()
    }


def several(of: Rows, flipped: set[int]) -> Rows:
    """The same rows with two labels that may hold at once; some clients have the opposite."""
    out = {}
    for n, (x, _) in of.items():
        y = torch.stack([x[:, 0] + x[:, 1] > 0.4, x[:, 2] > 0], 1).double()
        out[n] = (x, 1 - y if int(n[1:]) in flipped else y)
    return out


@pytest.mark.parametrize("kind", ["classes", "numbers", "labels"])
@pytest.mark.parametrize("limit", [2, 5])
def test_the_choice_and_the_losses_are_those_of_a_slow_loop(kind: str, limit: int) -> None:
    bad = {3, 8, 11}
    of, judges = shared("iid", bad), {"v00": rows(600, 50)}
    form: Form = FORM
    if kind == "numbers":
        form, of, judges = Values(1), numbers(shared("iid"), bad), numbers(judges, set())
    if kind == "labels":
        form, of, judges = Labels(2), several(shared("iid"), bad), several(judges, set())
    x, y = judges["v00"]
    found = judge(form, sums(of, form), None, x, y, limit)
    want, before, after = naive(form, of, x, y, limit)
    assert [a.client for a in found.left_out] == [name for name, _, _ in want] != []
    assert found.before == pytest.approx(before, rel=1e-7)
    assert found.after == pytest.approx(after, rel=1e-7)
    for a, (_, gain, error) in zip(found.left_out, want, strict=True):
        assert a.gain == pytest.approx(gain, rel=1e-4)
        assert a.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("scheme", ["iid", "one class"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_fifth_with_flipped_labels_is_left_out_and_nobody_else(scheme: str, seed: int) -> None:
    bad = {1, 6, 11, 16} if seed else {0, 5, 10, 15}
    x, y = rows(1200, 100 + seed)
    found = judge(FORM, sums(shared(scheme, bad, seed=seed)), None, x, y, 4)
    assert {int(a.client[1:]) for a in found.left_out} == bad
    assert found.after < found.before - 3 * found.left_out[0].error


@pytest.mark.parametrize("scheme", ["iid", "one class"])
def test_of_honest_clients_nobody_is_left_out(scheme: str) -> None:
    for seed in range(4):
        x, y = rows(1200, 100 + seed)
        found = judge(FORM, sums(shared(scheme, seed=seed)), None, x, y, 9)
        assert found.left_out == () and found.before == found.after


def test_who_alone_has_a_class_stays_with_attackers_and_without() -> None:
    """One client has all rows of class 3; a head without it never says that class."""
    x, y = rows(1200, 100)
    for bad in (set(), {0, 5, 10, 15}):
        of = shared("iid", bad)
        pooled = {n: (a[b != 3], b[b != 3]) for n, (a, b) in of.items() if n != "c07"}
        a, b = rows(4000, 0)
        pooled["c07"] = (a[b == 3], b[b == 3])
        found = judge(FORM, sums(pooled), None, x, y, 9)
        assert "c07" not in {absent.client for absent in found.left_out}
        assert {int(absent.client[1:]) for absent in found.left_out} <= bad
        without = sums({n: r for n, r in pooled.items() if n != "c07"})
        assert int(add(without.values()).counts[3]) == 0


def test_the_order_of_the_clients_does_not_change_a_bit() -> None:
    x, y = rows(1200, 100)
    parts = sums(shared("one class", {0, 5, 10, 15}))
    names = list(parts)
    found = judge(FORM, parts, None, x, y, 4)
    assert len(found.left_out) == 4
    for order in (names[::-1], names[7:] + names[:7]):
        assert judge(FORM, {n: parts[n] for n in order}, None, x, y, 4) == found


def test_what_the_loss_has_to_fall_by_grows_with_what_is_tried() -> None:
    assert needed(1, 1) == pytest.approx(norm.isf(CHANCE))
    assert needed(20, 1) == pytest.approx(norm.isf(CHANCE / 20))
    assert needed(20, 4) == pytest.approx(norm.isf(CHANCE / 4845))
    assert needed(10_000, 4_000) > 30  # more sets than floats can count


def test_no_more_are_left_out_than_may_be() -> None:
    x, y = rows(1200, 100)
    parts = sums(shared("iid", {0, 5, 10, 15}))
    every = judge(FORM, parts, None, x, y, 4)
    told: list[tuple[int, int]] = []
    two = judge(FORM, parts, None, x, y, 2, lambda *done: told.append(done))
    assert two.left_out == every.left_out[:2]
    assert told[0] == (1, 39) and told[-1] == (39, 39)
    none = judge(FORM, parts, None, x, y, 0)
    assert none == replace(none, left_out=(), after=none.before)
    early: list[tuple[int, int]] = []
    judge(FORM, sums(shared("iid")), None, x, y, 2, lambda *done: early.append(done))
    assert early[-1] == (39, 39)  # whoever watches sees the end of it


def test_the_shrinkage_is_that_of_the_head_of_all_sums() -> None:
    x, y = rows(1200, 100)
    parts = sums(shared("iid"))
    for fixed in (None, 0.7):
        share = FORM.fit(add(parts.values()), fixed, x, y).shrinkage
        whole = discriminant.solve(add(parts.values()), share)
        losses = discriminant.losses(discriminant.scores(whole, x), y)
        got = judge(FORM, parts, fixed, x, y, 1).before
        assert got == pytest.approx(float(losses.mean()), rel=1e-12)


def test_nothing_is_left_of_what_only_one_has() -> None:
    """In parts of rows, where a subtraction would leave a remainder of a class that is gone."""
    x, y = rows(70, 3)
    owner = torch.arange(70) % 7
    y = torch.where(owner == 4, 3, y % 3)
    parts = [Statistics.of(x[owner == k], y[owner == k], 4).part(1 / (3 + k)) for k in range(7)]
    got = list(absences(parts))
    for k, rest in enumerate(got):
        assert isinstance(rest, Statistics)
        want = add(p for j, p in enumerate(parts) if j != k)
        torch.testing.assert_close(rest.outer, want.outer)
        torch.testing.assert_close(rest.counts, want.counts)
    gone = got[4]
    assert isinstance(gone, Statistics)
    assert float(gone.counts[3]) == 0 and not gone.sums[3].any()
    (one,) = list(absences(parts[:2]))[1:]
    assert tiny.same_bits(one.tensors(), parts[0].tensors())


def test_the_linear_layer_alone_is_that_of_the_head() -> None:
    x, y = rows(90, 3)
    for form, answers in (
        (FORM, y), (Labels(2), torch.stack([y > 0, y > 2], 1).double()), (Values(1), x[:, 0] + 1),
    ):  # fmt: skip
        found = form.of(x, answers)
        head = form.fit(found, 0.05, x[:0], answers[:0])
        weight, bias = form.line(found, 0.05)
        if isinstance(form, Values) and not isinstance(form, Labels):
            torch.testing.assert_close(weight, head.weight)
            torch.testing.assert_close(bias, head.bias)
        else:
            assert torch.equal(weight, head.weight) and torch.equal(bias, head.bias)


def test_no_factor_of_the_scores_has_less_loss() -> None:
    x, y = rows(90, 3)
    raw = discriminant.scores(discriminant.solve(Statistics.of(x, y, CLASSES), 0.01), x)
    several = torch.stack([y == 1, y == 2], 1).double()
    for scores, got, loss in (
        (5 * raw, discriminant.losses(5 * raw, y), lambda z: F.cross_entropy(z, y)),
        (3 * raw[:, 1:3], binary.losses(3 * raw[:, 1:3], several),
         lambda z: F.binary_cross_entropy_with_logits(z, several)),
    ):  # fmt: skip
        assert got.shape == (90,)
        tried = min(float(loss(scores * s)) for s in np.linspace(0.01, 2, 400))
        assert float(got.mean()) <= tried + 1e-9 < float(loss(scores))
