"""The costs `fedpft inspect` states, against PyTorch's own operation counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.model import load as models
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import Plan
from fedpft_core.proxy import cost as inspect
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.task.classify import logits

families = pytest.mark.parametrize("family", tiny.FAMILIES)
RANK = 2
MORE = ("deberta-v2",)  # products with relative positions, which are not counted


def _adapted(family: str, layers: int) -> tuple[torch.nn.Module, torch.nn.Module, Plan]:
    """A bare proxy, and the same with LoRA on; eager attention, so that its products count."""
    fm = tiny.model(family, num_hidden_layers=layers)
    fm.set_attn_implementation("eager")
    plan = tiny.plan_for(fm, keep_neurons=10)
    spec = adapters.make_spec(
        family_of(family), plan, (), config.LoraConfig(rank=RANK, dropout=0.0)
    )
    bare = build(fm, plan)
    return bare, adapters.attach(build(fm, plan), spec, plan), plan


def _row(family: str) -> tuple[dict[str, torch.Tensor], int]:
    batch = {k: v[:1] for k, v in tiny.batch_of(family).items()}
    mask = batch.get("attention_mask")
    length = mask.shape[1] if mask is not None else 18 if family == "deit" else 17
    return batch, length


@families
def test_forward_flops_equal_the_counter(family: str) -> None:
    bare, adapted, _ = _adapted(family, 4)
    batch, length = _row(family)
    row = family_of(family)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits(adapted, batch)
    counted = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    for i, block in enumerate(row.block_list(bare)):
        (name,) = (n for n in counted if n.endswith(f"{row.blocks}.{i}"))
        cost = inspect.block_cost(row, block, length, RANK, 16)
        if family in MORE:
            assert counted[name] > cost.forward * length
            continue
        assert counted[name] == cost.forward * length
        assert cost.parameters == sum(p.numel() for p in block.parameters())


@families
def test_step_flops_equal_the_counter(family: str) -> None:
    """A middle block's cost is what a model one block deeper costs more."""
    batch, length = _row(family)
    totals = []
    for layers in (5, 4):
        bare, adapted, plan = _adapted(family, layers)
        assert plan.blocks[2].state == "pruned"
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(logits(adapted, batch), batch["labels"]).backward()
        totals.append(counter.get_total_flops())
    block = family_of(family).block_list(bare)[2]
    cost = inspect.block_cost(family_of(family), block, length, RANK, 16)
    if family in MORE:
        assert totals[0] - totals[1] > cost.step * length
    else:
        assert totals[0] - totals[1] == cost.step * length


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_image_tokens(family: str) -> None:
    model = tiny.model(family)
    assert family_of(family).shape(model.config).image_tokens == _row(family)[1]


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize(
    "keys",
    [{}, {"plan.proxy": "layer-drop", "plan.drop-to": 2}, {"plan.proxy": "full"}],
    ids=["ffn-pruned", "layer-drop", "full"],
)
def test_the_table_states_the_models(family: str, keys: dict[str, object], tmp_path: Path) -> None:
    flat = tiny.write_task(family, tmp_path, rows=30) | keys
    cfg = config.from_flat(flat)
    found = inspect.inspect(cfg)
    image = family not in tiny.TEXT_FAMILIES
    loaded = models.load(cfg.model, tiny.task_of(family, ("a", "b")).model(), 0)
    plan = make_plan(loaded.model, cfg.plan, 0)
    small = build(loaded.model, plan)
    cells = dict(zip(found["columns"], found["rows"][-1], strict=True))
    assert cells["FM parameters"] == f"{models.size(loaded.model)[0]:,}"
    assert cells["proxy parameters"] == f"{models.size(small)[0]:,}"
    assert cells["proxy bytes"] == f"{models.size(small)[1]:,}"
    kept = [row[1] for row in found["rows"][:4]]
    assert kept == [b.state for b in plan.blocks]
    row = family_of(family)
    by_hand = [
        sum(inspect.block_cost(row, b, 17 if image else 16, 4, 16).step for b in row.block_list(m))
        for m in (loaded.model, small)
    ]
    assert found["step_ratio"] == pytest.approx(by_hand[0] / by_hand[1])
    assert (found["step_ratio"] == 1.0) == plan.is_full


def test_the_first_contact_is_of_what_travels(tmp_path: Path) -> None:
    def told(**keys: object) -> float:
        found = inspect.inspect(config.from_flat(flat | keys))
        assert f"wire.package = {keys['wire.package']}" in found["notes"][-1]
        return float(found["notes"][-1].split(" MB of it")[0].rsplit(" ", 1)[1])

    flat = tiny.write_task("bert", tmp_path, rows=30)
    assert told(**{"wire.package": "int8"}) < told(**{"wire.package": "fp32"})
