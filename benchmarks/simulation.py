"""Whole simulations through Flower and Ray: where a round's time goes, and many nodes.

`python benchmarks/simulation.py [round|nodes …]` prints Markdown tables. `round` runs the
built-in job and says how much of each later round is neither training nor averaging nor
evaluation. `nodes` runs a tiny model with up to 1,000 nodes and says what the server needs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny

from fedpft_core.config import write_yaml
from server_app.run.events import read_events

ROOT = Path(__file__).parents[1]


def simulate(folder: Path, flat: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """One `fedpft run` of these keys: its events, and the seconds it took on the clock."""
    folder.mkdir(parents=True)
    write_yaml(folder / "run.yaml", flat)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fedpft_console.cli", "run", "--quiet", "--config",
         str(folder / "run.yaml"), "--run-dir", str(folder / "run")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    events = [event for _, event in read_events(folder / "run" / "events.jsonl")]
    return events, time.perf_counter() - start


def bench_round(folder: Path) -> None:
    """Share of each round after the first that is outside training, averaging, evaluation."""
    events, _ = simulate(
        folder,
        {
            "federation.rounds": 6, "distill.steps": 10, "align.steps": 5,
            "run.baselines": False, "run.undistilled": False,
        },
    )  # fmt: skip
    print(
        "| round | seconds | exchange | evaluation | outside | share |\n|---|---|---|---|---|---|"
    )
    shares = []
    for e in events:
        if e["event"] != "round_finished":
            continue
        share = e["overhead_seconds"] / e["seconds"]
        print(
            f"| {e['round']} | {e['seconds']:.1f} | {e['exchange_seconds']:.1f} | "
            f"{e['evaluate_seconds']:.1f} | {e['overhead_seconds']:.2f} | {100 * share:.1f}% |"
        )
        if e["round"] > 1:
            shares.append(share)
    print(f"\nMedian of rounds 2 to 6: {100 * statistics.median(shares):.1f}% (goal: at most 15%).")


def bench_nodes(folder: Path) -> None:
    """Server memory and round time by nodes and clients a round, tiny model."""
    base = tiny.write_task("bert", folder / "task", rows=4400)
    base |= {
        "distill.steps": 2, "align.interval": 0, "train.local-steps": 2, "train.batch-size": 2,
        "federation.rounds": 3, "federation.partition": "iid", "run.threads": 1,
        "run.baselines": False, "run.undistilled": False, "run.gradient-rows": 0,
    }  # fmt: skip
    print("| nodes | clients a round | server peak MB | seconds a round | whole run s |")
    print("|---|---|---|---|---|")
    for nodes, sampled in ((100, 10), (1000, 10), (100, 100), (1000, 100)):
        events, seconds = simulate(
            folder / f"{nodes}-{sampled}",
            base | {"federation.clients": nodes, "federation.clients-per-round": sampled},
        )
        peak = max(e["peak_rss_bytes"] for e in events if e["event"] == "memory")
        rounds = [e for e in events if e["event"] == "round_finished"]
        assert all(e["good"] == sampled for e in rounds), rounds
        later = statistics.median(e["seconds"] for e in rounds[1:])
        print(
            f"| {nodes} | {sampled} | {peak / 1e6:.0f} | {later:.1f} | {seconds:.0f} |", flush=True
        )


BENCHES = {"round": bench_round, "nodes": bench_nodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []])
    for name in parser.parse_args().names or list(BENCHES):
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n## {name}\n", flush=True)
            BENCHES[name](Path(folder) / name)


if __name__ == "__main__":
    main()
