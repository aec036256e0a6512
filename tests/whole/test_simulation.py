"""Whole simulations under Flower and Ray: how many run at once, and how many there are."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import flower
import psutil
import pytest
import tiny
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# What must be the same however the work was scheduled, and what of it may differ.
COMPARED = ("round_started", "reply", "bytes", "evaluation", "adapter", "alignment", "agreement")
CLOCK = ("t", "seconds", "timings", "train_seconds")


def simulate(folder: Path, flat: dict[str, Any], cores: set[int]) -> list[dict[str, Any]]:
    """`fedpft run` on these cores; one client runs at once for each of them."""
    from fedpft_core.config import write_yaml

    folder.mkdir()
    write_yaml(folder / "run.yaml", flat)
    done = subprocess.run(
        [str(flower.BIN / "fedpft"), "run", "--quiet", "--config", str(folder / "run.yaml"),
         "--run-dir", str(folder / "run")],
        env=flower.environment(folder / "flwr"),
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return flower.events(folder / "run")


def order_free(log: list[dict[str, Any]]) -> list[str]:
    return sorted(
        repr(sorted((k, v) for k, v in e.items() if k not in CLOCK))
        for e in log
        # Control data hold the client's timings, whose digits vary in number.
        if e["event"] in COMPARED and e.get("kind") != "control"
    )


def test_one_client_at_once_or_two_give_the_same_bits(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) >= 2, "this check needs two cores"
    flat = tiny.write_task("bert", tmp_path / "task", rows=120)
    flat |= {"wire.adapter-up": "ternary", "federation.rounds": 3, "align.interval": 1}
    logs = [
        simulate(tmp_path / f"{n}", flat, set(cores[:n]))
        for n in (1, 2)
    ]  # fmt: skip
    assert order_free(logs[0]) == order_free(logs[1])
    one, two = (load_file(tmp_path / f"{n}/run/adapter/adapter_model.safetensors") for n in (1, 2))
    assert tiny.same_bits(one, two)


def test_a_thousand_nodes_a_hundred_a_round(tmp_path: Path) -> None:
    """The server's memory depends on the clients of a round, not on how many nodes there are."""
    base = tiny.write_task("bert", tmp_path / "task", rows=2400)
    base |= {
        "distill.steps": 2, "align.interval": 0, "train.local-steps": 1, "train.batch-size": 2,
        "federation.rounds": 2, "federation.partition": "iid", "run.gradient-rows": 0,
    }  # fmt: skip
    cores = os.sched_getaffinity(0)
    peak = {}
    for nodes in (100, 1000):
        flat = base | {"federation.clients": nodes, "federation.clients-per-round": 100}
        log = simulate(tmp_path / f"{nodes}", flat, cores)
        rounds = [e for e in log if e["event"] == "round_finished"]
        assert [e["good"] for e in rounds] == [100, 100]
        peak[nodes] = max(e["peak_rss_bytes"] for e in log if e["event"] == "memory")
    # Ten times the nodes may cost names and ids, not adapters: those of 900 more would be more.
    assert peak[1000] < 1.05 * peak[100], peak


def worker_of(folder: Path) -> psutil.Process | None:
    """A process that simulates clients of the run in a folder."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if not process.name().startswith("ray::ClientApp"):
                continue
            parent = process.parent()  # the raylet, whose environment no title has overwritten
            if parent and str(folder) in parent.environ().get("FLWR_HOME", ""):
                return process
    return None


def test_a_run_goes_on_by_itself_when_a_client_process_dies(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path / "task", rows=120)
    flat |= {"federation.rounds": 4, "align.interval": 2, "train.local-steps": 60}
    cores = os.sched_getaffinity(0)
    undisturbed = simulate(tmp_path / "a", flat, cores)
    folder = tmp_path / "b"
    folder.mkdir()
    from fedpft_core.config import write_yaml

    write_yaml(folder / "run.yaml", flat)
    log = open(folder / "log", "wb")  # noqa: SIM115  # the child keeps it
    run = subprocess.Popen(
        [str(flower.BIN / "fedpft"), "run", "--config", str(folder / "run.yaml"),
         "--run-dir", str(folder / "run")],
        env=flower.environment(folder / "flwr"), stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        flower.wait_for(folder / "run", "round_started", 300, run, round=3)
        victim = worker_of(folder)
        assert victim is not None
        victim.kill()
        assert run.wait(400) == 0, (folder / "log").read_text()[-3000:]
    finally:
        run.kill()
        log.close()
    said = (folder / "log").read_text()
    assert "the process of a simulated client died" in said
    assert "The run goes on from round 3." in said
    events = flower.events(folder / "run")
    assert [e["resumed_from"] for e in events if e["event"] == "run_started"] == [None, 2]
    assert order_free(events) == order_free(undisturbed)
    one, two = (load_file(tmp_path / f"{n}/run/adapter/adapter_model.safetensors") for n in "ab")
    assert tiny.same_bits(one, two)
