"""Robust rules against dense oracles, and against clients that mean harm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedpft_core.aggregation import Replies, RuleSettings, aggregate, needs_own, withstands
from fedpft_core.aggregation._geometry import gram
from fedpft_core.aggregation._weights import capped, shares
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors

SCALING = 6.0
Q = "layer.0.query"
SHAPES = {
    f"{Q}.lora_A.weight": (2, 6),
    f"{Q}.lora_B.weight": (6, 2),
    "layer.1.query.lora_A.weight": (2, 6),
    "layer.1.query.lora_B.weight": (6, 2),
    "classifier.weight": (3, 6),
    "classifier.bias": (3,),
}
ROBUST = (
    "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median", "norm-clipped",
    "fltrust",
)  # fmt: skip
SELECTING = ("krum", "multi-krum", "bulyan", "geometric-median")


def noise(*purpose: str | int) -> Tensors:
    return {k: torch.randn(s, generator=torch_stream(1, *purpose, k)) for k, s in SHAPES.items()}


START = noise("start")
TRUTH = noise("truth")  # the direction that honest clients share


def moved(direction: Tensors, size: float, start: Tensors = START) -> Tensors:
    return {k: start[k] + size * direction[k] for k in start}


def honest(i: int | str) -> Tensors:
    return moved({k: TRUTH[k] + 0.3 * noise("client", i)[k] for k in TRUTH}, 0.05)


def sign_flip(i: int) -> Tensors:
    return moved({k: START[k] - honest(i)[k] for k in START}, 4.0)


def scaling(i: int) -> Tensors:
    return moved({k: honest(i)[k] - START[k] for k in START}, 200.0)


def random_noise(i: int) -> Tensors:
    return moved(noise("attack", i), 3.0)


def regauged(i: int) -> Tensors:
    """(t A, B / t): the product of an honest reply, and factors that spoil a mean."""
    good = honest(i)
    return {k: v * 50 if "lora_A" in k else v / 50 if "lora_B" in k else v for k, v in good.items()}


def flat(adapter: Tensors, distance: str = "factors") -> Tensor:
    """What distances are measured of, formed in full."""
    if distance == "factors":
        return torch.cat([adapter[k].double().flatten() for k in sorted(adapter)])
    parts = []
    for k in sorted(adapter):
        if k.endswith("lora_A.weight"):
            b = adapter[k.replace("lora_A", "lora_B")].double()
            parts.append(SCALING * (b @ adapter[k].double()).flatten())
        elif not k.endswith("lora_B.weight"):
            parts.append(adapter[k].double().flatten())
    return torch.cat(parts)


def run(
    rule: str, adapters: list[Tensors], tmp_path: Path, examples: int = 5, **settings: object
) -> Tensors:
    given = {"scaling": SCALING, "own": lambda: honest("server")} | settings
    with Replies(START, tmp_path, RuleSettings(**given)) as replies:  # type: ignore[arg-type]
        for i, adapter in enumerate(adapters):
            replies.add(f"{i:03d}", examples, adapter)
        return aggregate(rule, replies)


def mean(adapters: list[Tensors]) -> Tensors:
    return {k: torch.stack([a[k].double() for a in adapters]).mean(0).float() for k in SHAPES}


def off(found: Tensors, want: Tensors) -> float:
    """Distance from what is wanted, in lengths of the change that is wanted, in both measures."""
    return max(
        float((flat(found, d) - flat(want, d)).norm() / (flat(want, d) - flat(START, d)).norm())
        for d in ("factors", "product")
    )


# --- geometry -----------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["factors", "product"])
def test_inner_products_are_those_of_the_dense_changes(tmp_path: Path, distance: str) -> None:
    adapters = [noise("any", i) for i in range(5)]
    settings = RuleSettings(distance=distance, scaling=SCALING)
    with Replies(START, tmp_path, settings) as replies:
        for i, a in enumerate(adapters[:4]):
            replies.add(f"{i}", 1, a)
        found = gram(replies, adapters[4:])
    dense = torch.stack([flat(a, distance) - flat(START, distance) for a in adapters])
    assert torch.allclose(found, dense @ dense.T, rtol=1e-9, atol=1e-9)


def test_blocks_of_rows_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpft_core.aggregation import _geometry

    found = []
    for rows, values in ((512, 2**20), (4, 7)):
        monkeypatch.setattr(_geometry, "_ROWS", rows)
        monkeypatch.setattr(_geometry, "_SLICE", values)
        with Replies(START, tmp_path, RuleSettings(scaling=SCALING)) as replies:
            for i in range(9):
                replies.add(f"{i}", 1, noise("any", i))
            found.append(gram(replies))
    assert torch.allclose(found[0], found[1], rtol=1e-12)


# --- dense oracles ------------------------------------------------------------------------


def krum_oracle(points: Tensor, f: int) -> list[int]:
    n = len(points)
    scores = []
    for i in range(n):
        d = sorted(float((points[i] - points[j]).square().sum()) for j in range(n) if j != i)
        scores.append(sum(d[: n - f - 2]))
    return sorted(range(n), key=lambda i: scores[i])


@pytest.mark.parametrize("distance", ["factors", "product"])
def test_krum_and_multi_krum_choose_as_the_oracle(tmp_path: Path, distance: str) -> None:
    for seed in range(5):
        adapters = [noise("any", seed, i) for i in range(9)]
        order = krum_oracle(torch.stack([flat(a, distance) for a in adapters]), 2)
        settings = {"attackers": 0.2, "distance": distance}
        krum = run("krum", adapters, tmp_path, **settings)
        assert all(torch.equal(krum[k], adapters[order[0]][k]) for k in SHAPES)
        multi = run("multi-krum", adapters, tmp_path, **settings)
        want = mean([adapters[i] for i in order[:7]])
        assert all(torch.allclose(multi[k], want[k], atol=1e-6) for k in SHAPES)


def test_bulyan_is_the_oracle(tmp_path: Path) -> None:
    adapters = [noise("any", i) for i in range(11)]
    found = run("bulyan", adapters, tmp_path, attackers=2 / 11, distance="factors")
    left, chosen = list(range(11)), []
    for _ in range(11 - 4):
        points = torch.stack([flat(adapters[i]) for i in left])
        chosen.append(left.pop(krum_oracle(points, 2)[0]))
    for k in SHAPES:
        values = torch.stack([adapters[i][k].double().flatten() for i in sorted(chosen)]).T
        want = []
        for column in values.tolist():
            middle = sorted(column)[3]
            want.append(sum(sorted(column, key=lambda v: abs(v - middle))[:3]) / 3)
        assert torch.allclose(found[k].flatten().double(), torch.tensor(want).double(), atol=1e-6)


def test_trimmed_mean_is_the_oracle(tmp_path: Path) -> None:
    adapters = [noise("any", i) for i in range(10)]
    found = run("trimmed-mean", adapters, tmp_path, attackers=0.2)
    for k in SHAPES:
        columns = torch.stack([a[k].flatten() for a in adapters]).T.tolist()
        want = torch.tensor([sum(sorted(c)[2:-2]) / 6 for c in columns])
        assert torch.allclose(found[k].flatten(), want, atol=1e-6)


@pytest.mark.parametrize("distance", ["factors", "product"])
def test_no_small_step_from_the_geometric_median_is_nearer_to_all(
    tmp_path: Path, distance: str
) -> None:
    from fedpft_core.aggregation.geometric_median import coefficients

    points = torch.stack([flat(noise("any", i), distance) for i in range(8)])
    c = torch.tensor(coefficients(points @ points.T))

    def cost(c: Tensor) -> float:
        return float((points - (c[:, None] * points).sum(0)).norm(dim=1).sum())

    best = cost(c)
    assert best < cost(torch.full((8,), 1 / 8).double())
    for i, j in itertools.permutations(range(8), 2):
        step = torch.zeros(8, dtype=torch.float64)
        step[i], step[j] = 1e-3, -1e-3
        assert cost(c + step) >= best - 1e-12


def test_fltrust_is_the_oracle(tmp_path: Path) -> None:
    adapters = [honest(i) for i in range(3)] + [sign_flip(7), random_noise(8)]
    own = honest("server")
    found = run("fltrust", adapters, tmp_path, distance="factors", own=lambda: own)
    d0 = flat(own) - flat(START)
    total, weight = torch.zeros_like(d0), 0.0
    for a in adapters:
        d = flat(a) - flat(START)
        trust = max(0.0, float(d @ d0 / (d.norm() * d0.norm())))
        total += trust * d * float(d0.norm() / d.norm())
        weight += trust
    assert torch.allclose(flat(found), flat(START) + total / weight, atol=1e-5)


def test_a_server_without_an_update_of_its_own_cannot_use_fltrust(tmp_path: Path) -> None:
    assert needs_own("fltrust") and not needs_own("krum")
    with pytest.raises(ValueError, match="own"):
        run("fltrust", [honest(0)], tmp_path, own=None)


def test_a_norm_is_clipped_to_the_median(tmp_path: Path) -> None:
    adapters = [honest(0), honest(1), scaling(2)]
    found = run("norm-clipped", adapters, tmp_path, distance="factors")
    changes = [flat(a) - flat(START) for a in adapters]
    bound = sorted(float(c.norm()) for c in changes)[1]
    want = sum(c * min(1.0, bound / float(c.norm())) for c in changes) / 3
    assert torch.allclose(flat(found), flat(START) + want, atol=1e-5)


# --- attackers ----------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [sign_flip, scaling, random_noise])
@pytest.mark.parametrize("rule", ROBUST)
def test_a_rule_stands_the_attackers_it_assumes(
    tmp_path: Path, rule: str, attack: Callable[[int], Tensors]
) -> None:
    good = [honest(i) for i in range(16)]
    bad = [attack(100 + i) for i in range(4)]
    want = mean(good)
    found = run(rule, bad + good, tmp_path, attackers=0.2)
    assert off(run("average", bad + good, tmp_path), want) > 0.9
    # A clipped mean lets each attacker pull with one median change, and no further.
    assert off(found, want) < (0.5 if rule in ("norm-clipped", "krum") else 0.25)


@pytest.mark.parametrize("rule", SELECTING)
def test_factors_of_another_size_do_not_hide_behind_their_product(
    tmp_path: Path, rule: str
) -> None:
    good = [honest(i) for i in range(16)]
    adapters = [regauged(100 + i) for i in range(4)] + good
    want = mean(good)
    assert off(run("average", adapters, tmp_path), want) > 1
    assert off(run(rule, adapters, tmp_path, attackers=0.2), want) < 0.5
    blind = [
        r
        for r in ("multi-krum",)
        if off(run(r, adapters, tmp_path, attackers=0.2, distance="product"), want) > 0.5
    ]
    assert blind == ["multi-krum"]


@pytest.mark.parametrize("rule", ROBUST)
def test_without_attackers_little_is_lost(tmp_path: Path, rule: str) -> None:
    good = [honest(i) for i in range(20)]
    assert off(run(rule, good, tmp_path, attackers=0.2), mean(good)) < 0.5


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_replies_are_no_error(tmp_path: Path, rule: str, count: int) -> None:
    found = run(rule, [honest(i) for i in range(count)], tmp_path, attackers=0.4)
    assert all(bool(t.isfinite().all()) for t in found.values())
    stood = withstands(rule, count)
    assert stood is not None and 0 <= stood < max(count, 1)


def test_claims_stand_where_the_papers_put_them() -> None:
    assert [withstands("krum", n) for n in (4, 5, 6, 7, 23)] == [0, 1, 1, 2, 10]
    assert [withstands("bulyan", n) for n in (6, 7, 10, 11)] == [0, 1, 1, 2]
    assert [withstands("median", n) for n in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2]
    assert withstands("average", 20) is None


# --- weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [0.2, 0.3, 0.5, 1.0])
def test_nobody_weighs_more_than_the_cap(cap: float) -> None:
    for examples in ([2**40 - 1, 10, 20, 30, 40, 50], [1, 1], [7], [5, 5, 900, 900, 3, 1]):
        found = shares(capped(examples, cap))
        assert math.isclose(sum(found), 1)
        assert max(found) <= max(cap, 1 / len(examples)) + 1e-9
        for (a, x), (b, y) in itertools.combinations(zip(examples, found, strict=True), 2):
            assert (x - y) * (a - b) >= 0  # the order stays
    assert capped([3, 4, 5], 0.5) == [3, 4, 5]


def test_a_claim_of_very_many_rows_owns_the_average_only_where_it_is_believed(
    tmp_path: Path,
) -> None:
    good = [honest(i) for i in range(9)]
    for weighting, bound in (("examples", None), ("capped", 0.12), ("uniform", 0.12)):
        settings = RuleSettings(weighting=weighting, weight_cap=0.1)
        with Replies(START, tmp_path, settings) as replies:
            for i, a in enumerate(good):
                replies.add(f"{i}", 100, a)
            replies.add("liar", 2**40 - 1, random_noise(0))
            found = aggregate("average", replies)
        share = float((flat(found) - flat(mean(good))).norm())
        share /= float((flat(random_noise(0)) - flat(mean(good))).norm())
        assert share > 0.99 if bound is None else share < bound


def test_a_dropped_reply_is_gone_and_its_place_is_not_used_again(tmp_path: Path) -> None:
    with Replies(START, tmp_path) as replies:
        for name in "abc":
            replies.add(name, 1, honest(name))
        replies.drop("a")
        replies.add("d", 1, honest("d"))
        assert replies.names == ["b", "c", "d"] and len(replies) == 3
        found = aggregate("average", replies)
    want = mean([honest(n) for n in "bcd"])
    assert all(torch.allclose(found[k], want[k], atol=1e-6) for k in SHAPES)
