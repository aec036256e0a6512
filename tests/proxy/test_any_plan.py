"""What holds for whatever plan there is: any width, any blocks left whole, any rank."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft_core.adapter import lora as adapters
from fedpft_core.config import LoraConfig
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import BlockPlan, Plan
from fedpft_core.proxy.build import build
from fedpft_core.task.classify import logits

families = pytest.mark.parametrize("family", tiny.FAMILIES)
BLOCKS = 4


@st.composite
def plans(draw: st.DrawFn, family: str) -> Plan:
    """A plan with blocks that are whole, and others with any of their neurons."""
    f = tiny.neurons(family)
    some = st.sets(st.integers(0, f - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))
    pruned = st.builds(BlockPlan, st.just("pruned"), some)
    blocks = draw(st.lists(pruned | st.just(BlockPlan("whole")), min_size=BLOCKS, max_size=BLOCKS))
    return Plan(family, f, tuple(blocks))


@families
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data(), rank=st.integers(1, 6))
def test_any_proxy_is_the_fm_with_neurons_at_zero_and_carries_its_adapter(
    family: str, data: st.DataObject, rank: int
) -> None:
    plan = data.draw(plans(family))
    fm = tiny.model(family).double()
    small, spec = build(fm, plan), adapters.make_spec(
        family_of(family), plan, (), LoraConfig(rank=rank, alpha=3.0, dropout=0.0)
    )  # fmt: skip
    ffns = family_of(family).ffns(fm)
    with torch.no_grad():
        for ffn, entry in zip(ffns, plan.blocks, strict=True):
            gone = [j for j in range(ffn.neurons) if entry.kept and j not in entry.kept]
            ffn.out.weight[:, gone] = 0.0
    small, fm = adapters.attach(small, spec, plan), adapters.attach(fm, spec)
    tensors = tiny.random_adapter(small, plan, seed=rank)
    adapters.load(small, tensors, plan), adapters.load(fm, tensors)
    assert tiny.same_bits(adapters.read(small, plan), adapters.read(fm))
    batch = tiny.double(tiny.batch_of(family, rows=3))
    with torch.no_grad():
        torch.testing.assert_close(logits(small, batch), logits(fm, batch), rtol=1e-9, atol=1e-10)
