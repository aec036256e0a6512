"""The quantities of the one-shot theory, measured: update size, smoothness, bound and real gap.

`python benchmarks/one_shot_theory.py TRAIN TEST [--steps 60] [--clients 5] [--rounds 10]
[--partition iid] [--alpha 0.1] [--seed 0]` prints a Markdown table.

Wang et al. (arXiv:2412.04650, section 4) bound the distance between the adapter that one round
gives and that of T rounds by L * tau * T * k * m * |w0|: L is the smoothness of the loss, tau the
size of an update relative to the weights w0, T * k the steps of a client, m the clients. All norms
here are over what is trained. L is the largest of |grad(a) - grad(b)| / |a - b| over neighbouring
points of the path that one-shot and rounds take (start, clients' adapters, merges), on the clients'
rows; as an estimate along a path it is no more than the true one. w0 is the sub-FM's weights
that LoRA changes, with the head.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import exposure
from membership import settings

from fedpft_core.data.batches import batches
from fedpft_core.train.gradient import adapter_gradient


@dataclass(frozen=True)
class Theory:
    """What one run and its twin come to.

    Attributes:
        tau: largest change of a client's adapter, relative to `size`.
        smoothness: L along the path.
        size: |w0|.
        bound: L * tau * T * k * m * |w0|.
        stepped: the same times the learning rate, since k steps move by k times the rate.
        gap: distance of the two final adapters.
        share: `gap` relative to how far the twin moved in all.
        losses: mean training loss over all clients' rows, by when it is measured.
    """

    tau: float
    smoothness: float
    size: float
    bound: float
    stepped: float
    gap: float
    share: float
    losses: Mapping[str, float]


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """L2 distance of two adapters over all their values."""
    return float(sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)) ** 0.5


def smoothness(seen: exposure.Exposed, path: Sequence[Mapping[str, Tensor]], rows: int) -> float:
    """The largest change of the gradient for a change of the adapter, between neighbours.

    Args:
        seen: sub-FM, task and rows.
        path: adapters in the order in which a run came by them, at least two.
        rows: of each client's, that gradients are of.

    Returns:
        L of the mean loss over those rows.
    """
    served = [
        batch for r in seen.rows.values()
        for batch in batches(r.train.select(np.arange(min(rows, len(r.train)))), 16, None)
    ]  # fmt: skip
    gradients = [
        adapter_gradient(seen.put(dict(a)), seen.task, served, seen.model.plan) for a in path
    ]
    found = [0.0]
    for i in range(len(path) - 1):
        moved = distance(path[i], path[i + 1])
        if moved > 0:
            found.append(distance(gradients[i], gradients[i + 1]) / moved)
    return max(found)


def training_loss(seen: exposure.Exposed, adapter: Mapping[str, Tensor], rows: int) -> float:
    """The mean loss over the first rows of every client."""
    model = seen.put(dict(adapter))
    return float(np.mean([
        exposure.row_losses(
            model, seen.task, r.train.select(np.arange(min(rows, len(r.train))))
        ).mean()
        for r in seen.rows.values()
    ]))  # fmt: skip


def weight_norm(seen: exposure.Exposed) -> float:
    """|w0|: the weights that LoRA changes, and the head that training began with."""
    layers = [m for m in seen.model.model.modules() if hasattr(m, "lora_A")]
    squares = sum(float(m.base_layer.weight.double().square().sum()) for m in layers)
    head = (t for k, t in seen.start.items() if ".lora_" not in k)
    return (squares + sum(float(t.double().square().sum()) for t in head)) ** 0.5


def compare(
    shot: exposure.Exposed, twin: exposure.Exposed, steps: int, lr: float, rows: int = 32
) -> Theory:
    """Measure the theory's quantities on a one-shot run and its twin of several rounds.

    Args:
        shot: the run of one round.
        twin: the run of T rounds from the same start.
        steps: T * k, the steps of each client in either.
        lr: the learning rate of the first step.
        rows: of each client's, that losses and gradients are of.

    Returns:
        The quantities.

    Raises:
        ValueError: the two did not start from the same adapter.
    """
    if distance(shot.start, twin.start):
        raise ValueError("the two runs start from different adapters")
    clients = len(shot.rows)
    size = weight_norm(shot)
    far = max(distance(u.got, shot.start) for u in shot.updates)
    first = [u.got for u in shot.updates][:3]
    merges = [twin.start, *_merges(twin)]
    found = max(
        smoothness(shot, merges, rows),
        *(smoothness(shot, [shot.start, a, shot.final], rows) for a in first),
    )
    gap = distance(shot.final, twin.final)
    bound = found * far * steps * clients
    alone = {
        u.client: exposure.row_losses(
            shot.put(u.got), shot.task,
            shot.rows[u.client].train.select(np.arange(min(rows, len(shot.rows[u.client].train)))),
        ).mean()
        for u in shot.updates
    }  # fmt: skip
    return Theory(
        far / size, found, size, bound, lr * bound, gap,
        gap / max(distance(twin.final, twin.start), 1e-12),
        {
            "before": training_loss(shot, shot.start, rows),
            "own, before the merge": float(np.mean(list(alone.values()))),
            "one-shot, after the merge": training_loss(shot, shot.final, rows),
            "rounds, after the last": training_loss(shot, twin.final, rows),
        },
    )  # fmt: skip


def _merges(twin: exposure.Exposed) -> list[Mapping[str, Tensor]]:
    """The adapters that the rounds began with, and the last one."""
    starts = {u.round: u.sent for u in twin.updates}
    return [*(starts[r] for r in sorted(starts)[1:]), twin.final]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1.6e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # At float32, so that nothing of the gap is rounding.
        exact = {"wire.adapter": "fp32"}
        shot = exposure.federate(settings(args, 1) | exact, Path(folder) / "shot")
        twin = exposure.federate(settings(args, args.rounds) | exact, Path(folder) / "twin")
        found = compare(shot, twin, args.steps, args.lr)
    print("| quantity | value |\n|---|--:|")
    for name, value in (
        ("update size tau", f"{found.tau:.2e}"), ("smoothness L", f"{found.smoothness:.3g}"),
        ("weights |w0|", f"{found.size:.4g}"), ("steps T k", args.steps),
        ("clients m", args.clients), ("bound L tau T k m |w0|", f"{found.bound:.4g}"),
        ("bound times the learning rate", f"{found.stepped:.4g}"),
        (f"gap between one round and {args.rounds}", f"{found.gap:.4g}"),
        ("gap relative to what the rounds moved", f"{found.share:.2f}"),
        *((f"training loss, {name}", f"{loss:.3f}") for name, loss in found.losses.items()),
    ):  # fmt: skip
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
