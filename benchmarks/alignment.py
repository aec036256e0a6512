"""Which alignment brings proxy and FM together for the least compute, at the start and at a tuned
adapter.

`python benchmarks/alignment.py TRAIN TEST [--out FILE] [--seed N] [--only NAME]` prints two
Markdown tables. Rows found in FILE (JSON lines, a folder for each seed) are not computed again;
NAME ("before sgd *") may be repeated.
Seconds are processor time of the alignment alone, one thread. The tuned adapter is the last of a
federation on the sub-FM distilled as in the paper, so every row is measured at the same place.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from client_app.node import client_for
from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.align import method as alignment
from fedpft_core.align import selection
from fedpft_core.align.blocks import moving_parts
from fedpft_core.align.losses import output_error
from fedpft_core.data.stream import public_batches
from fedpft_core.train import agreement as measure
from fedpft_core.train.evaluate import evaluate
from fedpft_core.train.inactivity import apoz, count_inactive
from server_app.app import run
from server_app.bench import public_stream
from server_app.phases.load import load
from server_app.run.events import EventLog
from server_app.transport import LocalTransport

BASE: dict[str, Any] = {
    "federation.partition": "iid",
    "federation.clients": 20,
    "federation.clients-per-round": 5,
    "federation.rounds": 8,
    "train.batch-size": 16,
    "train.local-steps": 16,
    "distill.steps": 100,
    "align.interval": 0,
    "distill.batch-size": 16,
    "distill.length": 64,
    "distill.fit-batches": 40,
    "distill.ridge": 1e-3,
    "run.threads": 1,
    "run.baselines": False,
    "run.undistilled": False,
    "run.evaluate-every": 100,
    "run.gradient-rows": 128,
    "plug.refit": "none",
}
# name: method, optimiser steps, keys of distill
BEFORE: dict[str, tuple[str, int, dict[str, Any]]] = {
    "none": ("none", 0, {}),
    "sgd 25": ("sgd", 25, {}),
    "sgd 100 (paper)": ("sgd", 100, {}),
    "sgd 100, adapter noise": ("sgd", 100, {"adapter_noise": -1.0}),
    "closed-form, 10 batches": ("closed-form", 1, {"fit_batches": 10}),
    "closed-form, 40 batches": ("closed-form", 1, {}),
    "closed-form, 10 batches, ridge 0.1": (
        "closed-form",
        1,
        {"fit_batches": 10, "ridge": 0.1},
    ),
    "closed-form, 10 batches, ridge 1": ("closed-form", 1, {"fit_batches": 10, "ridge": 1.0}),
    "closed-form, 10 batches, ridge 10": ("closed-form", 1, {"fit_batches": 10, "ridge": 10.0}),
    "sequential, 10 batches": ("sequential", 1, {"fit_batches": 10}),
    "sequential, 10 batches, ridge 1": ("sequential", 1, {"fit_batches": 10, "ridge": 1.0}),
    "block-local 25": ("block-local", 25, {}),
    "block-local 25, lr 2.4e-3": ("block-local", 25, {"lr": 2.4e-3}),
    "sgd 25, lr 2.4e-3": ("sgd", 25, {"lr": 2.4e-3}),
    "sgd 100, 4 x 32": ("sgd", 100, {"batch_size": 4, "length": 32}),
    "sgd 50, 4 x 32": ("sgd", 50, {"batch_size": 4, "length": 32}),
    "sgd 50, 4 x 32, lr 1.2e-3": ("sgd", 50, {"batch_size": 4, "length": 32, "lr": 1.2e-3}),
    "sgd 50, 8 x 32": ("sgd", 50, {"batch_size": 8, "length": 32}),
    "sgd 25, 8 x 32, lr 1.2e-3": ("sgd", 25, {"batch_size": 8, "length": 32, "lr": 1.2e-3}),
    "sgd 100, 2 x 32": ("sgd", 100, {"batch_size": 2, "length": 32}),
    "block-local 100": ("block-local", 100, {}),
    "closed-form + block-local 50": ("closed-form+block-local", 50, {"fit_batches": 10}),
    "closed-form + sgd 25": ("closed-form+sgd", 25, {"fit_batches": 10}),
    "gradient 25": ("gradient", 25, {}),
    "gradient 25, weight 0.1": ("gradient", 25, {"gradient_weight": 0.1}),
    "gradient 25, adapter noise": ("gradient", 25, {"adapter_noise": -1.0}),
}
# name: method, steps, keys of distill, selection, proportion; all from the proxy of sgd 100
DURING: dict[str, tuple[str, int, dict[str, Any], str, float]] = {
    "none": ("none", 0, {}, "random", 1.0),
    "sgd 20, all neurons": ("sgd", 20, {}, "random", 1.0),
    "sgd 20, half: apoz (paper)": ("sgd", 20, {}, "apoz", 0.5),
    "sgd 20, half: active": ("sgd", 20, {}, "active", 0.5),
    "sgd 20, half: discrepancy": ("sgd", 20, {}, "discrepancy", 0.5),
    "sgd 20, half: random": ("sgd", 20, {}, "random", 0.5),
    "sgd 20, all, adapter noise": ("sgd", 20, {"adapter_noise": -1.0}, "random", 1.0),
    "closed-form, 10 batches": ("closed-form", 1, {"fit_batches": 10}, "random", 1.0),
    "closed-form, 10 batches, ridge 1": (
        "closed-form",
        1,
        {"fit_batches": 10, "ridge": 1.0},
        "random",
        1.0,
    ),
    "sequential, 10 batches": ("sequential", 1, {"fit_batches": 10}, "random", 1.0),
    "sequential, 10 batches, ridge 1": (
        "sequential",
        1,
        {"fit_batches": 10, "ridge": 1.0},
        "random",
        1.0,
    ),
    "block-local 40": ("block-local", 40, {}, "random", 1.0),
    "gradient 20": ("gradient", 20, {}, "random", 1.0),
    "gradient 20, weight 0.1": ("gradient", 20, {"gradient_weight": 0.1}, "random", 1.0),
}


class Study:
    """MiniLM, its sub-FM and a tuned adapter."""

    def __init__(self, train: str, test: str, seed: int, work: Path) -> None:
        flat = BASE | {"data.train": train, "data.test": test, "run.dir": str(work / "run")}
        flat["run.seed"] = seed
        self.config = config.from_flat(flat)
        if not (work / "run" / "adapter").exists():
            clients = {
                i + 1: client_for({"partition-id": i, "num-partitions": 20}, flat).handle
                for i in range(20)
            }
            run(self.config, LocalTransport(clients), EventLog(work / "run" / "events.jsonl"))
        stored = load_file(work / "run" / "adapter" / "adapter_model.safetensors")
        self.tuned = {k.removeprefix("base_model.model."): v for k, v in stored.items()}
        self.bench = load(self.config, EventLog(None))
        self.models, self.data = self.bench.models, self.bench.rows
        b = self.models
        self.parts = moving_parts(b.proxy, b.plan)
        self.pruned = self.weights()
        self.rows = self.data.task.encode(
            self.data.data.validation, self.data.processor, self.config.data.max_length
        )
        factors = [t for k, t in self.tuned.items() if k.endswith("lora_B.weight")]
        self.size = float(torch.cat([t.flatten() for t in factors]).std())
        self.paper = work / "paper.safetensors"

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"{b}/{k}": p.detach().clone() for (b, k), p in self.parts.items()}

    @torch.no_grad()
    def put(self, weights: dict[str, torch.Tensor]) -> None:
        for (b, k), p in self.parts.items():
            p.copy_(weights[f"{b}/{k}"])

    def align(self, method: str, steps: int, keys: dict[str, Any], chosen: Any = None) -> float:
        """Align at the adapter now plugged in; returns seconds of processor time."""
        from dataclasses import replace

        if method == "none":
            return 0.0
        if keys.get("adapter_noise") == -1.0:
            keys = keys | {"adapter_noise": self.size}
        b, d = self.models, replace(self.config.distill, **keys)
        shaped = replace(self.config, distill=d)

        def rows(n: int) -> Iterator[Any]:
            return public_stream(
                shaped, self.data.public, self.data.processor, n, "study", str(chosen is None)
            )

        job = alignment.Job(
            b.fm, b.proxy, b.plan, rows, d,
            steps=steps, lr=d.lr, alpha=d.alpha if chosen is None else 0.0, chosen=chosen,
            seed=self.config.run.seed + 1,
        )  # fmt: skip
        start = time.process_time()
        alignment.run(method, job)
        return time.process_time() - start

    def measured(self, b_only: bool) -> dict[str, float]:
        """Agreement and output error at the adapter now plugged in."""
        b, data = self.models, self.data
        found = measure.gradient_agreement(
            b.fm, b.proxy, b.plan, data.task, data.gradient, 16, b_only=b_only
        )
        probe = public_batches(data.public, data.processor, 16, 64, 4, seed=999)
        error = output_error(b.fm, b.proxy, b.plan, probe)
        return {
            "cosine": found["cosine"],
            "l2": found["relative_l2"],
            "error": sum(error.values()) / len(error),
        }

    def scores(self) -> dict[str, float]:
        b, task = self.models, self.data.task
        found = {n: evaluate(m, task, self.rows, 64) for n, m in (("proxy", b.proxy), ("fm", b.fm))}
        out = {f"{n}_accuracy": s.value for n, s in found.items()}
        return out | {f"{n}_loss": s.loss for n, s in found.items()}

    def before(self, name: str) -> dict[str, Any]:
        """Align at the start; agreement there and at the tuned adapter."""
        self.put(self.pruned)
        self.models.plug(self.models.start)
        seconds = self.align(*BEFORE[name])
        start = self.measured(b_only=True)
        if name.endswith("(paper)"):
            save_file(self.weights(), self.paper)
        self.models.plug(self.tuned)
        return {"seconds": seconds, "start": start, "tuned": self.measured(False)} | self.scores()

    def during(self, name: str) -> dict[str, Any]:
        """Re-align the paper's sub-FM at the tuned adapter."""
        method, steps, keys, choice, share = DURING[name]
        b = self.models
        self.put(load_file(self.paper))
        b.plug(self.tuned)
        rates = {}
        if selection.needs_counts(choice, share):
            counts = count_inactive(b.proxy, b.plan, self.data.gradient, 16, "nonpositive")
            rates = {k: apoz(counts.inactive[k], counts.tokens[k]) for k in counts.tokens}
        view = selection.View(
            rates, 3, b.fm, b.proxy, b.plan, lambda: self.data.public_batches(4, "choose")
        )
        start = time.process_time()
        chosen = selection.choose(choice, view, share)
        seconds = time.process_time() - start + self.align(method, steps, keys, chosen)
        return {"seconds": seconds, "tuned": self.measured(False)} | self.scores()


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Both tables as Markdown."""
    yield "| before FL | CPU s | start: cos | rel. L2 | error | tuned: cos | rel. L2 | error |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in rows:
        if r["kind"] == "before":
            s, t = r["start"], r["tuned"]
            yield (
                f"| {r['name']} | {r['seconds']:.1f} | {s['cosine']:.3f} | {s['l2']:.2f} | "
                f"{s['error']:.3f} | {t['cosine']:.3f} | {t['l2']:.2f} | {t['error']:.3f} |"
            )
    yield ""
    yield "| at the tuned adapter | CPU s | cos | rel. L2 | error | proxy acc. | FM acc. |"
    yield "|---|---|---|---|---|---|---|"
    for r in rows:
        if r["kind"] == "during":
            t = r["tuned"]
            yield (
                f"| {r['name']} | {r['seconds']:.1f} | {t['cosine']:.3f} | {t['l2']:.2f} | "
                f"{t['error']:.3f} | {100 * r['proxy_accuracy']:.1f} | "
                f"{100 * r['fm_accuracy']:.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.out.parent if args.out else Path(tempfile.mkdtemp())
    out = args.out or work / "rows.jsonl"
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    study = Study(args.train, args.test, args.seed, work)
    print(f"std of B in the tuned adapter {study.size:.4f}, norm {adapters.norm(study.tuned):.2f}")
    for kind, names, work_of in (
        ("before", BEFORE, study.before), ("during", DURING, study.during),
    ):  # fmt: skip
        for name in names:
            if any((r["kind"], r["name"]) == (kind, name) for r in done):
                continue
            if args.only and not any(fnmatchcase(f"{kind} {name}", p) for p in args.only):
                continue
            row = {"kind": kind, "name": name, "size": study.size} | work_of(name)
            done.append(row)
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    order = {("before", n): i for i, n in enumerate([*BEFORE])}
    order |= {("during", n): i for i, n in enumerate([*DURING])}
    print("\n".join(tables(sorted(done, key=lambda r: order[r["kind"], r["name"]]))))


if __name__ == "__main__":
    main()
