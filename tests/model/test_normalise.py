"""Layers of other forms become ordinary ones, and nobody outside can tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpft_core.model.families import family_of
from fedpft_core.model.fused import Apart, Fused, joined, per_rank
from fedpft_core.model.normalise import normalise
from fedpft_core.task.classify import logits

FUSED = [f for f in tiny.FAMILIES if family_of(f).fused]
OTHERS = [f for f in tiny.FAMILIES if not family_of(f).fused]


@pytest.mark.parametrize("family", FUSED)
def test_every_projection_becomes_a_layer_of_its_own(family: str) -> None:
    theirs, row = tiny.vanilla(family), family_of(family)
    made: Any = normalise(copy.deepcopy(theirs))
    assert not any(isinstance(m, Conv1D) for m in made.modules())
    assert not made.training
    held = [m for m in made.modules() if isinstance(m, Apart)]
    assert len(held) == 4 * len(row.fused)
    for block in row.block_list(made):
        for path in (*row.attention, *row.ffn_in, row.ffn_out):
            assert type(block.get_submodule(path)) is nn.Linear
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in theirs.parameters())
    batch = tiny.batch_of(family)
    with torch.no_grad():
        torch.testing.assert_close(logits(made, batch), logits(theirs, batch), rtol=1e-4, atol=1e-5)
        made.double(), theirs.double()
        want = logits(theirs, batch)
        torch.testing.assert_close(logits(made, batch), want, rtol=1e-12, atol=1e-12)


def test_a_conv1d_becomes_the_linear_that_computes_the_same_to_the_bit() -> None:
    theirs: Any = tiny.vanilla("gpt2")
    made: Any = normalise(copy.deepcopy(theirs))
    for rows, length in ((1, 5), (7, 20), (3, 40)):
        x = torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(length))
        for old, new in zip(theirs.transformer.h, made.transformer.h, strict=True):
            assert isinstance(old.mlp.c_fc, Conv1D)
            assert torch.equal(old.mlp.c_fc(x), new.mlp.c_fc(x))


@pytest.mark.parametrize("family", FUSED)
def test_a_second_time_changes_nothing(family: str) -> None:
    made: Any = normalise(tiny.vanilla(family))
    modules, before = list(made.modules()), tiny.weights(made)
    assert normalise(made) is made
    assert all(a is b for a, b in zip(made.modules(), modules, strict=True))
    assert tiny.same_bits(tiny.weights(made), before)


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_are_left_alone(family: str) -> None:
    model = tiny.vanilla(family)
    modules = list(model.modules())
    before = tiny.weights(model)
    assert normalise(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert tiny.same_bits(tiny.weights(model), before)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_decoders_lose_their_cache(family: str) -> None:
    had = getattr(tiny.vanilla(family).config, "use_cache", None)
    has = getattr(tiny.model(family).config, "use_cache", None)
    assert has == (False if family_of(family).causal else had)


def test_factors_of_parts_joined_give_the_products_of_the_parts() -> None:
    """And other targets, and what is no target, stay as they are."""
    stream = torch.Generator().manual_seed(0)
    layer = Fused("attn.c_attn", ("q", "k", "v"))
    tensors = {"score.weight": torch.ones(3, 4)}
    for path in ("h.0.attn.c_attn.q", "h.0.attn.c_attn.k", "h.0.attn.c_attn.v", "h.0.attn.o"):
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, 4, generator=stream)
        tensors[f"{path}.lora_B.weight"] = torch.randn(5, 2, generator=stream)
    targets = tuple(name.partition(".lora")[0] for name in tensors if ".lora_A" in name)
    made = joined(tensors, targets, (layer,))
    whole = "h.0.attn.c_attn"
    assert (made.targets, made.ranks) == ((whole, "h.0.attn.o"), {whole: 6})
    assert per_rank(made.ranks, 48.0, 2) == {whole: 144.0}
    a, b = (made.tensors[f"{whole}.lora_{x}.weight"] for x in "AB")
    want = torch.cat([
        tensors[f"{whole}.{p}.lora_B.weight"] @ tensors[f"{whole}.{p}.lora_A.weight"]
        for p in layer.parts
    ])  # fmt: skip
    torch.testing.assert_close(b @ a, want)
    kept = {"score.weight", "h.0.attn.o.lora_A.weight", "h.0.attn.o.lora_B.weight"}
    assert made.tensors.keys() == kept | {f"{whole}.lora_{x}.weight" for x in "AB"}
    assert all(made.tensors[name] is tensors[name] for name in kept)
