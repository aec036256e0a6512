"""What a round takes where the server works beside the clients (align.lag = 1), and where not.

A SuperLink and three SuperNodes on loopback run the same federation with align.lag = 0 and with 1,
in turn, so that noise falls on both: MiniLM, the default plan, both models scored and the sub-FM
re-aligned after every round. A round is taken from the end of one to the end of the next, by the
clock; the first and the last are left out. Prints medians as a Markdown table.

    python benchmarks/overlap.py [--rounds 7] [--order 0,1,1,0] [--rows 150] [-c KEY=VALUE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NODES = ("node-a", "node-b", "node-c")


def deployed(folder: Path, flat: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds of each round that counts: all of it, the server's work, and the exchange."""
    import flower
    import tiny

    folder.mkdir()
    config = flower.write_config(folder / "run.yaml", flat)
    with flower.deployment(folder / "net") as net:
        for i, name in enumerate(NODES):
            rows = tiny.write_csv(folder / f"{name}.csv", tiny.sentences(60, i))
            net.start_node(name, rows, **{"cache-dir": str(folder / name)})
        process = net.run(folder / "run", config)
        if process.wait(1800):
            raise SystemExit(net.logs())
    log: list[dict[str, Any]] = flower.events(folder / "run")
    done = {e["round"]: e for e in log if e["event"] == "round_finished"}
    work = dict.fromkeys(done, 0.0)
    for e in log:
        if e["event"] in ("evaluation", "alignment") and e["round"] in work:
            work[e["round"]] += e["seconds"]
    return [
        {"round": done[n]["t"] - done[n - 1]["t"], "work": work[n - 1],
         "exchange": done[n]["exchange_seconds"]}
        for n in sorted(done)[1:-1]
    ]  # fmt: skip


def main() -> None:
    """Run both in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--order", default="0,1,1,0", help="values of align.lag, in turn")
    parser.add_argument("--rows", type=int, default=150, help="rows that the server scores")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a client")
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = str(ROOT)
    import tiny

    from fedpft_core.config import parse_overrides

    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as name:
        test = tiny.write_csv(Path(name) / "test.csv", tiny.sentences(args.rows, 9))
        flat = {
            "data.train": "", "data.test": str(test), "data.max-public-rows": 200,
            "distill.steps": 2, "align.interval": 1, "head.start": "zero", "head.end": "trained",
            "plug.method": "as-trained", "plug.refit": "none", "train.local-steps": args.steps,
            "federation.rounds": args.rounds, "federation.clients": 3,
            "federation.clients-per-round": 3, "federation.min-clients": 3,
            "run.evaluate-every": 1, "run.baselines": False, "run.gradient-rows": 0,
            "run.threads": 1, **parse_overrides(" ".join(args.keys)),
        }  # fmt: skip
        for turn, lag in enumerate(map(int, args.order.split(","))):
            found[lag] += deployed(Path(name) / f"{turn}-{lag}", flat | {"align.lag": lag})
    print("| `align.lag` | rounds | a round, s | the server's work on one, s | the exchange, s |")
    print("|--:|--:|--:|--:|--:|")
    for lag, rounds in found.items():
        cells = [statistics.median(r[key] for r in rounds) for key in ("round", "work", "exchange")]
        print(f"| {lag} | {len(rounds)} | " + " | ".join(f"{c:.1f}" for c in cells) + " |")
    each = [statistics.median(r["round"] for r in rounds) for rounds in found.values()]
    ends = [[r["round"] for r in rounds] for rounds in found.values()]
    spread = [f"{min(s):.1f} to {max(s):.1f}" for s in ends]
    print(f"\nratio {each[1] / each[0]:.2f} (rounds took {spread[0]} and {spread[1]} s; "
          f"load {os.getloadavg()[0]:.1f})")  # fmt: skip


if __name__ == "__main__":
    main()
