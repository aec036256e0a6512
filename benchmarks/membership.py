"""How well a server can tell from adapters which rows a client trained on.

`python benchmarks/membership.py TRAIN TEST [--steps 60] [--clients 5] [--rounds 1,2,5,10]
[--partition iid] [--alpha 0.1] [--seed 0]` prints a Markdown table: one-shot beside its twins of
several rounds, at the same steps of each client.

Each client keeps half of its rows from training; rows of both halves are the same kind, so an
attack that does not know more than chance has advantage 0. Two attacks score a row by how far the
model knows it: `loss` by its loss alone (Yeom et al., arXiv:1709.01604), `reference` by how much
lower it is than under the adapter that training began with (after Watson et al.,
arXiv:2111.08440). Against the updates of several rounds the scores are averaged over them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import exposure

from fedpft_core.data.encoded import Encoded
from fedpft_core.seeds import numpy_stream
from fedpft_core.task import Task


def advantage(members: Sequence[float], others: Sequence[float], seed: int = 0) -> float:
    """True less false positives of the best threshold on a score, which other rows have chosen.

    The rows are divided in two; each half is judged by the threshold that is best on the other.
    So scores that tell nothing have 0 in the mean, and not the best of many chances.

    Args:
        members: scores of rows that were trained on, the higher the surer.
        others: scores of rows that were not.
        seed: of the division.

    Returns:
        In [-1, 1]; 1 where the two never mix.

    Raises:
        ValueError: there are fewer than two of either.
    """
    inside, outside = np.asarray(members, np.float64), np.asarray(others, np.float64)
    if min(len(inside), len(outside)) < 2:
        raise ValueError("an attack is judged on at least two rows of either kind")
    stream = numpy_stream(seed, "membership")
    parts = [np.array_split(x[stream.permutation(len(x))], 2) for x in (inside, outside)]
    found = []
    for choose, judge in ((0, 1), (1, 0)):
        at = _threshold(parts[0][choose], parts[1][choose])
        found.append(float((parts[0][judge] > at).mean() - (parts[1][judge] > at).mean()))
    return float(np.mean(found))


def _threshold(inside: np.ndarray, outside: np.ndarray) -> float:
    """Where rows above are best taken for members: between two scores, or beyond all of them."""
    values = np.unique(np.concatenate([inside, outside]))
    cuts = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    above = [
        1 - np.searchsorted(np.sort(part), cuts, side="right") / len(part)
        for part in (inside, outside)
    ]
    return float(cuts[int(np.argmax(above[0] - above[1]))])


def scores(
    seen: exposure.Exposed, adapters: Sequence[Mapping[str, torch.Tensor]], rows: Encoded
) -> dict[str, np.ndarray]:
    """What both attacks make of some rows, from one adapter or several.

    Args:
        seen: the sub-FM, and the adapter that training began with.
        adapters: what the attacker has.
        rows: labelled rows.

    Returns:
        float64 [rows] by attack, the higher the surer.
    """
    task: Task = seen.task
    losses = np.stack([
        exposure.row_losses(seen.put(dict(a)), task, rows) for a in adapters
    ])  # fmt: skip
    before = exposure.row_losses(seen.put(seen.start), task, rows)
    return {"loss": -losses.mean(0), "reference": (before - losses).mean(0)}


def attack(seen: exposure.Exposed, most: int = 100) -> dict[str, dict[str, float]]:
    """The advantage of both attacks, by what the attacker has, in the mean over clients.

    Args:
        seen: a run in which clients kept rows from training.
        most: rows of either kind for each client.

    Returns:
        By `merged` (the last adapter of all) and `updates` (all that the client sent), the
        advantage by attack; `updates` also has how many there were of a client as `count`.
    """
    found: dict[str, dict[str, list[float]]] = {"merged": {}, "updates": {}}
    for name, rows in seen.rows.items():
        n = min(len(rows.train), len(rows.validation), most)
        if n < 4:
            continue
        for view, had in (("merged", [seen.final]), ("updates", [u.got for u in seen.of(name)])):
            inside, outside = (
                scores(seen, had, part.select(np.arange(n)))
                for part in (rows.train, rows.validation)
            )
            for kind in inside:
                value = advantage(list(inside[kind]), list(outside[kind]))
                found[view].setdefault(kind, []).append(value)
            if view == "updates":
                found[view].setdefault("count", []).append(len(had))
    return {
        view: {kind: float(np.mean(values)) for kind, values in kinds.items()}
        for view, kinds in found.items()
    }


def settings(args: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """The configuration of one of the runs that are compared."""
    shot = rounds == 1
    return {
        "data.train": args.train, "data.test": args.test, "data.max-public-rows": 6000,
        "data.max-test-rows": 200,
        "plan.retained-layers": "", "plan.keep-share": 0.25, "align.interval": 0,
        "federation.clients": args.clients, "federation.clients-per-round": args.clients,
        "federation.schedule": "one-shot" if shot else "multi-round",
        "federation.rounds": rounds, "federation.partition": args.partition,
        "federation.dirichlet-alpha": args.alpha, "federation.merge-every": args.clients,
        "train.local-steps": args.steps // rounds, "train.batch-size": 8, "train.lr": args.lr,
        "train.local-decay": "linear" if shot else "none",
        "head.start": "statistics", "head.end": "trained", "plug.method": "as-trained",
        "run.baselines": False, "run.undistilled": False, "run.evaluate-every": 100,
        "run.gradient-rows": 0, "run.threads": 1, "run.seed": args.seed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", default="1,2,5,10")
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1.6e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| rounds | updates of a client | loss, merged | reference, merged | loss, updates | "
          "reference, updates |\n|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    for rounds in map(int, args.rounds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            seen = exposure.federate(settings(args, rounds), Path(folder) / "run", held_out=0.5)
            found = attack(seen)
        merged, updates = found["merged"], found["updates"]
        print(
            f"| {rounds} | {updates['count']:.0f} | {merged['loss']:.3f} | "
            f"{merged['reference']:.3f} | {updates['loss']:.3f} | {updates['reference']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
