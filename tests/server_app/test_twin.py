"""One-shot beside its twin of several rounds, and the server's distillation after the one merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file

SHOT = {"federation.schedule": "one-shot", "federation.rounds": 1}


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    quick = {
        "distill.steps": 2, "align.interval": 0, "federation.clients-per-round": 4,
        "run.evaluate-every": 9, "run.gradient-rows": 0, "head.start": "zero",
        "head.end": "trained", "plug.method": "as-trained",
    }  # fmt: skip
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=120) | quick


def traffic(events: list[dict[str, Any]], direction: str) -> int:
    return sum(
        e["bytes"] for e in tiny.main_run(events, "bytes")
        if e["kind"] == "adapter" and e["direction"] == direction
    )  # fmt: skip


@pytest.mark.parametrize(("wire", "up"), [("fp32", "same"), ("int8", "same"), ("int8", "ternary")])
@pytest.mark.parametrize("rule", ["average", "frozen-a"])
def test_adapters_travel_in_a_fraction_of_the_twins_bytes(
    flat: dict[str, Any], tmp_path: Path, wire: str, up: str, rule: str
) -> None:
    """At the same steps of each client, one T-th of them, to the byte."""
    keys = {"wire.adapter": wire, "wire.adapter-up": up, "federation.aggregate": rule}
    rounds = 3
    shot = tiny.run(flat | keys | SHOT | {"train.local-steps": 2 * rounds}, tmp_path / "shot")
    twin = tiny.run(
        flat | keys | {"federation.rounds": rounds, "train.local-steps": 2}, tmp_path / "twin"
    )
    steps = [
        sum(e["steps"] for e in tiny.main_run(events, "reply")) for events in (shot, twin)
    ]  # fmt: skip
    assert steps == [4 * 2 * rounds] * 2
    for direction in ("up", "down"):
        assert traffic(twin, direction) == rounds * traffic(shot, direction) > 0


def test_the_server_distils_once_after_the_one_merge(flat: dict[str, Any], tmp_path: Path) -> None:
    """With plug.method = distil the FM is tuned towards the merged sub-FM, and nothing else is."""
    keys = SHOT | {"train.local-steps": 4, "head.start": "statistics", "plug.distil-steps": 5}
    found = {}
    for method in ("as-trained", "distil"):
        events = tiny.run(flat | keys | {"plug.method": method}, tmp_path / method)
        plugged = tiny.main_run(events, "plugged")
        assert [e["method"] for e in plugged] == (["distil"] if method == "distil" else [])
        found[method] = load_file(tmp_path / method / "adapter/adapter_model.safetensors")
        merged = load_file(tmp_path / method / "merged/adapter_model.safetensors")
        assert merged.keys() == found[method].keys()
    one, other = found["as-trained"], found["distil"]
    moved = [k for k in one if not (one[k] == other[k]).all()]
    assert any("lora_B" in k for k in moved)
