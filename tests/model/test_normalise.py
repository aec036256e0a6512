"""GPT-2's transposed layers become ordinary ones, and nobody outside can tell."""

from __future__ import annotations

import copy
from pathlib import Path

import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpft_core.model.normalise import normalise
from fedpft_core.task.classify import logits


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40, num_labels=3,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.GPT2ForSequenceClassification(config)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    return model.eval()


def batch(rows: int = 6, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3,
    }  # fmt: skip


def test_every_conv1d_becomes_the_linear_that_computes_the_same() -> None:
    vanilla = gpt2()
    made = normalise(copy.deepcopy(vanilla))
    old = {n for n, m in vanilla.named_modules() if isinstance(m, Conv1D)}
    assert len(old) == 8
    assert {n for n, m in made.named_modules() if type(m) is nn.Linear} == {*old, "score"}
    assert not any(isinstance(m, Conv1D) for m in made.modules())
    assert {n for n, _ in made.named_parameters()} == {n for n, _ in vanilla.named_parameters()}
    assert not made.training
    for rows, length in ((1, 5), (7, 20), (3, 40)):
        with torch.no_grad():
            inputs = batch(rows, length)
            assert torch.equal(logits(made, inputs), logits(vanilla, inputs))


def test_an_adapter_trained_on_it_fits_the_vanilla_model(tmp_path: Path) -> None:
    vanilla = gpt2()
    settings = LoraConfig(
        r=2, target_modules=["c_attn", "attn.c_proj"], modules_to_save=["score"]
    )  # fmt: skip
    tuned = get_peft_model(normalise(copy.deepcopy(vanilla)), settings)
    start = logits(tuned, batch()).detach()
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        nn.functional.cross_entropy(logits(tuned, batch()), batch()["labels"]).backward()
        optimiser.step()
        optimiser.zero_grad()
    tuned.eval()
    tuned.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(vanilla, str(tmp_path)).eval()
    with torch.no_grad():
        found = logits(tuned, batch())
        assert not torch.allclose(found, start)
        assert torch.equal(logits(loaded, batch()), found)


def test_other_models_are_left_alone() -> None:
    for family in tiny.FAMILIES:
        model = tiny.model(family)
        modules = list(model.modules())
        before = tiny.weights(model)
        assert normalise(model) is model
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert tiny.same_bits(tiny.weights(model), before)
