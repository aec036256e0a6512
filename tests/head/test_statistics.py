"""Class statistics: sums equal those of pooled rows; what no rows can have is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft_core.errors import ReplyError
from fedpft_core.head.statistics import Statistics, add, check, projection


def rows(n: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    centres = torch.randn(classes, d, generator=g, dtype=torch.float64)
    return centres[labels] + torch.randn(n, d, generator=g, dtype=torch.float64), labels


def oracle(f: torch.Tensor, y: torch.Tensor, classes: int) -> Statistics:
    """Row by row, class by class."""
    counts = torch.zeros(classes, dtype=torch.int64)
    sums = torch.zeros(classes, f.shape[1], dtype=torch.float64)
    outer = torch.zeros(f.shape[1], f.shape[1], dtype=torch.float64)
    for row, label in zip(f, y, strict=True):
        counts[label] += 1
        sums[label] += row
        outer += torch.outer(row, row)
    return Statistics(counts, sums, outer)


def test_statistics_equal_a_loop_over_rows() -> None:
    f, y = rows(40, 5, 3)
    got, want = Statistics.of(f, y, 4), oracle(f, y, 4)
    assert torch.equal(got.counts, want.counts)
    assert torch.allclose(got.sums, want.sums, rtol=1e-13, atol=1e-13)
    assert torch.allclose(got.outer, want.outer, rtol=1e-13, atol=1e-13)
    assert torch.equal(got.outer, got.outer.T)


@settings(max_examples=30, deadline=None)
@given(clients=st.integers(1, 8), skewed=st.booleans(), seed=st.integers(0, 99))
def test_any_partition_gives_the_pooled_statistics(clients: int, skewed: bool, seed: int) -> None:
    f, y = rows(60, 6, 4, seed)
    owner = np.random.default_rng(seed).integers(clients, size=60)
    if skewed:  # each class lies with one client
        owner = (y % clients).numpy()
    found = add(Statistics.of(f[owner == k], y[owner == k], 4) for k in range(clients))
    whole = Statistics.of(f, y, 4)
    assert torch.equal(found.counts, whole.counts)
    assert torch.allclose(found.sums, whole.sums, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.outer, whole.outer, rtol=1e-12, atol=1e-12)


def test_within_is_the_covariance_within_classes() -> None:
    f, y = rows(50, 4, 3)
    centred = torch.cat([f[y == c] - f[y == c].mean(0) for c in range(3)])
    assert torch.allclose(Statistics.of(f, y, 3).within(), centred.T @ centred / 50, atol=1e-12)


def test_tensors_travel_and_count_what_is_promised() -> None:
    f, y = rows(30, 7, 3)
    found = Statistics.of(f, y, 3)
    sent = found.tensors()
    assert sum(t.numel() for t in sent.values()) == 7 * 8 // 2 + 3 * 7 + 3
    back = Statistics.from_tensors(sent, 3, 7)
    assert torch.equal(back.outer, found.outer) and torch.equal(back.sums, found.sums)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("outer"),
        lambda t: t.update(more=torch.zeros(1)),
        lambda t: t.update(sums=t["sums"].float()),
        lambda t: t.update(counts=t["counts"][:1]),
    ],
)
def test_tensors_of_another_form_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    f, y = rows(30, 7, 3)
    sent = Statistics.of(f, y, 3).tensors()
    change(sent)
    with pytest.raises(ReplyError, match="class statistics"):
        Statistics.from_tensors(sent, 3, 7)


def good() -> Statistics:
    f, y = rows(30, 5, 3)
    return Statistics.of(f, y, 4)


def test_honest_statistics_pass() -> None:
    f, _ = rows(30, 5, 3)
    check(good(), 30, float(f.norm(dim=1).max()))
    one = Statistics.of(f[:1], torch.tensor([2]), 4)
    check(one, 1, float(f[:1].norm()) * (1 + 1e-12))
    constant = Statistics.of(torch.ones(9, 5, dtype=torch.float64), torch.arange(9) % 4, 4)
    check(constant, 9, 2.3)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda s: replace(s, sums=s.sums / 0), "finite"),
        (lambda s: replace(s, outer=s.outer * float("nan")), "finite"),
        (lambda s: replace(s, counts=s.counts + torch.tensor([1, 0, 0, 0])), "not to the 30"),
        (lambda s: replace(s, counts=s.counts + torch.tensor([40, -40, 0, 0])), "negative or more"),
        (lambda s: replace(s, outer=s.outer * 100), "mean square"),
        (lambda s: replace(s, outer=-s.outer), "those of no rows"),
        (lambda s: replace(s, sums=s.sums * 3), "those of no rows"),
        (
            lambda s: replace(s, sums=s.sums + torch.tensor([[0.0], [0.0], [0.0], [1.0]])),
            "without rows",
        ),
    ],
)
def test_a_lie_is_refused(lie, reason: str) -> None:  # type: ignore[no-untyped-def]
    f, _ = rows(30, 5, 3)
    with pytest.raises(ReplyError, match=re.escape(reason)):
        check(lie(good()), 30, float(f.norm(dim=1).max()))


def test_projection_is_orthonormal_seeded_and_only_for_wide_features() -> None:
    assert projection(8, 8, 0) is None
    p = projection(12, 5, 3)
    assert p is not None and p.shape == (12, 5)
    assert torch.allclose(p.T @ p, torch.eye(5, dtype=torch.float64), atol=1e-12)
    again, other = projection(12, 5, 3), projection(12, 5, 4)
    assert again is not None and torch.equal(p, again)
    assert other is not None and not torch.equal(p, other)
