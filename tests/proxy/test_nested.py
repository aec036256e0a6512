"""Sub-FMs of several widths: each is a part of the next, as plans, models, weights and messages."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft_core.adapter import lora as adapters
from fedpft_core.config import Config, FederationConfig, LoraConfig, PlanConfig
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.model.families import FFN, family_of
from fedpft_core.model.plan import BlockPlan, Plan
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.proxy.narrow import cut, narrowed
from fedpft_core.proxy.nested import make_plans, nested, positions
from fedpft_core.proxy.package import make_package
from fedpft_core.proxy.patch import apply_patch
from fedpft_core.proxy.recut import PLAN, make_recut
from fedpft_core.task.classify import logits
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.package import Package, Patch

families = pytest.mark.parametrize("family", ["bert", "llama", "vit"])
WIDTHS = "0.25,0.5,0.75"


def plans(family: str, widths: str = WIDTHS, **keys: str) -> dict[str, Plan]:
    return make_plans(tiny.model(family), PlanConfig(widths=widths, **keys), seed=0)


@families
def test_a_width_keeps_what_a_single_plan_of_its_share_keeps(family: str) -> None:
    fm = tiny.model(family)
    for name, plan in plans(family).items():
        assert plan == make_plan(fm, PlanConfig(keep_share=float(name)), seed=0)


shares = st.lists(st.integers(1, 24), min_size=4, max_size=4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=st.lists(shares, min_size=2, max_size=4))
def test_any_budgets_by_block_are_nested_or_refused(steps: list[list[int]]) -> None:
    """Of two widths the smaller's neurons are all in the larger, or the list is not taken."""
    rising = all(
        all(a <= b for a, b in zip(one, two, strict=True)) and one != two
        for one, two in pairwise(steps)
    )
    text = ",".join("/".join(f"{k / 24:.6f}" for k in step) for step in steps)
    try:
        found = list(plans("bert", text).values())
    except UserError as error:
        assert not rising and "nested" in str(error)
        return
    assert rising and nested(found)
    for step, plan in zip(steps, found, strict=True):
        assert [len(b.kept) or 24 for b in plan.blocks] == step
        assert [b.state for b in plan.blocks] == ["whole" if k == 24 else "pruned" for k in step]
    for small in found:
        for entry, at, wide in zip(small.blocks, range(4), found[-1].blocks, strict=True):
            if entry.kept:
                kept = wide.kept or tuple(range(24))
                here = positions(found[-1], small)[at]
                assert tuple(kept[i] for i in here.tolist()) == entry.kept


@families
def test_budgets_by_saliency_are_nested_and_as_large_as_even_ones(family: str) -> None:
    even = plans(family, retained_layers="")
    chosen = plans(family, retained_layers="", width_budget="saliency")
    assert nested(list(chosen.values()))
    for name, plan in chosen.items():
        total = [sum(len(b.kept) or plan.neurons(i) for i, b in enumerate(p.blocks))
                 for p in (plan, even[name])]  # fmt: skip
        assert total[0] == total[1]
    assert chosen != even


def test_keeping_all_is_the_fm() -> None:
    found = plans("bert", "0.5,1")
    assert found["1"].is_full and not found["0.5"].is_full
    fm = tiny.model("bert")
    wide = build(fm, found["1"])
    batch = tiny.batch_of("bert")
    assert torch.equal(logits(narrowed(wide, found["1"], found["1"]), batch), logits(fm, batch))


@families
def test_a_narrower_proxy_is_a_slice_of_the_wider_one_to_the_bit(family: str) -> None:
    fm, found = tiny.model(family), plans(family)
    wide, narrow = found["0.75"], found["0.25"]
    spec = adapters.make_spec(family_of(family), wide, (), LoraConfig(rank=2))
    large = adapters.attach(build(fm, wide), spec, wide)
    small = narrowed(large, wide, narrow)
    alone = adapters.attach(build(fm, narrow), spec, narrow)
    for model in (small, alone):
        adapters.load(model, adapters.read(large, wide), narrow)
    assert tiny.same_bits(tiny.weights(small), tiny.weights(alone))
    # What is not cut is held once, and the adapter twice.
    shared = {p.data_ptr() for p in large.parameters()}
    own = [n for n, p in small.named_parameters() if p.data_ptr() not in shared]
    ffn = [FFN(family_of(family), b) for b in family_of(family).block_list(small)]
    assert sum(p.numel() for n, p in small.named_parameters() if n in own) == sum(
        p.numel() for i in narrow.pruned for p in ffn[i].parts().values()
    ) + sum(p.numel() for p in adapters.parameters(small).values())


def packages(family: str) -> dict[str, Package]:
    fm, made = tiny.model(family), {}
    for name, plan in plans(family).items():
        spec = adapters.make_spec(family_of(family), plan, (), LoraConfig(rank=2))
        made[name] = make_package(
            build(fm, plan), plan, spec, tiny.processor(family), "text", tiny.LABELS, 16
        )
    return made


def digests(package: Package) -> dict[str, str]:
    return {k: tensor_digest(t) for k, t in package.weights.items()}


@families
def test_cutting_the_widest_weights_gives_those_of_every_width(family: str) -> None:
    made = packages(family)
    wide = made["0.75"]
    for package in made.values():
        found = cut(wide.weights, wide.meta.plan, package.meta.plan)
        assert tiny.same_bits(found, package.weights)


@families
@pytest.mark.parametrize(("before", "after"), [("0.25", "0.75"), ("0.75", "0.25"), ("0.5", "0.25")])
def test_a_recut_leads_from_any_width_to_any_other(family: str, before: str, after: str) -> None:
    made = packages(family)
    source, target = made[before], made[after]
    patch = make_recut(source, source.digest(), target, target.digest())
    known = digests(source)
    again = apply_patch(source, patch, known)
    assert again.digest() == target.digest() and known == digests(target)
    assert tiny.same_bits(again.weights, target.weights)
    added = sum(
        max(0, len(b.kept) - len(a.kept))
        for a, b in zip(source.meta.plan.blocks, target.meta.plan.blocks, strict=True)
    )
    ffn = FFN(family_of(family), family_of(family).block_list(tiny.model(family))[0])
    per_neuron = sum(
        p.numel() for part, p in ffn.parts().items() if FFN.neuron_axis(part) is not None
    )
    floats = sum(t.numel() for name, t in patch.tensors.items() if name != PLAN)
    # Up: the added neurons and nothing else. Down: the plan alone.
    assert floats == added * per_neuron // ffn.neurons


def spoilt(patch: Patch, **tensors: torch.Tensor | None) -> Patch:
    every = {**patch.tensors, **tensors}
    return replace(patch, tensors={k: t for k, t in every.items() if t is not None})


def test_a_recut_that_does_not_fit_is_refused() -> None:
    made = packages("bert")
    source, target = made["0.25"], made["0.5"]
    good = make_recut(source, source.digest(), target, target.digest())
    name = next(n for n in good.tensors if n.startswith("+") and n.endswith("weight"))
    plan = source.meta.plan
    other = Plan(plan.model_type, plan.fm_neurons + 1, plan.blocks)
    text = torch.frombuffer(bytearray(other.to_json().encode()), dtype=torch.uint8)
    bad = {
        "is missing": spoilt(good, **{name: None}),
        "too short": spoilt(good, **{name: good.tensors[name][:1]}),
        "another type": spoilt(good, **{name: good.tensors[name].double()}),
        "wrong values": spoilt(good, **{name: good.tensors[name] + 1}),
        "too much": spoilt(good, **{"+nothing.weight": torch.ones(1)}),
        "no plan": spoilt(good, **{PLAN: torch.ones(4, dtype=torch.uint8)}),
        "another FM": spoilt(good, **{PLAN: text}),
    }
    for what, patch in bad.items():
        known = digests(source)
        with pytest.raises(ReplyError):
            apply_patch(source, patch, known)
        assert known == digests(source), what


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"widths": "0.5,0.25"}, "nested"),
        ({"widths": "0.5,0.5"}, "nested"),
        ({"widths": "0.5,1.5"}, "plan.widths"),
        ({"widths": "0.5,"}, "plan.widths"),
        ({"widths": "a"}, "plan.widths"),
        ({"widths": "0.5/0.1/1/1,0.6/0.05/1/1"}, "nested"),
        ({"widths": "0.5", "proxy": "layer-drop"}, "plan.proxy"),
        ({"widths": "0.5", "keep_neurons": 3}, "plan.keep-neurons"),
    ],
)
def test_widths_that_make_no_sense_are_refused_by_name(keys: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Config(plan=PlanConfig(**keys))  # type: ignore[arg-type]


def test_widths_of_simulated_clients_are_of_the_plan() -> None:
    with pytest.raises(UserError, match=r"federation\.widths"):
        Config(plan=PlanConfig(widths="0.25,0.5"), federation=FederationConfig(widths="0.3"))
    with pytest.raises(UserError, match=r"plan\.widths"):
        Config(federation=FederationConfig(widths="0.3"))
    Config(plan=PlanConfig(widths="0.25,0.5"), federation=FederationConfig(widths="0.5,none"))


def test_widths_for_another_number_of_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="3 blocks, and the FM has 4"):
        plans("bert", "0.5/0.5/0.5")


def test_positions_refuse_what_is_no_part() -> None:
    f = tiny.neurons("bert")
    one = Plan("bert", f, (BlockPlan("pruned", (0, 1)),))
    two = Plan("bert", f, (BlockPlan("pruned", (0, 2, 3)),))
    assert not nested([one, two])
    assert nested([one, Plan("bert", f, (BlockPlan("whole"),))])
    assert not nested([Plan("bert", f, (BlockPlan("whole"),)), two])
