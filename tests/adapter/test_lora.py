"""The adapter: the same tensors by the same names on FM, proxy and in PEFT's own files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from fedpft_core.adapter import lora as adapters
from fedpft_core.adapter.lora import AdapterSpec
from fedpft_core.config import LoraConfig, PlanConfig
from fedpft_core.model.families import family_of
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.task.classify import logits

families = pytest.mark.parametrize("family", tiny.FAMILIES)


@families
def test_only_the_adapter_requires_gradients(family: str) -> None:
    fm, proxy, plan, spec = tiny.pair(family)
    inside = tuple(f"{module}." for module in family_of(family).head)
    head = {n for n, _ in tiny.model(family).named_parameters() if n.startswith(inside)}
    for model, of in ((fm, None), (proxy, plan)):
        names = set(adapters.parameters(model, of))
        assert names == head | {f"{t}.lora_{ab}.weight" for t in spec.targets for ab in "AB"}
        assert sum(p.requires_grad for p in model.parameters()) == len(names)
        assert not model.training


@families
def test_read_equals_pefts_own_state_dict(family: str) -> None:
    fm, proxy, _, _ = tiny.pair(family)
    for model in (fm, proxy):
        own = {k.removeprefix("base_model.model."): v for k, v in _peft_state(model).items()}
        assert tiny.same_bits(adapters.read(model), own)


def _peft_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(get_peft_model_state_dict(model))


def test_read_copies() -> None:
    fm, _, _, _ = tiny.pair("bert")
    held = adapters.read(fm)
    before = {k: v.clone() for k, v in held.items()}
    with torch.no_grad():
        for p in adapters.parameters(fm).values():
            p.add_(1.0)
    assert tiny.same_bits(held, before)


@families
def test_load_is_the_inverse_of_read(family: str) -> None:
    fm, proxy, plan, _ = tiny.pair(family)
    other = tiny.random_adapter(proxy, plan, seed=5)
    adapters.load(proxy, other, plan)
    assert tiny.same_bits(adapters.read(proxy, plan), other)
    adapters.load(fm, adapters.read(proxy, plan))
    assert tiny.same_bits(adapters.read(fm), other)


def test_load_refuses_any_difference() -> None:
    fm, _, _, _ = tiny.pair("bert")
    good = adapters.read(fm)
    name = next(iter(good))
    bad = [
        {k: v for k, v in good.items() if k != name},
        good | {"more": torch.zeros(1)},
        good | {name: good[name].T.contiguous()},
        good | {name: good[name][:1]},  # would broadcast
        good | {"classifier.bias": torch.zeros(1)},  # would broadcast
    ]
    for tensors in bad:
        with pytest.raises(ValueError, match=r"adapter names differ|shape"):
            adapters.load(fm, tensors)
        kept = {k: v for k, v in adapters.read(fm).items() if k in good}
        assert kept.keys() == good.keys()


def test_position_plays_no_role() -> None:
    fm, _, _, _ = tiny.pair("bert")
    wanted = adapters.read(fm)
    with torch.no_grad():
        for p in adapters.parameters(fm).values():
            p.zero_()
    adapters.load(fm, dict(reversed(wanted.items())))
    assert tiny.same_bits(adapters.read(fm), wanted)


@families
def test_initial_is_a_function_of_seed_and_name(family: str) -> None:
    fm, proxy, plan, _ = tiny.pair(family)
    torch.manual_seed(1)
    first = adapters.initial(fm, seed=7)
    torch.manual_seed(2)
    torch.rand(10)
    assert tiny.same_bits(adapters.initial(fm, seed=7), first)
    other = adapters.initial(fm, seed=8)
    a_names = [n for n in first if n.endswith("lora_A.weight")]
    assert a_names
    for name in a_names:
        assert not torch.equal(first[name], other[name])
        bound = first[name].shape[1] ** -0.5
        assert float(first[name].abs().max()) <= bound
        assert float(first[name].abs().max()) > 0.5 * bound
    assert len({tuple(first[n].flatten().tolist()) for n in a_names}) == len(a_names)
    for name, value in first.items():
        if name.endswith("lora_B.weight"):
            assert not value.any()
        if ".lora_" not in name:
            assert torch.equal(value, adapters.read(fm)[name])
    # The same on the proxy: names decide, not the model that holds them.
    small = adapters.initial(proxy, 7, plan)
    assert all(torch.equal(small[n], first[n]) for n in a_names)


@families
def test_the_initial_adapter_changes_nothing(family: str) -> None:
    bare = tiny.model(family)
    batch = tiny.batch_of(family)
    with torch.no_grad():
        want = logits(bare, batch)
        fm, _, _, _ = tiny.pair(family)
        head = {k: v for k, v in adapters.read(fm).items() if ".lora_" not in k}
        adapters.load(fm, adapters.initial(fm, 3) | head | _head_of(bare, family))
        assert torch.equal(logits(fm, batch), want)


def _head_of(bare: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    return {
        f"{module}.{k}": p.detach()
        for module in family_of(family).head
        for k, p in bare.get_submodule(module).named_parameters()
    }


@families
def test_export_gives_identical_logits_on_the_untouched_fm(family: str, tmp_path: Path) -> None:
    untouched = tiny.vanilla(family)
    fm, _, _, _ = tiny.pair(family, dropout=0.1)
    files = adapters.export(fm, tmp_path, "somewhere")
    assert [f.name for f in files] == ["adapter_config.json", "adapter_model.safetensors"]
    batch = tiny.batch_of(family)
    with torch.no_grad():
        bare = logits(untouched, batch)
        loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), str(tmp_path)).eval()
        _expect_same(family, loaded, fm, batch)
        assert not torch.allclose(bare, logits(fm, batch))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    own = {k.removeprefix("base_model.model."): v for k, v in stored.items()}
    if not family_of(family).fused:
        assert tiny.same_bits(own, adapters.read(fm))


def test_the_adapter_of_a_deep_model_with_fused_layers_is_exported_whole(tmp_path: Path) -> None:
    """Of more than twenty targets PEFT keeps only what their names have in common."""
    shape = {"num_hidden_layers": 8}
    fm = tiny.model("gpt2", **shape)
    plan = make_plan(fm, PlanConfig(proxy="full"), 0)
    spec = adapters.make_spec(family_of("gpt2"), plan, (), LoraConfig(rank=2, dropout=0.0))
    wrapped = adapters.attach(fm, spec)
    assert len(spec.targets) == 32
    with torch.no_grad():
        for name, p in adapters.parameters(wrapped).items():
            if ".lora_" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    adapters.export(wrapped, tmp_path, "somewhere")
    untouched = tiny.vanilla("gpt2", **shape)
    loaded = PeftModel.from_pretrained(untouched, str(tmp_path)).eval()
    _expect_same("gpt2", loaded, wrapped, tiny.batch_of("gpt2"))


def _expect_same(
    family: str, vanilla: torch.nn.Module, fm: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> None:
    """Identical logits: to the bit, but where one layer of the vanilla model is several of ours. A
    product in parts may round otherwise, so that it is float64 that shows that they are the same.
    """
    if not family_of(family).fused:
        assert torch.equal(logits(vanilla, batch), logits(fm, batch))
        return
    torch.testing.assert_close(logits(vanilla, batch), logits(fm, batch), rtol=1e-4, atol=1e-5)
    vanilla.double(), fm.double()
    found, want = logits(vanilla, tiny.double(batch)), logits(fm, tiny.double(batch))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    vanilla.float(), fm.float()


@families
def test_exported_adapter_of_a_layer_drop_proxy_loads_on_the_fm(
    family: str, tmp_path: Path
) -> None:
    plan = tiny.plan_for(tiny.model(family), proxy="layer-drop", drop_to=2)
    fm, proxy, _, _ = tiny.pair(family, plan)
    adapters.load(fm, adapters.read(proxy, plan))
    adapters.export(fm, tmp_path, "somewhere")
    loaded = PeftModel.from_pretrained(tiny.vanilla(family), str(tmp_path)).eval()
    with torch.no_grad():
        _expect_same(family, loaded, fm, tiny.batch_of(family))


@families
def test_every_adapter_parameter_of_a_proxy_has_its_namesake_in_the_fm(family: str) -> None:
    bare = tiny.model(family)
    plan = tiny.plan_for(bare)
    spec = adapters.make_spec(family_of(family), plan, (), LoraConfig(rank=2))
    small = adapters.attach(build(bare, plan), spec, plan)
    fm = adapters.attach(bare, spec)
    mine, theirs = adapters.parameters(small, plan), adapters.parameters(fm)
    assert mine.keys() == theirs.keys()
    assert all(mine[n].shape == theirs[n].shape for n in mine)


def test_fresh_modules_belong_to_the_adapter() -> None:
    plan = tiny.plan_for(tiny.model("bert"))
    spec = adapters.make_spec(family_of("bert"), plan, ("bert.pooler.dense",), LoraConfig())
    assert spec.modules == ("classifier", "bert.pooler.dense")
    fm = adapters.attach(tiny.model("bert"), spec)
    names = adapters.parameters(fm)
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= set(names)


def test_spec_survives_json() -> None:
    spec = AdapterSpec(4, 8.0, 0.1, ("a.b", "c"), ("classifier",))
    assert AdapterSpec.from_raw(json.loads(json.dumps(spec.as_raw()))) == spec


def test_norm_is_the_l2_norm_over_all_tensors() -> None:
    assert adapters.norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}) == 5.0
    # In float64: squares of large values must not overflow.
    assert adapters.norm({"a": torch.tensor([1e30])}) == pytest.approx(1e30)


def test_clip_change_scales_lora_factors_alone_and_leaves_short_changes_to_the_bit() -> None:
    start = {
        "a.lora_A.weight": torch.ones(2, 2),
        "b.lora_B.weight": torch.zeros(3),
        "head": torch.zeros(2),
    }
    end = {
        "a.lora_A.weight": torch.ones(2, 2) + torch.tensor([[3.0, 0.0], [0.0, 0.0]]),
        "b.lora_B.weight": torch.tensor([0.0, 4.0, 0.0]),
        "head": torch.tensor([100.0, 0.0]),
    }
    same = adapters.clip_change(end, start, 5.0)
    assert all(torch.equal(same[k], end[k]) for k in end)
    cut = adapters.clip_change(end, start, 2.5)
    torch.testing.assert_close(cut["a.lora_A.weight"], torch.tensor([[2.5, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(cut["b.lora_B.weight"], torch.tensor([0.0, 2.0, 0.0]))
    assert torch.equal(cut["head"], end["head"])
