"""Distilled sub-FMs on disk: the same bits with and without, found only where all is equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file

from fedpft_core import config as configs
from server_app import bench
from server_app.phases.load import load
from server_app.run import proxycache
from server_app.run.events import EventLog, read_events
from server_app.run.record import fold

TIMES = {"t", "seconds", "run_dir", "cached", "peak_rss_bytes", "paths"}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    flat = tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=120)
    return flat | {
        "distill.steps": 6, "align.steps": 3, "federation.rounds": 2, "align.interval": 1,
        "train.local-epochs": 1, "distill.adapter-noise": 0.02,
    }  # fmt: skip


def outcome(flat: dict[str, Any], folder: Path, **keys: Any) -> tuple[list[Any], dict[str, Any]]:
    """What a run did (events without times) and the adapter it ended with."""
    events = tiny.run(flat, folder, **keys)
    told = [
        {k: v for k, v in e.items() if not any(k.endswith(t) for t in TIMES) and k != "timings"}
        for e in events
        if e["event"] != "progress" and e.get("kind") != "control"  # whose size hangs on times
    ]
    return told, load_file(folder / "adapter" / "adapter_model.safetensors")


def cached(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def was_cached(folder: Path) -> bool:
    events = [e for _, e in read_events(folder / "events.jsonl")]
    (distilled,) = (e for e in events if e["event"] == "distilled")
    return bool(distilled.get("cached", False))


def test_a_run_from_the_cache_is_bit_identical(task: dict[str, Any], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    without = outcome(task, tmp_path / "a")
    making = outcome(task, tmp_path / "b", run__proxy_cache=cache)
    using = outcome(task, tmp_path / "c", run__proxy_cache=cache)
    assert [was_cached(tmp_path / name) for name in "abc"] == [False, False, True]
    assert len(cached(tmp_path / "cache")) == 1
    for told, adapter in (making, using):
        assert told == without[0]
        assert tiny.same_bits(adapter, without[1])
    # Later settings do not matter, so the same sub-FM is found.
    outcome(task, tmp_path / "d", run__proxy_cache=cache, train__lr=0.02, align__interval=0)
    assert was_cached(tmp_path / "d") and len(cached(tmp_path / "cache")) == 1


def test_the_seconds_are_those_of_the_run_that_did_the_work(
    task: dict[str, Any], tmp_path: Path
) -> None:
    from fedpft_console.compare.record import summary

    cache = str(tmp_path / "cache")
    made = summary(fold(tiny.run(task, tmp_path / "a", run__proxy_cache=cache)))
    used = summary(fold(tiny.run(task, tmp_path / "b", run__proxy_cache=cache)))
    assert used["distil_seconds"] == made["distil_seconds"] > 0
    assert used["output_error_before"] == made["output_error_before"]
    assert "distil_cached" in used and "distil_cached" not in made


def distilled(flat: dict[str, Any], folder: Path, **keys: Any) -> bool:
    """Load and distil only; whether the sub-FM came from the cache `folder`."""
    flat = flat | {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
    config = configs.from_flat(flat | {"run.proxy-cache": str(folder)})
    events = EventLog(None)
    proxycache.distil(load(config, events))
    (event,) = (e for e in events.seen if e["event"] == "distilled")
    return bool(event.get("cached", False))


def test_what_decides_a_sub_fm_is_in_its_name(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not distilled(task, tmp_path)
    assert distilled(task, tmp_path)
    changes: tuple[dict[str, Any], ...] = (
        {"distill__steps": 5}, {"distill__lr": 1e-4}, {"run__seed": 1},
        {"plan__keep_share": 0.25}, {"data__max_public_rows": 150}, {"lora__rank": 3},
    )  # fmt: skip
    for count, change in enumerate(changes, 2):
        assert not distilled(task, tmp_path, **change), change
        assert len(cached(tmp_path)) == count
    later = {"train__lr": 1.0, "federation__rounds": 9, "align__steps": 1, "wire__patch": "fp16"}
    assert distilled(task, tmp_path, **later)
    # The seed alone decides the weights of FM and adapter, so it is there twice over; code is not.
    monkeypatch.setattr(proxycache, "_source_digest", lambda: "another")
    assert not distilled(task, tmp_path)


def test_a_damaged_file_is_made_again(task: dict[str, Any], tmp_path: Path) -> None:
    assert not distilled(task, tmp_path)
    (file,) = cached(tmp_path)
    good = file.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for bad in (good[:-100], flipped, b"", bytes(64)):
        file.write_bytes(bad)
        assert not distilled(task, tmp_path)
        assert distilled(task, tmp_path)


def test_an_unwritable_cache_does_not_fail_the_run(task: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    assert not distilled(task, tmp_path / "cache")


def test_nothing_is_kept_where_nothing_is_distilled(task: dict[str, Any], tmp_path: Path) -> None:
    for key in ({"distill.method": "none"}, {"plan.proxy": "full"}):
        config = configs.from_flat(task | {"run.proxy-cache": str(tmp_path / "cache")} | key)
        events = EventLog(None)
        proxycache.distil(load(config, events))
        assert not [e for e in events.seen if e["event"] == "distilled"]
    assert not (tmp_path / "cache").exists()


def test_every_key_is_in_the_name_or_left_out_on_purpose() -> None:
    """A new section would be in the name; what is left out is listed here once more."""
    out = {"align", "train", "federation", "plug", "wire"}
    # Neither changes what is distilled: a disguise is put on afterwards.
    out |= {"plan.ledger", "plan.disclosure-budget", "plan.disguise"}
    assert {p.rstrip(".") for p in proxycache._LATER} == out


def test_a_thorough_distillation_is_another_one(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps and rows are fixed, whatever distill.steps and distill.batch-size say."""
    thorough = configs.from_flat({"distill.budget": "thorough", "distill.steps": 5}).distill
    assert thorough.work == (2000, 16)
    assert configs.from_flat({"distill.steps": 5, "distill.batch-size": 2}).distill.work == (5, 2)
    monkeypatch.setattr(configs.DistillConfig, "work", property(lambda d: (3, 7)))
    served: list[int] = []

    def counted(*args: Any, rows: int = 0) -> Any:
        served.append(rows)
        return stream(*args, rows=rows)

    stream = bench.public_stream
    monkeypatch.setattr(bench, "public_stream", counted)
    events = tiny.run(task | {"federation.rounds": 1}, tmp_path / "run")
    (made,) = (e for e in events if e["event"] == "distilled")
    assert made["steps"] == 3
    assert 7 in served
