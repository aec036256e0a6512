"""Saliency, plans, and sub-FMs built from them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import fabricate
import oracles
import pytest
import tiny
import torch
import transformers

from fedpft_core.adapter import lora as adapters
from fedpft_core.adapter.lora import AdapterSpec
from fedpft_core.config import LoraConfig, PlanConfig
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.model.families import family_of
from fedpft_core.model.names import to_fm_name, to_proxy_name
from fedpft_core.model.plan import (
    BlockPlan,
    Plan,
    block_parameters,
    pruned_ffns,
)
from fedpft_core.proxy import package as proxy
from fedpft_core.proxy.build import build, skeleton
from fedpft_core.proxy.choose import evenly_spaced, keep_most_salient, make_plan, parse_layers
from fedpft_core.proxy.saliency.weight_norm import weight_norm
from fedpft_core.task.classify import logits
from fedpft_core.wire.package import Package

families = pytest.mark.parametrize("family", tiny.FAMILIES)


# --- saliency -----------------------------------------------------------------------------


@families
def test_saliency_equals_the_oracle(family: str) -> None:
    for ffn in family_of(family).ffns(tiny.model(family)):
        fast = weight_norm(ffn)
        assert fast.dtype == torch.float64
        slow = torch.tensor(oracles.saliency(ffn), dtype=torch.float64)
        torch.testing.assert_close(fast, slow, rtol=1e-14, atol=0)


@families
def test_saliency_ignores_biases(family: str) -> None:
    model = tiny.model(family)
    ffn = family_of(family).ffns(model)[0]
    before = weight_norm(ffn)
    with torch.no_grad():
        for name, p in ffn.parts().items():
            if name.endswith(".bias"):
                p.add_(100.0)
    assert torch.equal(weight_norm(ffn), before)


def test_keep_most_salient_keeps_the_largest_in_order() -> None:
    assert keep_most_salient(torch.tensor([3.0, 9.0, 1.0, 8.0]), 2) == (1, 3)
    assert keep_most_salient(torch.tensor([9.0, 1.0, 8.0]), 2) == (0, 2)


def test_ties_keep_the_lower_index() -> None:
    assert keep_most_salient(torch.tensor([5.0, 5.0, 7.0, 5.0]), 2) == (0, 2)
    assert keep_most_salient(torch.ones(1000), 10) == tuple(range(10))


# --- plans --------------------------------------------------------------------------------


@families
def test_plan_keeps_the_most_salient_of_each_block(family: str) -> None:
    fm = tiny.model(family)
    plan = tiny.plan_for(fm, keep_neurons=7)
    assert [b.state for b in plan.blocks] == ["whole", "pruned", "pruned", "whole"]
    assert plan.pruned == (1, 2)
    assert plan.present == (0, 1, 2, 3)
    for i in plan.pruned:
        scores = oracles.saliency(family_of(family).ffns(fm)[i])
        assert plan.blocks[i].kept == oracles.largest(scores, 7)


def test_default_plan_keeps_a_quarter() -> None:
    plan = tiny.plan_for(tiny.model("bert"))
    assert [len(plan.blocks[i].kept) for i in plan.pruned] == [6, 6]


def test_keep_neurons_equal_to_f_leaves_blocks_whole() -> None:
    assert tiny.plan_for(tiny.model("bert"), keep_neurons=24).is_full


def test_random_saliency_is_a_function_of_the_seed() -> None:
    fm, cfg = tiny.model("bert"), PlanConfig(saliency="random")
    torch.manual_seed(1)
    first = make_plan(fm, cfg, 0)
    torch.manual_seed(2)
    assert make_plan(fm, cfg, 0) == first
    assert make_plan(fm, cfg, 1) != first
    assert first.blocks[1].kept != first.blocks[2].kept
    assert first != make_plan(fm, PlanConfig(), 0)


@pytest.mark.parametrize(
    ("text", "want"),
    [("", set()), ("first,last", {0, 3}), ("1, -1", {1, 3}), ("0,first", {0}), (" last ", {3})],
)
def test_retained_layers_are_read(text: str, want: set[int]) -> None:
    assert parse_layers(text, 4) == want


@pytest.mark.parametrize("text", ["4", "-5", "first,99"])
def test_a_retained_layer_out_of_range_names_the_key(text: str) -> None:
    with pytest.raises(UserError, match=r"plan\.retained-layers.*out of range.*4 blocks"):
        tiny.plan_for(tiny.model("bert"), retained_layers=text)


@pytest.mark.parametrize("text", ["middle", "1;2", "1.5", "½"])
def test_a_retained_layer_that_is_no_layer_names_the_key(text: str) -> None:
    with pytest.raises(UserError, match=r"plan\.retained-layers: expected block indices"):
        tiny.plan_for(tiny.model("bert"), retained_layers=text)


def test_k_larger_than_f_names_the_key() -> None:
    with pytest.raises(UserError, match=r"plan\.keep-neurons = 25.*24 neurons"):
        tiny.plan_for(tiny.model("bert"), keep_neurons=25)


def test_drop_to_larger_than_the_model_names_the_key() -> None:
    with pytest.raises(UserError, match=r"plan\.drop-to = 5.*4 blocks"):
        tiny.plan_for(tiny.model("bert"), proxy="layer-drop", drop_to=5)


@families
def test_plan_survives_json(family: str) -> None:
    for keys in ({}, {"proxy": "layer-drop", "drop_to": 2}, {"proxy": "full"}):
        plan = tiny.plan_for(tiny.model(family), **keys)
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "kept", [[5, 3], [3, 3], [-1, 2], [0, 24], [1.5], ["1"], []], ids=lambda k: str(k)
)
def test_a_plan_with_impossible_neurons_is_refused(kept: list[object]) -> None:
    raw = json.loads(tiny.plan_for(tiny.model("bert")).to_json())
    raw["blocks"][1]["kept"] = kept
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["blocks"][0].update(state="odd"),
        lambda raw: raw["blocks"][0].update(kept=[1]),
        lambda raw: raw["blocks"][0].pop("kept"),
        lambda raw: raw.pop("fm_neurons"),
        lambda raw: raw.update(blocks=[1]),
    ],
)
def test_a_malformed_plan_is_refused(change: object) -> None:
    raw = json.loads(tiny.plan_for(tiny.model("bert")).to_json())
    change(raw)  # type: ignore[operator]
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(json.dumps(raw))


# --- building -----------------------------------------------------------------------------


@families
def test_keep_all_plan_gives_identical_logits(family: str) -> None:
    """Also when the all-kept blocks go through slicing instead of being left whole."""
    fm, batch = tiny.model(family), tiny.batch_of(family)
    everything = BlockPlan("pruned", tuple(range(tiny.neurons(family))))
    plan = Plan(family, tiny.neurons(family), (everything,) * 4)
    with torch.no_grad():
        want = logits(fm, batch)
        assert torch.equal(logits(build(fm, plan), batch), want)
        full = tiny.plan_for(fm, proxy="full")
        assert torch.equal(logits(build(fm, full), batch), want)


@families
def test_pruning_equals_zeroing_the_removed_neurons_in_the_fm(family: str) -> None:
    fm = tiny.model(family).double()
    plan = tiny.plan_for(fm, keep_neurons=9, retained_layers="1")
    zeroed = copy.deepcopy(fm)
    with torch.no_grad():
        for i in plan.pruned:
            gone = [j for j in range(tiny.neurons(family)) if j not in plan.blocks[i].kept]
            assert len(gone) == tiny.neurons(family) - 9
            family_of(family).ffns(zeroed)[i].out.weight[:, gone] = 0.0
        batch = tiny.double(tiny.batch_of(family))
        pruned = logits(build(fm, plan), batch)
        torch.testing.assert_close(pruned, logits(zeroed, batch), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(pruned, logits(fm, batch), rtol=1e-3)


@families
def test_pruned_ffn_equals_the_oracle(family: str) -> None:
    fm = tiny.model(family).double()
    plan = tiny.plan_for(fm, keep_neurons=5)
    small = build(fm, plan)
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, ffn in pruned_ffns(small, plan).items():
        with torch.no_grad():
            fast = ffn(x)
            teacher = family_of(family).ffns(fm)[i]
            slow = torch.stack([oracles.pruned_ffn(teacher, plan.blocks[i].kept, v) for v in x])
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


@families
def test_everything_but_removed_neurons_is_copied_verbatim(family: str) -> None:
    fm = tiny.model(family)
    before = tiny.weights(fm)
    plan = tiny.plan_for(fm)
    small = build(fm, plan)
    assert tiny.same_bits(tiny.weights(fm), before), "building changed the FM"
    row = family_of(family)
    sliced = {
        f"{row.blocks}.{i}.{path}.{leaf}"
        for i in plan.pruned
        for path in (*row.ffn_in, row.ffn_out)
        for leaf in ("weight", "bias")
    }
    after = tiny.weights(small)
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name not in sliced or name.endswith(f"{row.ffn_out}.bias"):
            assert torch.equal(value, before[name]), name
    shared = {p.data_ptr() for p in fm.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared, "the proxy shares memory with the FM"


@families
def test_reload_gives_identical_logits(family: str) -> None:
    """Package → bytes → package → model: what a client runs is what the server has."""
    for keys in ({}, {"proxy": "layer-drop", "drop_to": 2}, {"proxy": "full"}):
        fm = tiny.model(family)
        plan = tiny.plan_for(fm, **keys)
        small = build(fm, plan)
        spec = adapters.make_spec(family_of(family), plan, (), LoraConfig(rank=2))
        kind = "text" if family in tiny.TEXT_FAMILIES else "image"
        package = proxy.make_package(
            small, plan, spec, tiny.processor(family), kind, tiny.LABELS, 16
        )
        mine = adapters.attach(small, spec, plan)
        tensors = tiny.random_adapter(mine, plan)
        adapters.load(mine, tensors, plan)
        arrived = Package.from_bytes(package.to_bytes())
        assert arrived.digest() == package.digest()
        torch.manual_seed(99)
        client = proxy.rebuild(arrived)
        adapters.load(client.model, tensors, client.plan)
        batch = tiny.batch_of(family)
        with torch.no_grad():
            assert torch.equal(logits(client.model, batch), logits(mine, batch))
        assert (client.plan, client.spec, client.task.name) == (plan, spec, kind)
        assert (client.task.labels, client.max_length) == (tiny.LABELS, 16)


@families
def test_a_package_holds_no_neuron_outside_the_plan_and_no_name_of_the_fm(family: str) -> None:
    fm = tiny.model(family)
    fm.config._name_or_path = "secret/place"
    plan = tiny.plan_for(fm)
    spec = adapters.make_spec(family_of(family), plan, (), LoraConfig(rank=2))
    blob = proxy.make_package(
        build(fm, plan), plan, spec, tiny.processor(family), "text", tiny.LABELS, 16
    ).to_bytes()
    assert b"secret" not in blob
    for i, ffn in enumerate(family_of(family).ffns(fm)):
        for j in range(tiny.neurons(family)):
            row = ffn.ins[0].weight[j].detach().numpy().tobytes()
            inside = plan.blocks[i].state == "whole" or j in plan.blocks[i].kept
            assert (row in blob) == inside


def test_tied_weights_travel_once() -> None:
    """A decoder's output layer that is its word embeddings, as in most models that write text."""
    config = tiny.hf_config("llama", tie_word_embeddings=True)
    theirs, mine = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    plan = tiny.plan_for(theirs)
    spec = AdapterSpec(2, 4.0, 0.0, family_of("llama").lora_targets(plan.present), ())
    small = build(theirs, plan)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    package = proxy.make_package(
        small, plan, spec, tiny.processor("llama"), "text", tiny.LABELS, 16
    )
    assert set(small.state_dict()) - set(package.weights) == {"lm_head.weight"}
    made = skeleton(mine, plan)
    proxy._fill(made, package.weights, spec)
    assert tiny.same_bits(tiny.weights(made), tiny.weights(small))


def test_a_package_that_does_not_fit_its_plan_is_refused() -> None:
    fm = tiny.model("bert")
    plan = tiny.plan_for(fm)
    spec = adapters.make_spec(family_of("bert"), plan, (), LoraConfig(rank=2))
    package = proxy.make_package(
        build(fm, plan), plan, spec, tiny.tokenizer("bert"), "text", tiny.LABELS, 16
    )
    less = {k: v for k, v in package.weights.items() if not k.endswith("word_embeddings.weight")}
    for odd in (
        replace(package, weights=less),
        replace(package, weights=package.weights | {"more": torch.zeros(1)}),
        replace(package, weights=tiny.weights(fm)),
    ):
        with pytest.raises(ReplyError):
            proxy.rebuild(odd)
    for text in ("{}", "nonsense"):
        with pytest.raises(ReplyError):
            proxy.rebuild(Package.from_bytes(fabricate.with_metadata(package, text)[1]))


# --- layer-drop ---------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 3, 4, 6, 12, 24])
def test_layer_drop_is_evenly_spaced_with_first_and_last(blocks: int) -> None:
    for keep in range(2, blocks + 1):
        chosen = sorted(evenly_spaced(blocks, keep, PlanConfig()))
        assert len(chosen) == keep
        assert (chosen[0], chosen[-1]) == (0, blocks - 1)
        gaps = [b - a for a, b in pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1


@families
def test_layer_drop_maps_names_to_fm_indices(family: str) -> None:
    fm = tiny.model(family, num_hidden_layers=5)
    plan = tiny.plan_for(fm, proxy="layer-drop", drop_to=3)
    assert plan.present == (0, 2, 4)
    assert plan.pruned == ()
    small = build(fm, plan)
    row = family_of(family)
    assert len(row.block_list(small)) == 3
    theirs = dict(fm.named_parameters())
    for name, p in small.named_parameters():
        assert torch.equal(p, theirs[to_fm_name(name, plan)]), name
    for name in theirs:
        own = to_proxy_name(name, plan)
        dropped = any(name.startswith(f"{row.blocks}.{i}.") for i in (1, 3))
        assert (own is None) == dropped
        if own is not None:
            assert to_fm_name(own, plan) == name


@families
def test_layer_drop_adapter_plugs_into_the_kept_blocks(family: str) -> None:
    fm, small, plan, spec = _dropped(family)
    row = family_of(family)
    names = adapters.read(small, plan)
    in_blocks = {n.split(".")[row.blocks.count(".") + 1] for n in names if ".lora_" in n}
    assert in_blocks == {"0", "3"}
    assert set(spec.targets) == set(row.lora_targets((0, 3)))
    adapters.load(fm, names)
    theirs = adapters.parameters(fm)
    assert theirs.keys() == names.keys()
    assert all(torch.equal(theirs[n], names[n]) for n in names)


def _dropped(family: str) -> tuple[torch.nn.Module, torch.nn.Module, Plan, adapters.AdapterSpec]:
    plan = tiny.plan_for(tiny.model(family), proxy="layer-drop", drop_to=2)
    return tiny.pair(family, plan)


@families
def test_layer_drop_keeps_the_parameter_budget_of_the_pruned_proxy(family: str) -> None:
    fm = tiny.model(family, num_hidden_layers=8)
    pruned, dropped = (tiny.plan_for(fm, proxy=p) for p in ("ffn-pruned", "layer-drop"))
    row = family_of(family)

    def parameters(plan: Plan) -> int:
        return block_parameters(row.block_list(build(fm, plan)))

    sizes = [sum(p.numel() for p in block.parameters()) for block in row.block_list(fm)]
    one = max(sizes)  # ModernBERT's first block has a norm less
    assert parameters(dropped) <= parameters(pruned) < parameters(dropped) + one
    assert parameters(dropped) == sum(sizes[i] for i in dropped.present)
