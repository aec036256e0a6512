"""What a client's step takes at each width: seconds against FLOPs, peak memory against the formula.

A package of each width is made of one FM, and a process for each does what a client does with it:
unpacks it, builds the model, trains some steps on rows of full length. Prints a Markdown table.

    python benchmarks/widths.py [--widths 0.125,0.25,0.5,1] [--batch 8] [--steps 12] [-c KEY=VALUE]
    python benchmarks/widths.py --distil [--widths 0.125,0.25,0.5] [-c KEY=VALUE]

With `--distil`: the mean output error of each width after distillation of all together (`joint`)
or of each alone (`apart`), and the cosine of its gradients with the FM's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def client(path: str, batch: int, steps: int) -> dict[str, float]:
    """What a process takes to train on a package; without one, what its imports take."""
    import torch

    import client_app.app  # noqa: F401  # what a client's process imports
    from client_app.check.step import full_rows
    from fedpft_core.model.families import family_of
    from fedpft_core.proxy.package import rebuild
    from fedpft_core.train.tune import LocalSettings, fine_tune
    from fedpft_core.wire.package import Package

    torch.set_num_threads(1)
    found = {"imports": _peak()}
    if path:
        data = Path(path).read_bytes()
        package = Package.from_bytes(data)
        package.digest()
        made = rebuild(package)
        meta = package.meta
        shape = family_of(meta.plan.model_type).shape(meta.model_config)
        rows = full_rows(made.task, shape, meta.max_length, batch)
        one = LocalSettings(1e-4, batch, 1, 2, 0.0, 1.0, 1)
        fine_tune(made.model, made.task, rows, one, 0)
        start = time.process_time()
        fine_tune(made.model, made.task, rows, replace(one, steps=steps), 1)
        found["step"] = (time.process_time() - start) / steps
    found["peak"] = _peak()
    return found


def _peak() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def in_process(path: str, batch: int, steps: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--client", path, "--batch", f"{batch}",
               "--steps", f"{steps}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def distil(flat: dict[str, Any]) -> None:
    """Distil all widths together and each alone, and print what it comes to."""
    from fedpft_core import config as configs
    from fedpft_core.train.agreement import gradient_agreement
    from server_app.phases import distil as phase
    from server_app.phases.load import load
    from server_app.run.events import EventLog

    print("| distill.widths | width | output error before | after | cosine | all widths, s |")
    print("|---|---|--:|--:|--:|--:|")
    for how in ("joint", "apart"):
        log = EventLog(None)
        bench = load(configs.from_flat(flat | {"distill.widths": how}), log)
        before = {w.name: _error(bench, w) for w in bench.models.widths}
        start = time.process_time()
        phase.distil(bench)
        seconds = time.process_time() - start
        for w in bench.models.widths:
            found = gradient_agreement(
                bench.models.fm, w.proxy, w.plan, bench.rows.task, bench.rows.gradient, 16, True
            )
            print(f"| {how} | {w.name} | {before[w.name]:.3f} | {_error(bench, w):.3f} | "
                  f"{found['cosine']:.3f} | {seconds:.0f} |", flush=True)  # fmt: skip


def _error(bench: Any, width: Any) -> float:
    from fedpft_core.align.losses import output_error

    found = output_error(bench.models.fm, width.proxy, width.plan, bench.rows.probe())
    return sum(found.values()) / len(found)


def main() -> None:
    """Make the packages, measure each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="0.125,0.25,0.5,1")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--client", metavar="PACKAGE", help=argparse.SUPPRESS)
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if args.client is not None:
        print(json.dumps(client(args.client, args.batch, args.steps)))
        return
    if args.distil:
        from fedpft_core.config import parse_overrides

        flat = {"plan.widths": args.widths, "plan.retained-layers": "", "run.threads": 1}
        distil(flat | parse_overrides(" ".join(args.keys)))
        return
    from fedpft_core import config as configs
    from fedpft_core.adapter import lora as adapters
    from fedpft_core.model import load as models
    from fedpft_core.proxy import cost, memory
    from fedpft_core.proxy.build import build
    from fedpft_core.proxy.nested import make_plans
    from fedpft_core.proxy.package import make_package
    from fedpft_core.task import make

    flat = {"plan.widths": args.widths, "plan.retained-layers": ""}
    config = configs.from_flat(flat | configs.parse_overrides(" ".join(args.keys)))
    task = make("text", ("a", "b", "c", "d", "e", "f"))
    loaded = models.load(config.model, task.model(), 0)
    plans = make_plans(loaded.model, config.plan, 0)
    base = in_process("", args.batch, args.steps)["peak"]
    print(f"{config.model.name}, rows of {config.data.max_length} tokens, {args.batch} a step; "
          f"imports alone {base / 1e6:.0f} MB\n")  # fmt: skip
    heads = ("width", "parameters", "package, MB", "step, s", "by FLOPs, s", "memory, MB",
             "by formula, MB")  # fmt: skip
    print(f"| {' | '.join(heads)} |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans.items():
            proxy = build(loaded.model, plan)
            spec = adapters.make_spec(loaded.family, plan, loaded.fresh, config.lora)
            package = make_package(
                proxy, plan, spec, loaded.processor, "text", task.labels, config.data.max_length
            )
            path = Path(folder) / "package"
            path.write_bytes(package.to_bytes())
            a, b = cost.step_flops(loaded.family, proxy, config.lora.rank)
            flops = (a + b * config.data.max_length) * config.data.max_length * args.batch
            found = in_process(str(path), args.batch, args.steps)
            formula = memory.training_bytes(package, args.batch) - memory.BASE_BYTES
            rows.append((name, package, path.stat().st_size, found, flops, formula))
    rate = rows[-1][4] / rows[-1][3]["step"]
    for name, package, size, found, flops, formula in rows:
        count = sum(t.numel() for t in package.weights.values())
        print(
            f"| {name} | {count:,} | {size / 1e6:.1f} | {found['step']:.3f} | {flops / rate:.3f} | "
            f"{(found['peak'] - base) / 1e6:.0f} | {formula / 1e6:.0f} |"
        )
    print("\nMemory is beyond the imports'; FLOPs are scaled by the widest's step.")


if __name__ == "__main__":
    main()
