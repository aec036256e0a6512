"""Kill a whole run with -9 at random points, resume it, and compare its end bit for bit.

    PYTHONPATH=. python tests/kill_loop.py --kills 50 [--schedule one-shot] FOLDER

One run is left alone; then runs of the same seed are killed again and again, half of the time
at a random moment and half of the time while a checkpoint is being written, each resumed until
it ends. Adapter, sub-FM, patches, metrics and ledger must then be those of the run left alone,
with no event lost or there twice. The last line printed is JSON: kills, runs, seconds.

The parent imports everything once and forks; it never trains itself, since autograd does not
survive a fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch

from fedpft_core import config as configs
from server_app.app import run
from server_app.run.events import read_events
from server_app.run.folder import RunFolder

# Events that must be the same whatever happened on the way, and what of them may differ.
COMPARED = ("round_finished", "reply", "bytes", "evaluation", "adapter", "alignment", "distilled")
TIMES = ("t", "timings")
ROUNDS = 3
SCHEDULES: dict[str, dict[str, Any]] = {
    "multi-round": {"federation.rounds": ROUNDS, "wire.adapter-up": "ternary"},
    # Multi-round as well, the server at work beside the clients.
    "overlap": {
        "federation.rounds": ROUNDS,
        "wire.adapter-up": "ternary",
        "align.lag": 1,
        "federation.schedule": "multi-round",
    },
    # A message sent before the kill and not answered is sent once more.
    "one-shot": {"federation.rounds": 1, "federation.clients-per-round": 4},
    "async": {"federation.rounds": 2 * ROUNDS, "align.proportion": 1.0},
}


def child(flat: dict[str, Any]) -> None:
    """One process of a server, with its clients; never returns."""
    code = 1
    try:
        config = configs.from_flat(flat)
        with RunFolder.open(config) as folder:
            full = flat | {"run.dir": str(folder.path)}
            transport = tiny.Federation(full).transport()
            run(replace(config, run=folder.run_config), transport, folder.events)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(flat: dict[str, Any]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child(flat)
    return pid


def outcome(folder: Path, sent_again: bool = False) -> dict[str, Any]:
    """Everything about a finished run that must not depend on what interrupted it."""
    events = [e for _, e in read_events(folder / "events.jsonl")]
    kept = []
    for e in events:
        # The head of a reply holds times, so its length differs from run to run.
        if e["event"] not in COMPARED or e.get("kind") == "control":
            continue
        if sent_again and e.get("direction") == "down":
            continue
        kept.append({k: v for k, v in e.items() if k not in TIMES and "seconds" not in k})
    last = sorted((folder / "checkpoints").glob("round-*"))[-1]
    files = {p.name: p.read_bytes() for p in last.glob("*.safetensors")}
    files["export"] = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    files["plan"] = (folder / "plan.json").read_bytes()
    return {"events": kept, "files": files, "finished": events[-1]["event"] == "run_finished"}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    out = [f"file {k}" for k in a["files"].keys() | b["files"].keys()
           if a["files"].get(k) != b["files"].get(k)]  # fmt: skip
    out += [f"{x} is not {y}" for x, y in zip(a["events"], b["events"], strict=False) if x != y][:5]
    if len(a["events"]) != len(b["events"]):
        out.append(f"{len(a['events'])} events, not {len(b['events'])}")
    return out


def wait_for_writing(folder: Path, pid: int, seconds: float) -> None:
    """Until a checkpoint is half written, the process has ended, or the time is up."""
    until = time.monotonic() + seconds
    saved = folder / "checkpoints"
    while time.monotonic() < until and not any(saved.glob(".new-*")):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return


def main() -> int:
    """Run the loop; the exit status is 0 when every run ended with the same bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", choices=SCHEDULES, default="multi-round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork either
    args.folder.mkdir(parents=True, exist_ok=True)
    again = args.schedule not in ("multi-round", "overlap")
    flat = (
        tiny.write_task("bert", args.folder)
        | {
            "align.interval": 4 if again else 1,
            "distill.steps": 3,
            "align.steps": 2,
            "train.local-epochs": 1,
            "run.gradient-rows": 0,
            "federation.schedule": args.schedule,
        }
        | SCHEDULES[args.schedule]
    )
    rng, began = random.Random(args.seed), time.monotonic()

    alone = args.folder / "alone"
    pid, start_time = start(flat | {"run.dir": str(alone)}), time.monotonic()
    _, status = os.waitpid(pid, 0)
    duration = time.monotonic() - start_time
    if status != 0:
        return 1
    want = outcome(alone, again)
    assert want["finished"] and len(want["events"]) > 4 * ROUNDS
    kills, runs = 0, 0
    while kills < args.kills:
        folder = args.folder / f"run-{runs}"
        keys = flat | {"run.dir": str(folder)}
        while True:
            begun = (folder / "config.yaml").exists()
            pid = start(keys | {"run.resume": begun})
            if kills < args.kills:
                if rng.random() < 0.5:
                    time.sleep(rng.random() * duration)
                else:
                    wait_for_writing(folder, pid, 2 * duration)
                    time.sleep(rng.random() * 0.004)
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                kills += 1
            elif os.WEXITSTATUS(status) != 0:
                print(f"run {runs} failed after {kills} kills")
                return 1
            else:
                break
        found = differences(outcome(folder, again), want)
        if found:
            print(f"run {runs} differs after {kills} kills:", *found, sep="\n  ")
            return 1
        shutil.rmtree(folder)
        runs += 1
    print(json.dumps({"kills": kills, "runs": runs, "seconds": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
