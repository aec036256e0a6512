"""The head in closed form: equal to textbook formulas, indifferent to the partition."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn import functional as F

from fedpft_core.head import binary
from fedpft_core.head.discriminant import (
    FEW,
    TEMPERATURES,
    doubt,
    fitted,
    oracle_shrinkage,
    scores,
    solve,
)
from fedpft_core.head.mapped import fit, taken
from fedpft_core.head.moments import Moments
from fedpft_core.head.statistics import Statistics, add


def rows(n: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99)).double()
    return centres[labels] + torch.randn(n, d, generator=g, dtype=torch.float64), labels


def test_scores_are_the_posteriors_of_the_textbook() -> None:
    f, y = rows(300, 6, 3)
    head = solve(Statistics.of(f, y, 3), 1e-9)
    other = LinearDiscriminantAnalysis(solver="lsqr").fit(f.numpy(), y.numpy())
    ours = F.softmax(scores(head, f), -1)
    # scikit-learn's covariance weighs classes by their shares, as ours does.
    assert torch.allclose(ours, torch.from_numpy(other.predict_proba(f.numpy())), atol=2e-2)
    assert torch.equal(ours.argmax(-1), torch.from_numpy(other.predict(f.numpy())))


def test_shrinkage_is_that_of_scikit_learn() -> None:
    f, y = rows(80, 12, 4)
    within = Statistics.of(f, y, 4).within()
    centred = torch.cat([f[y == c] - f[y == c].mean(0) for c in range(4)])
    _, want = oas(centred.numpy(), assume_centered=True)
    assert oracle_shrinkage(within, 80) == pytest.approx(want, rel=0.05)
    assert oracle_shrinkage(torch.eye(5, dtype=torch.float64), 30) == 1.0
    assert oracle_shrinkage(torch.zeros(5, 5, dtype=torch.float64), 30) == 1.0


def test_the_partition_does_not_matter() -> None:
    f, y = rows(120, 8, 4)
    pooled = solve(Statistics.of(f, y, 4))
    for owner in (torch.arange(120) % 7, y, (y > 1).long()):
        parts = [Statistics.of(f[owner == k], y[owner == k], 4) for k in owner.unique()]
        head = solve(add(parts))
        assert torch.allclose(head.weight, pooled.weight, rtol=1e-9, atol=1e-9)
        assert torch.allclose(head.bias, pooled.bias, rtol=1e-9, atol=1e-9)
        again = solve(add(parts))
        assert torch.equal(head.weight, again.weight) and torch.equal(head.bias, again.bias)


@pytest.mark.parametrize("case", ["missing class", "one row a class", "few rows", "constant"])
def test_poor_data_still_give_a_head(case: str) -> None:
    f, y = rows(24, 40, 4)
    if case == "missing class":
        f, y = f[y != 2], y[y != 2]
    elif case == "one row a class":
        f, y = f[:4], y[:4]
    elif case == "constant":
        f = torch.cat([f[:, :1], torch.ones(24, 39, dtype=torch.float64)], 1)
    head = solve(Statistics.of(f, y, 4))
    assert bool(head.weight.isfinite().all()) and bool(head.bias.isfinite().all())
    if case == "missing class":
        assert not bool((scores(head, f).argmax(-1) == 2).any())
    if case in ("one row a class", "few rows"):
        assert float((scores(head, f).argmax(-1) == y).double().mean()) > 0.9
    if case == "constant":
        assert float(head.weight[:, 1:].abs().max()) < 1e-6


def test_a_single_row_is_enough_and_none_is_not() -> None:
    f, y = rows(4, 3, 4)
    head = solve(Statistics.of(f[:1], y[:1], 4))
    assert bool(head.bias.isfinite().all()) and float(head.weight.abs().max()) == 0.0
    with pytest.raises(ValueError, match="no rows"):
        solve(Statistics.of(f[:0], y[:0], 4))


def test_scale_and_shrinkage_are_the_best_of_those_tried() -> None:
    f, y = rows(200, 10, 4)
    g, z = rows(90, 10, 4, seed=1)
    found = Statistics.of(3 * f, y, 4)
    head = fitted(found, 3 * g, z, shares=(0.1,), temperatures=TEMPERATURES)
    tried = [
        float(F.cross_entropy(scores(solve(found, s), 3 * g) * t, z))
        for s in (None, 0.1)
        for t in TEMPERATURES
    ]
    assert head.loss == min(tried)
    assert head.scale in TEMPERATURES
    bare = fitted(found, g[:0], z[:0])
    assert bare.loss is None and torch.equal(bare.weight, solve(found).weight)


@pytest.mark.parametrize("judges", [1, 3, 10])
def test_few_rows_to_judge_by_do_not_make_a_head_sure(judges: int) -> None:
    """Features as of a 60-row table: more of them than rows, classes that lie well apart."""
    f, y = rows(48, 64, 3)
    g, z = rows(judges, 64, 3, seed=1)
    fresh, truth = rows(600, 64, 3, seed=2)
    noisy = 9 * torch.randn(600, 64, generator=torch.Generator().manual_seed(3)).double()
    for found, head in (
        (F.cross_entropy, fitted(Statistics.of(f, y, 3), g, z)),
        (
            F.binary_cross_entropy_with_logits,
            binary.fitted(Moments.of(f, F.one_hot(y, 3).double()), g, F.one_hot(z, 3).double()),
        ),
    ):
        want = truth if found is F.cross_entropy else F.one_hot(truth, 3).double()
        # Not below chance by much even where the rows are other than those seen.
        assert float(found(scores(head, fresh + noisy), want)) < 2 * math.log(3)
        assert float(found(scores(head, fresh), want)) < 0.6 * math.log(3)


def test_many_rows_to_judge_by_are_believed() -> None:
    assert doubt(3) == 1 / 5 and doubt(FEW) == 0.0
    f, y = rows(90, 8, 3)
    g, z = rows(FEW, 8, 3, seed=1)
    head = fitted(Statistics.of(f, y, 3), g, z)
    assert head.loss == float(F.cross_entropy(scores(head, g), z))


def test_mapped_statistics_are_those_of_mapped_rows() -> None:
    """Where the map is exact, taking the sums over is the same as mapping every row."""
    f, y = rows(400, 5, 3)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(5)).double())[
        0
    ]
    there = f @ turn * 1.5 + 0.3
    way = fit(f[:200], there[:200], 1e-9)
    assert way.error_after < 1e-12 < way.error_before
    found = taken(Statistics.of(f, y, 3), way, f[:200], there[:200])
    want = Statistics.of(there, y, 3)
    assert torch.equal(found.counts, want.counts)
    assert torch.allclose(found.sums, want.sums, rtol=1e-6, atol=1e-5)
    assert torch.allclose(found.outer, want.outer, rtol=1e-6, atol=1e-4)


def test_what_the_map_leaves_over_widens_the_covariance() -> None:
    f, y = rows(300, 4, 3)
    noise = torch.randn(300, 4, generator=torch.Generator().manual_seed(8)).double()
    there = f + 2 * noise
    way = fit(f, there, 1e-6)
    found, blind = taken(Statistics.of(f, y, 3), way, f, there), Statistics.of(way(f), y, 3)
    assert float(found.within().trace()) > float(blind.within().trace()) + 0.8 * 4 * 4
    assert math.isfinite(way.error_after)
