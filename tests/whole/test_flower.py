"""The app on real Flower processes: `fedpft run` in simulation, a SuperLink with SuperNodes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import flower
import psutil
import pytest
import tiny
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file


def check_result(run: Path, fm: Path) -> None:
    """A finished run: alignments travelled, and the exported adapter fits the untouched FM."""
    log = flower.events(run)
    assert any(e["event"] == "run_finished" for e in log)
    sent = {(e["kind"], e["direction"]) for e in log if e["event"] == "bytes"}
    assert {("package", "down"), ("patch", "down"), ("adapter", "up"), ("counts", "up")} <= sent
    assert sum(e["event"] == "alignment" for e in log) == 2
    bare = transformers.AutoModelForSequenceClassification.from_pretrained(fm, num_labels=3)
    plugged = PeftModel.from_pretrained(bare, run / "adapter").eval()
    batch = tiny.tokenizer("bert")(["the cat is old", "two"], return_tensors="pt", padding=True)
    assert torch.isfinite(plugged(**batch).logits).all()
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(t.abs().sum() > 0 for k, t in saved.items() if "lora_B" in k)


@pytest.mark.slow
def test_simulation_without_the_fm_on_disk(tmp_path: Path) -> None:
    """`fedpft run` for real. The FM's folder is gone before the first client is asked anything:
    clients need their package only. Afterwards nothing is left running."""
    config = flower.write_config(tmp_path / "run.yaml", flower.job(tmp_path))
    run = tmp_path / "run"
    before = {p.pid for p in psutil.process_iter()}
    process = subprocess.Popen(
        [str(flower.BIN / "fedpft"), "run", "--config", str(config), "--run-dir", str(run)],
        cwd=tmp_path,
        env=flower.environment(tmp_path / "flwr"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        flower.wait_for(run, "phase_finished", 120, phase="build")
        shutil.move(tmp_path / "fm", tmp_path / "hidden")
        out, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, out[-3000:]
    assert not any(e["event"] == "round_started" for e in flower.events(run)[:5])
    check_result(run, tmp_path / "hidden")
    left = [
        p.info
        for p in psutil.process_iter(["pid", "name", "cmdline"])
        if p.info["pid"] not in before
    ]
    ours = [p for p in left if any(str(tmp_path) in arg for arg in p["cmdline"] or ())]
    assert not ours, ours


@pytest.mark.slow
def test_superlink_with_two_supernodes(tmp_path: Path) -> None:
    """Deployment: each node has its own file; server and nodes share nothing but the network."""
    tree = flower.job(tmp_path, **{"clients": 2, "min-clients": 2})
    tree["data"]["train"] = ""
    config = flower.write_config(tmp_path / "run.yaml", tree)
    run = tmp_path / "run"
    with flower.deployment(tmp_path / "flower") as d:
        for i, rows in enumerate((40, 25)):
            data = tiny.write_csv(tmp_path / f"node{i}.csv", tiny.sentences(rows, 10 + i))
            d.start_node(f"edge-{i}", data, **{"cache-dir": str(tmp_path / f"cache{i}")})
        cli = d.run(run, config)
        flower.wait_for(run, "phase_finished", 120, phase="build")
        shutil.move(tmp_path / "fm", tmp_path / "hidden")
        cli.wait(300)
        assert cli.returncode == 0, d.logs()
    check_result(run, tmp_path / "hidden")
    replies = [e for e in flower.events(run) if e["event"] == "reply"]
    assert {(e["client"], e["examples"]) for e in replies} == {("edge-0", 40), ("edge-1", 25)}
    # Each node has its own store; the package went to each exactly once.
    packages = [e for e in flower.events(run) if e["event"] == "bytes" and e["kind"] == "package"]
    assert len(packages) == 2
    for i in range(2):
        assert list((tmp_path / f"cache{i}" / "store").iterdir())


@pytest.mark.slow
def test_flwr_run_alone(tmp_path: Path) -> None:
    """`flwr run .` in a checkout, with Flower's own background SuperLink and two nodes."""
    tree = flower.job(tmp_path, **{"clients-per-round": 4, "clients": 10})
    text = "\n".join(
        f"{section}.{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for section, keys in tree.items()
        for key, value in keys.items()
    )
    run = tmp_path / "run"
    (tmp_path / "run.toml").write_text(f'{text}\nrun.dir = "{run}"\n'.replace("'", '"'))
    env = flower.environment(
        tmp_path / "flwr", FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(flower.free_port())
    )
    try:
        done = subprocess.run(
            [str(flower.BIN / "flwr"), "run", ".", "--run-config", str(tmp_path / "run.toml"),
             "--stream"],
            cwd=flower.ROOT, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        log = flower.events(run)
        assert any(e["event"] == "run_finished" for e in log), done.stdout[-3000:] + done.stderr
        # Two nodes where four were asked for: said, and not fatal.
        assert any("only 2 nodes" in str(e.get("text")) for e in log if e["event"] == "warning")
        check_result(run, tmp_path / "fm")
    finally:
        for process in psutil.process_iter(["environ"]):
            home = (process.info["environ"] or {}).get("FLWR_HOME")
            if home == str(tmp_path / "flwr"):
                process.terminate()
