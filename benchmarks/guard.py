"""Whom head.guard leaves out, and what the head of class statistics has of it.

`python benchmarks/guard.py TRAIN TEST [--rows N] [--seeds N]` reads the rows with the FM as it is
loaded, shares them out among 20 clients, gives four of them class C - 1 - c for class c, and prints
a Markdown table: the test accuracy of the head from all sums, from those that the guard keeps, and
from the honest clients' alone, with attackers and without. N of the validation rows judge (half of
them by default). A seed draws the shares, the attackers and the rows that judge.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedpft_core import config
from fedpft_core.head import discriminant
from fedpft_core.head.closed import Classes
from fedpft_core.head.guard import judge
from fedpft_core.head.refit import labelled_features
from fedpft_core.head.statistics import Statistics, add
from server_app.phases.load import load
from server_app.run.events import EventLog

CLIENTS, ATTACKERS = 20, 4
SHARES = ("IID", "two shards a client", "Dirichlet 0.5")
Rows = tuple[Tensor, Tensor]


def rows_of(train: str, test: str) -> dict[str, Rows]:
    """Features and labels of all rows, by split, under the FM before any tuning."""
    flat = {
        "data.train": train, "data.test": test, "data.max-public-rows": 500,
        "distill.method": "none", "run.threads": 1,
    }  # fmt: skip
    bench = load(config.from_flat(flat), EventLog(None))
    data, task = bench.rows.data, bench.rows.task
    return {
        name: labelled_features(bench.models.fm, bench.rows.encode(rows), 64, task)
        for name, rows in (("train", data.train), ("validation", data.validation),
                           ("test", data.test))
    }  # fmt: skip


def owners(labels: np.ndarray, scheme: str, seed: int) -> np.ndarray:
    """The client of each row."""
    rng, n = np.random.default_rng(seed), len(labels)
    if scheme == "IID":
        return rng.integers(CLIENTS, size=n)
    found = np.empty(n, int)
    if scheme == "two shards a client":
        shards = rng.permutation(2 * CLIENTS) % CLIENTS
        found[np.argsort(labels, kind="stable")] = shards[np.arange(n) * 2 * CLIENTS // n]
        return found
    for c in np.unique(labels):
        mine = np.flatnonzero(labels == c)
        found[mine] = rng.choice(CLIENTS, size=len(mine), p=rng.dirichlet([0.5] * CLIENTS))
    return found


def once(data: dict[str, Rows], scheme: str, seed: int, count: int, hostile: int) -> list[float]:
    """One setting.

    Returns:
        Accuracies of the three heads, attackers and honest clients left out, and seconds.
    """
    (x, y), (v, w), (t, u) = data["train"], data["validation"], data["test"]
    classes = int(y.max()) + 1
    rng = np.random.default_rng(100 + seed)
    judges = rng.permutation(len(w))[:count]
    v, w = v[judges], w[judges]
    bad = {f"{k:02d}" for k in rng.choice(CLIENTS, hostile, replace=False)}
    owner = owners(y.numpy(), scheme, seed)
    parts = {}
    for k in range(CLIENTS):
        name, mine = f"{k:02d}", y[owner == k]
        labels = classes - 1 - mine if name in bad else mine
        parts[name] = Statistics.of(x[owner == k], labels, classes)
    start = time.perf_counter()
    found = judge(Classes(classes), parts, None, v, w, ATTACKERS)
    seconds = time.perf_counter() - start
    out = {absent.client for absent in found.left_out}

    def accuracy(without: set[str]) -> float:
        sums = add(parts[name] for name in sorted(parts) if name not in without)
        scores = discriminant.scores(discriminant.fitted(sums, v, w), t)
        return 100 * float((scores.argmax(1) == u).double().mean())

    return [accuracy(set()), accuracy(out), accuracy(bad), len(out & bad), len(out - bad), seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("train", help="training rows, a file as of data.train")
    parser.add_argument("test", help="test rows")
    parser.add_argument("--rows", type=int, default=0, help="rows that judge; 0 = half of them")
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    data = rows_of(args.train, args.test)
    count = args.rows or min(512, (len(data["validation"][1]) + 1) // 2)
    print(f"{count} rows judge; {args.seeds} seeds\n")
    print("| clients | attackers | all sums | with the guard | honest clients only | attackers out "
          "| honest ones out | seconds |")  # fmt: skip
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for hostile in (ATTACKERS, 0):
        for scheme in SHARES:
            got = [once(data, scheme, seed, count, hostile) for seed in range(args.seeds)]
            every = list(zip(*got, strict=True))
            means = " | ".join(f"{statistics.mean(column):.1f}" for column in every[:3])
            left = f"{sum(every[3]):.0f} of {hostile * args.seeds} | {sum(every[4]):.0f}"
            seconds = statistics.mean(every[5])
            print(f"| {scheme} | {hostile} | {means} | {left} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
