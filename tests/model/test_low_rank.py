"""Query and key of low rank: a plan option from plan to plug-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear

from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.config import LoraConfig, PlanConfig
from fedpft_core.errors import UserError
from fedpft_core.model import load as models
from fedpft_core.model.families import family_of
from fedpft_core.model.low_rank import LowRank
from fedpft_core.model.plan import BlockPlan, Plan
from fedpft_core.proxy import cost as inspect
from fedpft_core.proxy import package as proxy
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.task.classify import logits
from fedpft_core.train.tune import LocalSettings, fine_tune
from fedpft_core.wire.package import Package

families = pytest.mark.parametrize("family", tiny.FAMILIES)
WIDTH = 16


def _projections(model: torch.nn.Module, family: str, block: int) -> list[Any]:
    row = family_of(family)
    return [row.block_list(model)[block].get_submodule(p) for p in row.query_key]


@families
def test_full_rank_gives_the_same_logits(family: str) -> None:
    fm = tiny.model(family).double()
    everything = BlockPlan("pruned", tuple(range(tiny.neurons(family))), WIDTH)
    small = build(fm, Plan(family, tiny.neurons(family), (everything,) * 4))
    batch = tiny.double(tiny.batch_of(family))
    with torch.no_grad():
        torch.testing.assert_close(logits(small, batch), logits(fm, batch), rtol=1e-10, atol=1e-11)
    query, key = _projections(small, family, 2)
    assert isinstance(query, LowRank)
    assert isinstance(key, LowRank) == (key.out_features == WIDTH)  # a narrower key stays whole


@families
def test_it_is_the_truncated_svd_of_each_projection_in_pruned_blocks_only(family: str) -> None:
    fm = tiny.model(family).double()
    before = tiny.weights(fm)
    plan = tiny.plan_for(fm, qk_rank=5)
    assert [b.qk_rank for b in plan.blocks] == [0, 5, 5, 0]
    small = build(fm, plan)
    assert tiny.same_bits(tiny.weights(fm), before), "building changed the FM"
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    for block in range(4):
        pairs = zip(
            _projections(fm, family, block), _projections(small, family, block), strict=True
        )
        for whole, low in pairs:
            if block not in plan.pruned:
                assert torch.equal(low.weight, whole.weight)
                continue
            u, s, vh = np.linalg.svd(whole.weight.detach().numpy())
            want = (u[:, :5] * s[:5]) @ vh[:5]
            np.testing.assert_allclose(low.weight.detach().numpy(), want, atol=1e-12)
            assert (low.down.shape, low.up.shape) == ((5, WIDTH), (whole.out_features, 5))
            shift = 0.0 if low.bias is None else low.bias.detach().numpy()
            found = low(x).detach().numpy()
            np.testing.assert_allclose(found, x.numpy() @ want.T + shift, atol=1e-12)


@families
def test_lora_goes_on_under_the_fms_names_and_learns(family: str) -> None:
    fm = tiny.model(family)
    plan = tiny.plan_for(fm, qk_rank=4)
    spec = adapters.make_spec(family_of(family), plan, (), LoraConfig(rank=2, dropout=0.0))
    small = adapters.attach(build(fm, plan), spec, plan)
    full = adapters.attach(fm, spec)
    mine, theirs = adapters.read(small, plan), adapters.read(full)
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in theirs.items()}
    assert all(isinstance(p, LoraLinear) for p in _projections(small, family, 1))
    frozen = {n: p.detach().clone() for n, p in small.named_parameters() if not p.requires_grad}
    settings = LocalSettings(1e-2, 4, 1, 3, 0.0, 1.0, 1)
    fine_tune(small, tiny.TASK, tiny.encoded(family, 12), settings, 0)
    learned = adapters.read(small, plan)
    moved = [k for k in learned if "lora_B" in k and learned[k].any()]
    assert len(moved) == len([k for k in learned if "lora_B" in k]) == 16
    live = dict(small.named_parameters())
    assert all(torch.equal(live[n], value) for n, value in frozen.items())
    adapters.load(full, learned)


@families
def test_a_client_rebuilds_it_to_the_bit(family: str) -> None:
    fm = tiny.model(family)
    plan = tiny.plan_for(fm, qk_rank=4)
    small = build(fm, plan)
    spec = adapters.make_spec(family_of(family), plan, (), LoraConfig(rank=2))
    kind = "text" if family in tiny.TEXT_FAMILIES else "image"
    package = proxy.make_package(small, plan, spec, tiny.processor(family), kind, tiny.LABELS, 16)
    mine = adapters.attach(small, spec, plan)
    tensors = tiny.random_adapter(mine, plan)
    adapters.load(mine, tensors, plan)
    client = proxy.rebuild(Package.from_bytes(package.to_bytes()))
    adapters.load(client.model, tensors, client.plan)
    assert client.plan == plan
    batch = tiny.batch_of(family)
    with torch.no_grad():
        assert torch.equal(logits(client.model, batch), logits(mine, batch))
    whole = _projections(tiny.model(family), family, 1)[0].weight.detach().numpy().tobytes()
    assert whole not in package.to_bytes()


def test_plans_without_it_read_as_before() -> None:
    plan = tiny.plan_for(tiny.model("bert"))
    assert "qk_rank" not in plan.to_json()
    low = tiny.plan_for(tiny.model("bert"), qk_rank=3)
    assert Plan.from_json(low.to_json()) == low != plan
    for rank in (-1, 1.5, True, "3"):
        raw = json.loads(low.to_json())
        raw["blocks"][1]["qk_rank"] = rank
        with pytest.raises(ValueError, match="not a plan"):
            Plan.from_json(json.dumps(raw))
    raw = json.loads(low.to_json())
    raw["blocks"][0]["qk_rank"] = 3
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(json.dumps(raw))


def test_a_rank_above_the_width_names_the_key() -> None:
    with pytest.raises(UserError, match=r"plan\.qk-rank = 17 .* 16"):
        make_plan(tiny.model("bert"), PlanConfig(qk_rank=17), 0)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_whole_run(family: str, tmp_path: Path) -> None:
    """Distilled, re-aligned, resumed by patches at the clients, exported onto the untouched FM."""
    flat = tiny.write_task(family, tmp_path, rows=60) | {
        "plan.qk-rank": 4, "federation.rounds": 3, "distill.steps": 4, "align.steps": 2,
        "align.interval": 1, "train.local-epochs": 1,
    }  # fmt: skip
    events = tiny.run(flat, tmp_path / "run")
    assert {e["status"] for e in tiny.main_run(events, "reply")} == {"ok"}
    assert len(tiny.main_run(events, "alignment")) == 2
    cfg = config.from_flat(flat)
    fm = models.load(cfg.model, tiny.task_of(family).model(), 0).model
    PeftModel.from_pretrained(fm, str(tmp_path / "run" / "adapter"))
    cost = inspect.inspect(cfg)
    plain = inspect.inspect(config.from_flat(flat | {"plan.qk-rank": 0}))
    # Two matrices of 16 × 4 for one of 16 × 16, for q and k.
    cells = [r["rows"][1][r["columns"].index("proxy parameters")] for r in (plain, cost)]
    cells = [int(c.replace(",", "")) for c in cells]
    assert cells[0] - cells[1] == 2 * (16 * 16 - 2 * 16 * 4)
    assert cost["step_ratio"] > plain["step_ratio"]
