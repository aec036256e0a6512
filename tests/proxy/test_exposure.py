"""What of the FM a package holds, counted against the models themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from fedpft_core.model.families import family_of
from fedpft_core.model.plan import pruned_ffns
from fedpft_core.proxy.exposure import exposure, ffn_digest, kept_neurons
from fedpft_core.proxy.package import make_package
from fedpft_core.wire.package import Package

KEEP = {"keep_share": 0.5, "retained_layers": "first"}


def packed(family: str, **keys: object) -> tuple[torch.nn.Module, torch.nn.Module, Package, object]:
    fm = tiny.model(family)
    plan = tiny.plan_for(fm, **(KEEP | keys))
    fm, proxy, plan, spec = tiny.pair(family, plan)
    package = make_package(
        proxy, plan, spec, tiny.processor(family), tiny.task_of(family).name, tiny.LABELS, 16
    )
    return fm, proxy, package, (plan, spec)


@pytest.mark.parametrize("family", tiny.BUILDS)
def test_an_undistilled_proxy_is_a_copy_but_for_the_pruned_neurons(family: str) -> None:
    fm, _, package, (plan, spec) = packed(family)  # type: ignore[misc]
    found = exposure(fm, package, plan, spec.modules)
    parts = {p.name: p for p in found.parts}
    for p in found.parts:
        assert p.sent == p.copied, p
        assert (p.sent == p.fm) == (p.name != "FFN"), p
    body = {
        n: p.numel() for n, p in tiny.model(family).named_parameters()
        if not n.startswith(tuple(f"{m}." for m in spec.modules))
    }  # fmt: skip
    assert sum(p.fm for p in found.parts) == sum(body.values())
    assert sum(p.sent for p in found.parts) == sum(
        t.numel() for n, t in package.weights.items() if n in body
    )
    ffns = family_of(plan.model_type).ffns(fm)
    assert parts["FFN"].fm == sum(
        t.numel() for f in ffns for part, t in f.parts().items() if not part.startswith("norm.")
    )
    for i, (disclosed, copied) in enumerate(zip(found.disclosed, found.copied, strict=True)):
        assert torch.equal(disclosed, copied)
        kept = set(plan.blocks[i].kept or range(plan.neurons(i)))
        assert {j for j, on in enumerate(disclosed.tolist()) if on} == kept


def test_one_changed_number_makes_a_neuron_no_copy() -> None:
    fm, _, package, (plan, spec) = packed("bert")  # type: ignore[misc]
    whole = exposure(fm, package, plan, spec.modules)
    name = "bert.encoder.layer.1.output.dense.weight"
    changed = package.weights[name].clone()
    changed[3, 5] += 1e-3
    other = replace(package, weights=package.weights | {name: changed})
    found = exposure(fm, other, plan, spec.modules)
    lost = [int((a & ~b).sum()) for a, b in zip(whole.copied, found.copied, strict=True)]
    assert lost == [0, 1, 0, 0]
    assert not found.copied[1][plan.blocks[1].kept[5]]
    sums = [sum(p.copied for p in e.parts) for e in (whole, found)]
    assert sums[0] - sums[1] == 1
    assert [torch.equal(a, b) for a, b in zip(whole.disclosed, found.disclosed, strict=True)] == (
        [True] * 4
    )


def test_dropped_blocks_and_projections_of_low_rank() -> None:
    fm, _, package, (plan, spec) = packed("bert", proxy="layer-drop", drop_to=2)  # type: ignore[misc]
    found = exposure(fm, package, plan, spec.modules)
    assert [int(m.sum()) for m in found.disclosed] == [24, 0, 0, 24]
    attention = next(p for p in found.parts if p.name == "attention")
    assert attention.sent == attention.copied == attention.fm // 2
    fm, _, package, (plan, spec) = packed("bert", qk_rank=2)  # type: ignore[misc]
    found = exposure(fm, package, plan, spec.modules)
    attention = next(p for p in found.parts if p.name == "attention")
    thin = 3 * 2 * 2 * (16 * 2)  # pruned blocks, query and key, two maps
    assert attention.sent - attention.copied == thin
    assert attention.fm - attention.copied == 3 * 2 * 16 * 16


def test_the_digest_is_of_the_neurons_whatever_the_head() -> None:
    fm, proxy, _, (plan, _) = packed("llama")  # type: ignore[misc]
    bare = tiny.model("llama")
    assert ffn_digest(fm) == ffn_digest(bare)
    assert ffn_digest(bare) != ffn_digest(tiny.model("llama", seed=1))
    with torch.no_grad():
        pruned_ffns(proxy, plan)[1].out.weight.add_(1.0)
        next(bare.get_submodule("score").parameters()).add_(1.0)
    assert ffn_digest(fm) == ffn_digest(bare)
    assert [int(m.sum()) for m in kept_neurons(plan)] == [24, 12, 12, 12]
