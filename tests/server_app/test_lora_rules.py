"""Whole runs in this process with rules that change what clients train, or the adapter's rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fedpft_core.adapter import lora as adapters
from fedpft_core.errors import UserError
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.messages import TrainReply, TrainRequest

SHOT = {"federation.schedule": "one-shot", "federation.rounds": 1}


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    quick = {
        "distill.steps": 2, "align.interval": 0, "federation.clients-per-round": 4,
        "train.local-steps": 3, "run.evaluate-every": 9, "federation.rounds": 3,
        "run.gradient-rows": 0,
    }  # fmt: skip
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=90) | quick


def go(flat: dict[str, Any], folder: Path) -> tuple[tiny.Federation, list[dict[str, Any]]]:
    federation = tiny.Federation(flat)
    return federation, tiny.run(flat, folder, federation)


def exchanged(federation: tiny.Federation) -> list[tuple[TrainRequest, TrainReply]]:
    """Training messages with their answers, in order."""
    out = []
    for (_, sent), (_, received) in zip(federation.sent, federation.received, strict=True):
        request, reply = open_envelope(sent), open_envelope(received)
        if isinstance(request, TrainRequest) and isinstance(reply, TrainReply):
            out.append((request, reply))
    return out


def is_a(name: str) -> bool:
    return name.removesuffix("//scale").endswith("lora_A.weight")


def is_b(name: str) -> bool:
    return name.removesuffix("//scale").endswith("lora_B.weight")


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_a_frozen_factor_is_not_sent_and_does_not_move(
    flat: dict[str, Any], tmp_path: Path, wire: str
) -> None:
    keys = {"federation.aggregate": "frozen-a", "wire.adapter": wire}
    federation, events = go(flat | keys, tmp_path / "run")
    first = None
    for request, reply in exchanged(federation):
        assert request.settings.factors == "b"
        assert not any(is_a(k) for k in reply.adapter) and any(is_b(k) for k in reply.adapter)
        sent = codec.decode(request.adapter, request.fmt)
        first = first or sent
        # What travels twice in int8 is rounded once.
        assert all(torch.equal(sent[k], t) for k, t in first.items() if is_a(k))
    final = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    for name, value in first.items() if first else ():
        if is_a(name):
            (key,) = [k for k in final if k.endswith(name)]
            assert torch.equal(final[key], value)
    up = [e["bytes"] for e in events if e["event"] == "bytes" and e["kind"] == "adapter"
          and e["direction"] == "up"]  # fmt: skip
    down = [e["bytes"] for e in events if e["event"] == "bytes" and e["kind"] == "adapter"
            and e["direction"] == "down"]  # fmt: skip
    assert max(up) < 0.7 * min(down)


def test_factors_take_turns(flat: dict[str, Any], tmp_path: Path) -> None:
    federation, _ = go(flat | {"federation.aggregate": "alternating"}, tmp_path / "run")
    for request, reply in exchanged(federation):
        odd = request.round % 2
        assert any(is_b(k) for k in reply.adapter) == bool(odd)
        assert any(is_a(k) for k in reply.adapter) != bool(odd)
        assert any("classifier" in k for k in reply.adapter)


@pytest.mark.parametrize("rule", ["product", "orthonormal-a"])
def test_rounds_go_on_from_other_factors(flat: dict[str, Any], tmp_path: Path, rule: str) -> None:
    _, events = go(flat | {"federation.aggregate": rule}, tmp_path / "run")
    found = [e for e in events if e["event"] == "aggregated"]
    assert [e["round"] for e in found] == ([1, 2, 3] if rule == "product" else [])
    assert all(0 <= e["figures"]["discarded"] < 1 for e in found)
    assert events[-1]["event"] == "run_finished"


def test_a_stacked_adapter_grows_and_is_the_exact_product(
    flat: dict[str, Any], tmp_path: Path
) -> None:
    """The product has the rank of all clients together; statistics and plug-in go on from it."""
    keys = SHOT | {
        "federation.aggregate": "stacked", "wire.adapter": "fp32", "head.start": "statistics",
        "head.end": "better", "plug.method": "as-trained",
    }  # fmt: skip
    federation, events = go(flat | keys, tmp_path / "run")
    assert events[-1]["event"] == "run_finished"
    folder = tmp_path / "run/adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == 16 and settings["lora_alpha"] == 64.0  # 4 clients of rank 4, alpha 16
    final = load_file(folder / "adapter_model.safetensors")
    replies = [reply for _, reply in exchanged(federation)]
    total = sum(r.examples for r in replies)
    for name in (k for k in replies[0].adapter if is_a(k)):
        b_name = name.replace("lora_A", "lora_B")
        want = sum(
            r.examples / total * r.adapter[b_name].double() @ r.adapter[name].double()
            for r in replies
        )
        a, b = (next(t for k, t in final.items() if k.endswith(n)) for n in (name, b_name))
        assert torch.allclose(b.double() @ a.double(), want, atol=1e-6)
    merges = [e for e in events if e["event"] == "merged"]
    assert [e["replies"] for e in merges] == [1, 2, 3, 4]


def test_a_growing_rule_needs_one_shot(flat: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"federation.aggregate = stacked.*multi-round.*one-shot"):
        go(flat | {"federation.aggregate": "stacked"}, tmp_path / "run")


@pytest.mark.parametrize("rule", ["ties", "dare"])
def test_changes_are_merged_in_one_shot(flat: dict[str, Any], tmp_path: Path, rule: str) -> None:
    _, events = go(flat | SHOT | {"federation.aggregate": rule}, tmp_path / "run")
    assert events[-1]["event"] == "run_finished"


def test_another_rank_leaves_the_model_the_same_function() -> None:
    """Factors padded with zeros mean what they meant, at any rank."""
    fm, _, _, _ = tiny.pair("bert")
    batch = tiny.batch_of("bert")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    before = fm(**inputs).logits
    old = adapters.read(fm)
    assert adapters.rank_of(old) == 2
    padded = {
        k: torch.cat([t, t.new_zeros(3, t.shape[1])]) if is_a(k)
        else torch.cat([t, t.new_zeros(len(t), 3)], dim=1) if is_b(k) else t
        for k, t in old.items()
    }  # fmt: skip
    adapters.resize(fm, 5)  # type: ignore[arg-type]
    adapters.load(fm, padded)
    assert torch.allclose(fm(**inputs).logits, before, atol=1e-6)
    adapters.resize(fm, 2)  # type: ignore[arg-type]
    adapters.load(fm, old)
    assert torch.equal(fm(**inputs).logits, before)
    with pytest.raises(ValueError, match=r"shapes.*one rank"):
        adapters.rank_of(old | {next(k for k in old if is_a(k)): torch.zeros(3, 16)})
