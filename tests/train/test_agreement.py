"""How alike the gradients of proxy and FM are."""

from __future__ import annotations

import math

import oracles
import pytest
import tiny
import torch

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.model.families import family_of
from fedpft_core.train import agreement as measure
from fedpft_core.train.gradient import adapter_gradient

families = pytest.mark.parametrize("family", tiny.BUILDS)


@families
def test_the_fm_agrees_with_itself(family: str) -> None:
    plan = tiny.plan_for(tiny.model(family), proxy="full")
    fm, twin, _, _ = tiny.pair(family, plan)
    found = measure.gradient_agreement(
        fm, twin, plan, tiny.TASK, tiny.encoded(family, 12), 5, b_only=False
    )
    rows = [found, {"cosine": found["head_cosine"], "relative_l2": found["head_relative_l2"]}]
    for row in [*rows, *found["blocks"]]:
        assert row["cosine"] == pytest.approx(1.0, abs=1e-12)
        assert row["relative_l2"] == pytest.approx(0.0, abs=1e-6)
    assert [b["block"] for b in found["blocks"]] == [0, 1, 2, 3]


@families
@pytest.mark.parametrize("b_only", [False, True])
def test_agreement_equals_the_oracle(family: str, b_only: bool) -> None:
    # Of random models a proxy with fewer neurons need not even point the FM's way.
    fm, small, plan, _ = tiny.pair(family, tiny.plan_for(tiny.model(family), keep_share=0.75))
    data = tiny.encoded(family, 12)
    rows = list(batches(data, 5, None))
    g_fm = adapter_gradient(fm, tiny.TASK, rows)
    g_small = adapter_gradient(small, tiny.TASK, rows, plan)
    found = measure.gradient_agreement(fm, small, plan, tiny.TASK, data, 5, b_only)

    def flat(part: str) -> tuple[list[float], list[float]]:
        names = [
            n
            for n in sorted(g_small)
            if (".lora_" in n) != (part == "head")
            and not (b_only and ".lora_A" in n)
            and (part in ("head", "all") or n.startswith(f"{family_of(family).blocks}.{part}."))
        ]
        assert names
        return tuple([v for n in names for v in g[n].flatten().tolist()] for g in (g_fm, g_small))  # type: ignore[return-value]

    for part, row in [("all", found), *((str(b["block"]), b) for b in found["blocks"])]:
        cosine, distance = oracles.cosine_and_distance(*flat(part))
        assert row["cosine"] == pytest.approx(cosine, rel=1e-9)
        assert row["relative_l2"] == pytest.approx(distance, rel=1e-6)
    cosine, distance = oracles.cosine_and_distance(*flat("head"))
    assert found["head_cosine"] == pytest.approx(cosine, rel=1e-9)
    assert found["head_relative_l2"] == pytest.approx(distance, rel=1e-6)
    assert 0 < found["cosine"] < 1


def test_at_the_start_the_gradient_of_a_is_zero_and_b_only_measures() -> None:
    fm, small, plan, _ = tiny.pair("bert")
    start = adapters.initial(fm, 0)
    adapters.load(fm, start), adapters.load(small, start, plan)
    data = tiny.encoded("bert", 12)
    gradient = adapter_gradient(fm, tiny.TASK, batches(data, 5, None))
    assert not any(g.any() for n, g in gradient.items() if ".lora_A" in n)
    found = measure.gradient_agreement(fm, small, plan, tiny.TASK, data, 5, b_only=True)
    assert -1 <= found["cosine"] <= 1 and found["relative_l2"] > 0


def test_agreement_of_plain_vectors() -> None:
    x, y = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    assert measure.agreement({"a": x}, {"a": y}) == measure.Agreement(0.0, math.sqrt(2))
    assert measure.agreement({"a": x}, {"a": -x}) == measure.Agreement(-1.0, 2.0)
    assert measure.agreement({"a": x, "more": y}, {"a": x}) == measure.Agreement(1.0, 0.0)
    nothing = measure.agreement({"a": x}, {"a": 0 * x})
    assert math.isnan(nothing.cosine) and math.isnan(nothing.relative_l2)


@families
def test_layer_drop_is_measured_over_the_blocks_it_has(family: str) -> None:
    plan = tiny.plan_for(tiny.model(family), proxy="layer-drop", drop_to=2)
    fm, small, _, _ = tiny.pair(family, plan)
    found = measure.gradient_agreement(
        fm, small, plan, tiny.TASK, tiny.encoded(family, 8), 8, b_only=False
    )
    assert [b["block"] for b in found["blocks"]] == [0, 3]
    assert all(math.isfinite(b["cosine"]) for b in found["blocks"])
