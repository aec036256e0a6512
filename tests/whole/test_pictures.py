"""A run of a diffusion pipeline, from rows to an adapter that diffusers' own UNet takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pictures
import pytest
import tiny
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from client_app.check.node import FAIL, Options, check
from fedpft_console import report
from fedpft_core import config
from fedpft_core.model.plan import pruned_ffns
from fedpft_core.proxy import size as plansize
from fedpft_core.proxy.cost import inspect
from server_app.phases.load import load
from server_app.run import proxycache

SHORT = {
    "federation.rounds": 2, "federation.clients": 3, "federation.clients-per-round": 2,
    "run.evaluate-every": 2, "align.interval": 1, "distill.steps": 6, "align.steps": 3,
    "run.baselines": True, "data.validation-share": 0.2, "run.sample-steps": 3,
}  # fmt: skip


class Silent:
    """Events that nobody reads."""

    def emit(self, event: Any) -> None:
        pass


def test_a_run_from_rows_to_pictures(tmp_path: Path) -> None:
    flat = pictures.write_task(tmp_path) | SHORT
    events = tiny.run(flat, tmp_path / "run")
    assert events[-1]["event"] == "run_finished"
    scores = {(e["round"], e["model"]): e for e in tiny.main_run(events, "evaluation")}
    assert scores[2, "fm"]["value"] < 0.95 * scores[0, "fm"]["value"]
    assert scores[2, "proxy"]["value"] < 0.95 * scores[0, "proxy"]["value"]
    assert all(e["error"] > 0 and e["metric"] == "denoising loss" for e in scores.values())
    (zero,) = tiny.main_run(events, "baseline")
    assert zero["name"] == "zero-shot" and zero["value"] == scores[0, "fm"]["value"]
    (plugged,) = tiny.main_run(events, "plugged")
    assert set(plugged["losses"]) == {"as-trained", "distil"}
    assert not tiny.main_run(events, "head") and len(tiny.main_run(events, "alignment")) == 1
    painted = tiny.main_run(events, "pictures")
    assert {tuple(e["prompts"]) for e in painted} == {tuple(painted[0]["prompts"])}
    assert sorted(painted[0]["prompts"]) == sorted(pictures.PROMPTS)  # each prompt once
    for event in painted:
        with Image.open(tmp_path / "run" / event["file"]) as image:
            assert image.size == (3 * 64 + 8, 64)
    shown = (tmp_path / "run" / "report.md").read_text() if report.write(tmp_path / "run") else ""
    for name in ("round-0-fm", "round-2-proxy", "round-2-fm"):
        assert f"(pictures/{name}.png)" in shown
    check_product(flat, tmp_path)


def check_product(flat: dict[str, Any], path: Path) -> None:
    """PEFT takes the adapter for the vanilla UNet, with what it had and without a new module."""
    from diffusers import UNet2DConditionModel

    saved = load_file(path / "run" / "adapter" / "adapter_model.safetensors")
    assert saved and all(".attn" in name and "lora_" in name for name in saved)
    unet: Any = UNet2DConditionModel.from_pretrained(path / "fm" / "unet")
    before = tiny.weights(unet)
    plugged = PeftModel.from_pretrained(unet, str(path / "run" / "adapter"))
    live = {k for k, _ in plugged.named_parameters() if ".lora_" in k}
    assert {k.replace(".default.", ".") for k in live} == set(saved)
    kept = tiny.weights(plugged.unload())
    assert all(torch.equal(kept[name], value) for name, value in before.items())


def test_the_same_run_gives_the_same_adapter(tmp_path: Path) -> None:
    flat = pictures.write_task(tmp_path) | SHORT | {"federation.rounds": 1, "run.samples": 0}
    flat |= {"run.baselines": False, "distill.steps": 2}
    found = []
    for name in ("a", "b"):
        tiny.run(flat, tmp_path / name)
        found.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert tiny.same_bits(*found)


@pytest.mark.parametrize(
    ("saliency", "method"),
    [
        ("activation", "closed-form"), ("gradient", "sequential"), ("random", "block-local"),
        ("weight-norm", "gradient"),
    ],
)  # fmt: skip
def test_saliencies_and_alignments_cope_with_blocks_of_several_lengths(
    saliency: str, method: str, tmp_path: Path
) -> None:
    flat = pictures.write_task(tmp_path) | {
        "plan.saliency": saliency, "distill.method": method, "distill.fit-batches": 3,
        "distill.steps": 3, "run.dir": str(tmp_path / "run"),
    }  # fmt: skip
    bench = load(config.from_flat(flat), Silent())  # type: ignore[arg-type]
    assert [b.state for b in bench.models.plan.blocks].count("pruned") == 5
    before = {b: f.read(torch.arange(f.neurons)) for b, f in views(bench).items()}
    proxycache.distil(bench)
    for b, f in views(bench).items():
        after = f.read(torch.arange(f.neurons))
        assert all(value.isfinite().all() for value in after.values())
        assert not tiny.same_bits(before[b], after)


def views(bench: Any) -> dict[int, Any]:
    return pruned_ffns(bench.models.proxy, bench.models.plan)


def test_inspection_sizes_and_node_check_know_pictures(tmp_path: Path) -> None:
    flat = pictures.write_task(tmp_path)
    cfg = config.from_flat(flat)
    assert inspect(cfg)["step_ratio"] > 1
    size = plansize.describe(cfg)
    assert size.meta.kind == "text-to-image" and size.labels == ()
    (tmp_path / "size.json").write_text(size.to_json(), encoding="utf-8")
    assert plansize.read(tmp_path / "size.json").meta == size.meta
    node = {
        "name": "n", "data-path": flat["data.train"], "image-column": "image",
        "task": "text-to-image", "cache-dir": str(tmp_path / "cache"),
    }  # fmt: skip
    pairs = " ".join(f"{k}={json.dumps(v)}" for k, v in node.items())
    findings = check(Options(pairs, plan=tmp_path / "size.json"))
    assert not [f for f in findings if f.status == FAIL], findings
    assert any("rows of full length" in f.text for f in findings)
    without = check(Options(pairs.replace('image-column="image"', "")))
    assert "no column with images is named" in next(f for f in without if f.status == FAIL).text
