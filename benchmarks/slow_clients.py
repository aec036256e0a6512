"""When there is a model to use, with clients of different speed: rounds, one-shot and async.

`python benchmarks/slow_clients.py [--clients 10] [--steps 60] [--rounds 10] [--spread 0.5,1.0]
[--seeds 20] [--latency 0]` prints a Markdown table of simulated seconds: a client of average speed
makes a step in one second (`federation.speed-spread`), and every message to a client and back takes
`latency` besides. Nothing is trained: who is when done follows from the speeds alone.

`first` is when there is an adapter that a client's training has gone into, `half` when half of all
steps have, `all` when all have; in rounds and in async that is after a merge. In async there are as
many steps in all, but fast clients make more of them: its last adapter has seen less of the slow.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedpft_core import config as configs
from fedpft_core.data.partition import client_names
from server_app.rounds.nodes import Node
from server_app.schedule.flight import duration


@dataclass(frozen=True)
class Times:
    """Simulated seconds until some of the clients' steps are in a usable adapter."""

    first: float
    half: float
    all: float


def speeds(clients: int, spread: float, seed: int) -> list[float]:
    """Seconds that a step takes each client, as the async schedule draws them."""
    keys = {
        "federation.clients": clients, "federation.clients-per-round": clients,
        "federation.speed-spread": spread, "run.seed": seed, "train.local-steps": 1,
    }  # fmt: skip
    config = configs.from_flat(keys)
    return [duration(config, Node(i, name, 1)) for i, name in enumerate(client_names(clients))]


def in_rounds(speed: Sequence[float], steps: int, rounds: int, latency: float) -> Times:
    """Every round waits for the slowest client."""
    each = steps / rounds * max(speed) + latency
    return Times(each, each * -(-rounds // 2), each * rounds)


def one_shot(speed: Sequence[float], steps: int, latency: float) -> Times:
    """Each client makes all of its steps, and its reply is merged when it comes."""
    done = sorted(latency + steps * s for s in speed)
    return Times(done[0], done[-(-len(done) // 2) - 1], done[-1])


def asynchronous(
    speed: Sequence[float], steps: int, rounds: int, latency: float, buffer: int
) -> Times:
    """A client is asked anew after each merge that its reply is in, until all steps are made."""
    each = steps / rounds
    flying = [(latency + each * s, i) for i, s in enumerate(speed)]
    heapq.heapify(flying)
    waiting: list[int] = []
    merged, found, whole = 0, list[float](), len(speed) * rounds
    at = {1: 0.0, -(-whole // 2): 0.0, whole: 0.0}
    while merged < whole:
        now, client = heapq.heappop(flying)
        waiting.append(client)
        if len(waiting) < min(buffer, whole - merged):
            continue
        for point in [p for p in at if merged < p <= merged + len(waiting)]:
            at[point] = now
        merged += len(waiting)
        for i in waiting:
            heapq.heappush(flying, (now + latency + each * speed[i], i))
        waiting = []
        found.append(now)
    return Times(*(at[p] for p in sorted(at)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--spread", default="0.5,1.0")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--latency", type=float, default=0.0)
    args = parser.parse_args()
    print("| spread of speeds | schedule | first | half | all |\n|--:|---|--:|--:|--:|")
    for spread in map(float, args.spread.split(",")):
        found: dict[str, list[Times]] = {}
        for seed in range(args.seeds):
            speed = speeds(args.clients, spread, seed)
            half = -(-args.clients // 2)
            for name, times in (
                (f"{args.rounds} rounds", in_rounds(speed, args.steps, args.rounds, args.latency)),
                ("2 rounds", in_rounds(speed, args.steps, 2, args.latency)),
                ("one-shot", one_shot(speed, args.steps, args.latency)),
                ("async", asynchronous(speed, args.steps, args.rounds, args.latency, half)),
            ):
                found.setdefault(name, []).append(times)
        for name, rows in found.items():
            means = [np.mean([getattr(t, what) for t in rows]) for what in ("first", "half", "all")]
            print(f"| {spread:g} | {name} | " + " | ".join(f"{m:.0f}" for m in means) + " |")


if __name__ == "__main__":
    main()
