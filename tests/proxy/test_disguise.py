"""A disguised proxy: the same function, other rows."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from fedpft_core.model.families import family_of
from fedpft_core.proxy.build import build
from fedpft_core.proxy.disguise import Disguise, draw, put_on, scales_exactly
from fedpft_core.proxy.exposure import exposure
from fedpft_core.proxy.package import make_package

KEEP = {"keep_share": 0.5, "retained_layers": "first"}
GATED = ("modernbert", "llama", "gemma2")


@pytest.mark.parametrize("family", [*tiny.BUILDS, "opt", "modernbert"])
def test_a_disguised_proxy_computes_the_same(family: str) -> None:
    fm = tiny.model(family).double()
    plan = tiny.plan_for(fm, **KEEP)
    proxy = build(fm, plan)
    batch = tiny.double(tiny.batch_of(family))
    batch.pop("labels", None)
    batch.pop("index", None)
    want = proxy(**batch).logits
    drawn = draw(proxy, plan, 7)
    after = put_on(proxy, plan, drawn)
    assert torch.allclose(proxy(**batch).logits, want, atol=1e-9)
    for i, entry in enumerate(plan.blocks):
        assert sorted(after.blocks[i].kept) == list(entry.kept)
    assert after.blocks[1].kept != plan.blocks[1].kept
    assert after.anonymous() == plan.anonymous()
    # Each row of the proxy is the row of the FM that the new plan says, on the scale drawn.
    ffn, own = (family_of(family).ffns(m)[1] for m in (proxy, fm))
    kept = torch.tensor(after.blocks[1].kept)
    rows = own.ins[-1].weight[kept] * drawn.scale[1].double()[:, None]
    assert torch.equal(ffn.ins[-1].weight, rows)


def test_scales_are_drawn_only_where_they_are_exact() -> None:
    for family in ("bert", "opt", *GATED):
        fm = tiny.model(family)
        plan = tiny.plan_for(fm, **KEEP)
        proxy = build(fm, plan)
        exact = scales_exactly(family_of(family).ffns(proxy)[1])
        assert exact == (family != "bert")
        scale = draw(proxy, plan, 3).scale[1]
        assert bool((scale == 1).all()) != exact
        assert float(scale.min()) >= 0.5 and float(scale.max()) <= 2


def test_what_is_scaled_has_no_bits_of_the_fm_and_what_is_moved_keeps_them() -> None:
    for family, copies in (("opt", 0), ("bert", 24 + 3 * 12)):
        fm = tiny.model(family)
        plan = tiny.plan_for(fm, **KEEP)
        fm, proxy, plan, spec = tiny.pair(family, plan)
        drawn = draw(proxy, plan, 1)
        plan = put_on(proxy, plan, drawn)
        package = make_package(
            proxy, plan.anonymous(), spec, tiny.processor(family), "text", tiny.LABELS, 16
        )
        found = exposure(fm, package, plan, spec.modules, order=drawn.order)
        assert [int(m.sum()) for m in found.disclosed] == [24, 12, 12, 12]
        assert sum(int(m.sum()) for m in found.copied) == copies
        ffn = next(p for p in found.parts if p.name == "FFN")
        # Of scaled neurons the biases on the way out are as they were, and no row.
        assert ffn.copied == (ffn.sent if copies else 4 * 16)


def test_a_disguise_is_kept_and_read_or_refused() -> None:
    fm: nn.Module = tiny.model("bert")
    plan = tiny.plan_for(fm, **KEEP)
    proxy = build(fm, plan)
    drawn = draw(proxy, plan, 5)
    again = Disguise.read(drawn.tensors())
    first = tiny.weights(proxy)
    put_on(proxy, plan, again)
    other = build(fm, plan)
    put_on(other, plan, drawn)
    assert tiny.same_bits(tiny.weights(proxy), tiny.weights(other))
    assert not tiny.same_bits(first, tiny.weights(other))
    wrong = drawn.tensors() | {"order/1": torch.zeros(12, dtype=torch.int64)}
    with pytest.raises(ValueError, match="order of block 1"):
        Disguise.read(wrong)
    with pytest.raises(ValueError, match="another proxy"):
        put_on(build(fm, tiny.plan_for(fm, keep_share=0.25)), plan, drawn)
