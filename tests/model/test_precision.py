"""Half precision: frozen weights of two bytes, an adapter of four, and steps that are not lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.align.distill import distil
from fedpft_core.config import ModelConfig
from fedpft_core.errors import UserError
from fedpft_core.model.batch import inputs_of
from fedpft_core.model.load import load
from fedpft_core.model.precision import HALF, Masters
from fedpft_core.proxy.build import build
from fedpft_core.proxy.package import make_package, rebuild
from fedpft_core.task import make

BF16 = torch.bfloat16


def loaded(family: str, folder: Path, dtype: str) -> Any:
    if not (folder / "config.json").exists():
        (tiny.writer_folder if family in tiny.CAUSAL_FAMILIES else tiny.folder)(family, folder)
    task = make("generate") if family in tiny.CAUSAL_FAMILIES else tiny.task_of(family)
    return load(ModelConfig(name=str(folder), dtype=dtype), task.model(), 0), task


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "gpt2"])
def test_a_package_in_half_precision(family: str, tmp_path: Path) -> None:
    whole, task = loaded(family, tmp_path, "fp32")
    half, _ = loaded(family, tmp_path, "bf16")
    assert {p.dtype for p in half.model.parameters()} == {BF16}
    plan = tiny.plan_for(half.model)
    head = task.head(half.family)
    spec = adapters.make_spec(half.family, plan, half.fresh, config.LoraConfig(rank=2), head)
    proxy = adapters.attach(build(half.model, plan), spec, plan)
    kinds = {p.requires_grad: p.dtype for p in proxy.parameters()}
    assert kinds == {True: torch.float32, False: BF16}
    sent = make_package(proxy, plan, spec, half.processor, task.name, task.labels, 16)
    assert {t.dtype for t in sent.weights.values() if t.is_floating_point()} == {BF16}
    got = rebuild(sent)
    adapter = tiny.random_adapter(proxy, plan)
    adapters.load(proxy, adapter, plan)
    adapters.load(got.model, adapter, plan)
    batch = tiny.batch_of(family)
    batch.pop("labels", None)
    with torch.no_grad():
        mine, theirs = (m(**inputs_of(batch)).logits for m in (proxy, got.model))
    assert mine.equal(theirs)  # the same bits at server and client
    fm = adapters.attach(build(whole.model, plan), spec, plan)
    adapters.load(fm, adapter, plan)
    with torch.no_grad():
        exact = fm(**inputs_of(batch)).logits
    # bfloat16 has eight bits: the same numbers to a few per cent.
    assert (mine.float() - exact).norm() < 0.08 * exact.norm()
    assert not mine.float().equal(exact)


def test_a_step_smaller_than_rounding_is_not_lost() -> None:
    p = torch.ones(4, dtype=BF16, requires_grad=True)
    masters = Masters([p])
    optimiser = torch.optim.SGD(masters.params, lr=1e-3)
    for _ in range(16):
        (p.sum()).backward()
        masters.take_gradients()
        assert p.grad is None
        optimiser.step()
        masters.give_back()
    assert p.detach().float().tolist() == [0.984375] * 4  # 1 - 16e-3, rounded
    lost = torch.ones(4, dtype=BF16)
    for _ in range(16):
        lost -= 1e-3
    assert lost.tolist() == [1.0] * 4
    single = torch.ones(2, requires_grad=True)
    assert Masters([single]).params[0] is single


def test_alignment_brings_a_sub_fm_in_half_precision_nearer(tmp_path: Path) -> None:
    half, _ = loaded("llama", tmp_path, "bf16")
    plan = tiny.plan_for(half.model)
    proxy = build(half.model, plan)
    before = {k: p.clone() for k, p in proxy.named_parameters()}
    cfg = config.DistillConfig(warmup_share=0.0)
    first, last, _ = distil(
        half.model, proxy, plan, tiny.public("llama", 40), cfg, steps=40, lr=3e-3, alpha=0.01
    )
    assert last < 0.9 * first
    assert {p.dtype for p in proxy.parameters()} == {BF16}
    moved = {k for k, p in proxy.named_parameters() if not p.equal(before[k])}
    assert moved and all(".mlp." in k for k in moved)


@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_whole_run_in_half_precision(family: str, tmp_path: Path) -> None:
    if family == "llama":
        flat = tiny.write_dialogues("llama", tmp_path)
    else:
        flat = tiny.write_task("bert", tmp_path) | {"federation.partition": "iid"}
    found = {}
    for dtype in ("fp32", "bf16"):
        events = tiny.run(
            flat | {"model.dtype": dtype}, tmp_path / dtype, run__samples=0, run__baselines=True
        )
        last = [e for e in tiny.main_run(events, "evaluation") if e["model"] == "proxy"][-1]
        found[dtype] = (last["value"], tiny.main_run(events, "model")[0]["proxy_bytes"])
    (a, whole), (b, half) = found.values()
    assert half == whole / 2
    assert abs(a - b) < 0.15 * max(a, b)


def test_what_half_precision_is_not_for() -> None:
    with pytest.raises(UserError, match=r"distill\.method = closed-form needs model\.dtype = fp32"):
        config.from_flat({"model.dtype": "bf16", "distill.method": "closed-form"})
    with pytest.raises(UserError, match=r"model\.dtype"):
        config.from_flat({"model.dtype": "int8"})
    assert torch.float32 not in HALF


_MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
from fedpft_core import config
from fedpft_core.config import ModelConfig
from fedpft_core.model.load import load, size
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.task import make

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon"))

def peak(job):
    most, over = [anonymous()], threading.Event()
    def watch():
        while not over.wait(0.002):
            most.append(anonymous())
    thread = threading.Thread(target=watch)
    before = anonymous()
    thread.start()
    result = job()
    over.set()
    thread.join()
    return result, max(most) - before

task = make("generate")
load(ModelConfig(name=sys.argv[2]), task.model(), 0)  # what the library takes once
found, loading = peak(lambda: load(ModelConfig(name=sys.argv[1]), task.model(), 0))
plan = make_plan(found.model, config.PlanConfig(keep_share=0.25), 0)
proxy, building = peak(lambda: build(found.model, plan))
block = sum(p.numel() for p in found.family.block_list(found.model)[0].parameters()) * 4
print(json.dumps({
    "fm": size(found.model)[1], "proxy": size(proxy)[1], "block": block,
    "loading": loading, "building": building,
}))
"""


@pytest.mark.slow
def test_memory_of_loading_and_building_a_gigabyte(tmp_path: Path) -> None:
    """A sharded checkpoint is read tensor by tensor; a sub-FM costs itself and one block."""
    import transformers

    made = transformers.LlamaConfig(
        vocab_size=len(tiny.vocabulary()), hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=15, num_attention_heads=8, num_key_value_heads=8, bos_token_id=2,
        eos_token_id=3, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(made)
    assert 0.9e9 < sum(p.numel() for p in model.parameters()) * 4 < 2e9
    model.save_pretrained(tmp_path / "large", max_shard_size="150MB")
    del model
    tiny.writer_tokenizer().save_pretrained(tmp_path / "large")
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 5
    tiny.writer_folder("llama", tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "large"), str(tmp_path / "small")],
        capture_output=True, text=True, check=True, timeout=500,
    )  # fmt: skip
    m = json.loads(done.stdout.splitlines()[-1])
    slack = 30e6
    assert m["loading"] < m["fm"] + m["block"] + slack, m
    assert m["building"] < m["proxy"] + m["block"] + slack, m
