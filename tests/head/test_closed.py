"""Heads of regression and of several labels from sums: the same as from pooled rows, or refused."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from fedpft_core.errors import ReplyError
from fedpft_core.head import binary, moments, refit, ridge
from fedpft_core.head.closed import FORMS, Classes, Labels, Values
from fedpft_core.head.discriminant import scores
from fedpft_core.head.mapped import fit
from fedpft_core.head.moments import Moments
from fedpft_core.head.statistics import add


def numbers(n: int, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + 2
    y = x @ torch.arange(1.0, d + 1, dtype=torch.float64) + 7
    return x, y + torch.randn(n, generator=g, dtype=torch.float64)


def labels(n: int, k: int = 3, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, k, generator=g) < 0.4).double()
    centres = torch.randn(k, d, generator=g, dtype=torch.float64)
    return y @ centres + torch.randn(n, d, generator=g, dtype=torch.float64), y


def test_rows_of_each_group_the_sums_tell_apart() -> None:
    """What a node holds against its rule on rows of a class, whatever the task calls a label."""
    assert FORMS["classes"](3).group_rows(torch.tensor([0, 2, 2, 0, 2])) == [2, 0, 3]
    words = torch.tensor([[0, 0, 2, -100], [0, -100, -100, -100]])  # rows, not words
    assert FORMS["token-classes"](3).group_rows(words) == [2, 0, 1]
    sets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert FORMS["labels"](2).group_rows(sets) == [3, 1, 0, 2]
    assert FORMS["values"](1).group_rows(torch.tensor([1.5, 16.0])) == []


def test_moments_equal_a_loop_over_rows() -> None:
    x, y = numbers(30)
    got = Moments.of(x, y)
    cross, outer, squares = torch.zeros(1, 5).double(), torch.zeros(5, 5).double(), 0.0
    for row, value in zip(x, y, strict=True):
        cross += value * row
        outer += torch.outer(row, row)
        squares += float(value) ** 2
    assert (got.rows, got.groups, got.width) == (30, 0, 5)
    torch.testing.assert_close(got.cross, cross)
    torch.testing.assert_close(got.outer, outer)
    assert float(got.squares) == pytest.approx(squares)
    assert float(got.labels) == pytest.approx(float(y.sum()))
    torch.testing.assert_close(got.variance()[0], y.var(correction=0))


@settings(max_examples=25, deadline=None)
@given(clients=st.integers(1, 7), skewed=st.booleans(), seed=st.integers(0, 99))
def test_any_partition_gives_the_pooled_head(clients: int, skewed: bool, seed: int) -> None:
    for form, (x, y) in ((Values(1), numbers(60, seed=seed)), (Labels(3), labels(60, seed=seed))):
        owner = np.random.default_rng(seed).integers(clients, size=60)
        if skewed:
            owner = np.argsort(np.argsort(y.reshape(60, -1)[:, 0].numpy())) * clients // 60
        parts = {f"c{k}": form.of(x[owner == k], y[owner == k]) for k in range(clients)}
        found = add(parts[name] for name in sorted(parts))
        whole = form.of(x, y)
        a, b = (form.fit(s, 0.01, x[:0], y[:0]) for s in (found, whole))
        torch.testing.assert_close(a.weight, b.weight)
        torch.testing.assert_close(a.bias, b.bias)


def test_ridge_is_scikit_learns() -> None:
    x, y = numbers(50)
    found = Moments.of(x, y)
    for share in (1e-3, 0.1, 3.0):
        head = ridge.solve(found, share)
        pull = share * float(found.scatter().diagonal().mean()) * 50
        want = Ridge(alpha=pull).fit(x.numpy(), y.numpy())
        assert head.weight[0].numpy() == pytest.approx(want.coef_)
        assert float(head.bias) == pytest.approx(want.intercept_)


def test_cross_validation_from_sums_is_that_of_the_rows() -> None:
    """The generalised error by its definition, with the hat matrix of the centred rows."""
    x, y = numbers(25, seed=3)
    found = Moments.of(x, y)
    centred, left = (x - x.mean(0)).numpy(), (y - y.mean()).numpy()
    values, vectors = torch.linalg.eigh(found.scatter())
    turned, level = found.covariance() @ vectors, float(values.mean())
    errors = []
    for share in ridge.SHARES:
        pull = share * level
        hat = centred @ np.linalg.solve(centred.T @ centred + 25 * pull * np.eye(5), centred.T)
        error = np.square(left - hat @ left).mean() / (1 - (np.trace(hat) + 1) / 25) ** 2
        errors.append(error)
        got = ridge._cross_validated(found, turned, values, pull) * float(found.variance())
        assert got == pytest.approx(error)
    assert ridge.solve(found).shrinkage == ridge.SHARES[int(np.argmin(errors))]


def test_labelled_rows_choose_the_share() -> None:
    x, y = numbers(200)
    found = Moments.of(x[:8], y[:8])
    head = ridge.fitted(found, x[100:], y[100:])
    tried = [ridge.solve(found, share) for share in (None, *ridge.SHARES)]
    errors = [float((scores(h, x[100:])[:, 0] - y[100:]).square().mean()) for h in tried]
    assert head.loss == min(errors) and head.shrinkage == tried[int(np.argmin(errors))].shrinkage
    assert ridge.fitted(found, x[100:], y[100:], 0.3).shrinkage == 0.3


def test_fewer_rows_than_features_one_row_and_features_that_never_move() -> None:
    x, y = numbers(3, d=20)
    for rows in (1, 3):
        head = ridge.solve(Moments.of(x[:rows], y[:rows]))
        assert bool(head.weight.isfinite().all() and head.bias.isfinite().all())
    still = ridge.solve(Moments.of(torch.ones(9, 4).double(), torch.arange(9.0).double()))
    assert torch.equal(still.weight, torch.zeros(1, 4).double()) and float(still.bias) == 4.0
    with pytest.raises(ValueError, match="no rows"):
        ridge.solve(Moments.of(x[:0], y[:0]))
    with pytest.raises(ValueError, match="no rows"):
        binary.solve(Moments.of(x[:0], torch.zeros(0, 2)))


def test_each_labels_discriminant_is_scikit_learns() -> None:
    """Sherman and Morrison's way gives what the covariance within would."""
    x, y = labels(400)
    head = binary.solve(Moments.of(x, y), 1e-9)
    for k in range(3):
        want = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), y[:, k].numpy())
        got = scores(head, x)[:, k].numpy()
        # Its priors are the shares; here half a row is added to each.
        assert got == pytest.approx(want.decision_function(x.numpy()), abs=0.02)


def test_a_label_nobody_has_and_one_that_all_have() -> None:
    x, y = labels(40)
    y[:, 0], y[:, 1] = 0, 1
    head = binary.solve(Moments.of(x, y))
    assert torch.equal(head.weight[:2], torch.zeros(2, 5).double())
    assert float(head.bias[0]) == pytest.approx(math.log(0.5 / 40.5)) == -float(head.bias[1])


@pytest.mark.parametrize("form", [Values(1), Labels(3), Classes(3), Classes(3, one_a_row=False)])
def test_what_travels_is_what_was_sent_and_as_large_as_announced(form: Classes | Values) -> None:
    x, y = numbers(30) if form == Values(1) else labels(30)
    if isinstance(form, Classes):
        y = torch.arange(30) % 3
    found = form.of(x, y)
    sent = found.tensors()
    assert sum(t.numel() for t in sent.values()) == form.numbers(5)
    read = form.read(sent, 5)
    for f in fields(found):
        assert torch.equal(getattr(read, f.name), getattr(found, f.name))
    longest = float(x.norm(dim=1).max())
    form.check(read, 30, longest, 1)
    with pytest.raises(ReplyError, match="nothing else"):
        form.read({k: t for k, t in sent.items() if k != "outer"}, 5)
    with pytest.raises(ReplyError, match="wrong type or shape"):
        form.read(sent | {"outer": sent["outer"].float()}, 5)
    with pytest.raises(ReplyError, match="rows"):
        form.check(read, 31, longest, 1)
    with pytest.raises(ReplyError, match="mean square"):
        form.check(read, 30, longest / 10, 1)
    assert form in [make(3) for make in FORMS.values()] or form == Values(1)


def test_a_row_of_words_is_one_to_as_many_as_fit() -> None:
    form, x = Classes(3, one_a_row=False), torch.randn(30, 5).double()
    found = form.of(x, torch.arange(30) % 3)
    longest = float(x.norm(dim=1).max())
    form.check(found, 10, longest, 3)
    for rows, most in ((10, 2), (31, 64)):
        with pytest.raises(ReplyError, match=r"cannot have|more than"):
            form.check(found, rows, longest, most)


@pytest.mark.parametrize("binary_labels", [False, True])
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), d=st.integers(1, 9), seed=st.integers(0, 999))
def test_honest_sums_pass(binary_labels: bool, n: int, d: int, seed: int) -> None:
    x, y = (labels if binary_labels else numbers)(n, d=d, seed=seed)
    scale = 10.0 ** ((seed % 9) - 4)
    moments.check(Moments.of(x * scale, y), n, float(x.norm(dim=1).max()) * scale * 1.01,
                  binary_labels)  # fmt: skip


def lies() -> list[tuple[str, dict[str, object], str]]:
    one = torch.ones(1, dtype=torch.float64)
    return [
        ("labels", {"add": float("nan")}, "not finite"),
        ("count", {"add": 1}, "announced"),
        ("outer", {"times": 1e6}, "mean square"),
        ("outer", {"times": 0.5}, "negative"),
        ("squares", {"times": 0.5}, "variance is negative"),
        ("cross", {"times": 1.5}, "vary less"),
        ("features", {"times": 1.2}, "negative|vary less"),
        ("labels", {"add": float(one)}, "vary less|variance"),
    ]


@pytest.mark.parametrize(("name", "how", "words"), lies())
def test_sums_of_no_rows_are_refused(name: str, how: dict[str, float], words: str) -> None:
    x, y = numbers(40)
    good = Moments.of(x, y)
    longest = 1.5 * float(x.norm(dim=1).max())
    moments.check(good, 40, longest, False)
    value = getattr(good, name) * how.get("times", 1) + how.get("add", 0)
    if name == "labels" and how.get("add") == 1.0:
        value = value + 60.0  # a shift that the squares leave no room for
    with pytest.raises(ReplyError, match=words):
        moments.check(replace(good, **{name: value.to(getattr(good, name).dtype)}), 40, longest,
                      False)  # fmt: skip


def test_counts_of_labels_are_whole_and_within_the_rows() -> None:
    x, y = labels(20)
    good = Moments.of(x, y)
    for change in (0.5, 40.0, -40.0):
        bad = replace(good, labels=good.labels + change, squares=good.squares + change)
        with pytest.raises(ReplyError, match="label counts"):
            moments.check(bad, 20, 100.0, True)
    moments.check(good, 20, 100.0, True)
    with pytest.raises(ReplyError, match="vary less"):
        moments.check(replace(good, cross=2 * good.cross), 20, 100.0, True)


def test_mapped_sums_are_those_of_the_mapped_rows() -> None:
    """Where the map leaves nothing over, the sums are the other model's own."""
    x, y = numbers(300)
    turn = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there = x @ turn + 3
    way = fit(x, there, 1e-12)
    got, want = moments.taken(Moments.of(x, y), way, x, there), Moments.of(there, y)
    for f in fields(got):
        torch.testing.assert_close(
            getattr(got, f.name), getattr(want, f.name), rtol=1e-6, atol=1e-4
        )


def test_portions_of_a_clients_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with many rows does not hold all their features at once."""
    fm, _, _, _ = tiny.pair("bert")
    rows = tiny.encoded("bert", 30)
    whole = refit.of_rows(fm, rows, tiny.TASK, 4, 1024, 0).tensors()
    sizes = []
    real = refit.features
    monkeypatch.setattr(refit, "_AT_ONCE", 8)
    monkeypatch.setattr(
        refit,
        "features",
        lambda m, served, task: sizes.append(len(served)) or real(m, served, task),
    )
    parts = refit.of_rows(fm, rows, tiny.TASK, 4, 1024, 0).tensors()
    assert sizes == [2, 2, 2, 2] and parts["counts"].sum() == 30
    for name, t in whole.items():
        torch.testing.assert_close(parts[name], t)
