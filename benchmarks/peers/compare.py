"""fedpft beside a plain Flower + PEFT app: the same data, model, partitions, steps and machine.

Both run in simulation, one after the other, on a SuperLink of their own: `plain/` averages LoRA on
the whole model, `exchange` is this project with the whole model at the clients and nothing else
(no scoring on the way, no distillation), `fedpft` is the default with the sub-FM. Prints a
Markdown table: processor seconds of all processes, seconds, bytes, peak memory, accuracy.

    python benchmarks/peers/compare.py [--rounds N] [--clients N] [--only plain,exchange,fedpft]
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from fedpft_console import launch
from fedpft_core import config as configs
from server_app.run.events import read_events
from server_app.run.record import fold

HERE = Path(__file__).parent
# What `exchange` leaves out, so that it does what the plain app does.
BARE = {
    "plan.proxy": "full", "distill.method": "none", "align.interval": 0, "head.start": "zero",
    "head.end": "trained", "plug.method": "as-trained", "run.evaluate-every": 1000,
    "run.gradient-rows": 0, "run.baselines": False, "wire.adapter": "fp32",
}  # fmt: skip


Row = dict[str, Any]


class Sampler:
    """Processor seconds of everything this process has started, looked at while it lives."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, float], float] = {}
        self.next = 0.0

    def tick(self) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + 0.5
        for process in psutil.Process().children(recursive=True):
            try:
                key = process.pid, process.create_time()
                self.seconds[key] = sum(process.cpu_times()[:2])
            except psutil.Error:
                continue


def share_out(folder: Path, config: configs.Config) -> None:
    """The rows of each client and the test rows, as files that the plain app reads."""
    from client_app.node import partition_rows
    from fedpft_core.task import load_task

    data = load_task(config.data, config.run.seed)
    names = data.task.labels
    (folder / "labels.json").write_text(json.dumps(list(names)))
    count = config.federation.clients
    parts = {f"client-{i}": partition_rows(config, i, count) for i in range(count)}
    for name, rows in {**parts, "test": data.test}.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["text", "label"])
            for text, label in zip(rows.inputs, rows.labels, strict=True):
                lines.writerow([text, names[int(label)]])


def measured(
    folder: Path, flat: Mapping[str, Any], app: Path | None, options: str
) -> dict[str, Any]:
    sampler, start = Sampler(), time.perf_counter()
    folder.mkdir()
    result = launch.run_simulation(folder, flat, federation=options, app=app, tick=sampler.tick)
    if not result.completed:
        raise SystemExit(result.log.read_text()[-3000:])
    return {
        "processor seconds": f"{sum(sampler.seconds.values()):.0f}",
        "seconds": f"{time.perf_counter() - start:.0f}",
        "peak memory, MB, all processes": f"{result.peak_bytes / 1e6:,.0f}",
    }


def plain(folder: Path, config: configs.Config, options: str) -> Row:
    from fedpft_core.model.load import minilm_folder

    data = folder.with_suffix(".data")
    data.mkdir()
    share_out(data, config)
    out = folder.with_suffix(".json")
    flat = {
        "model": str(minilm_folder()), "data": str(data), "result": str(out),
        "rounds": config.federation.rounds, "seed": config.run.seed,
        "clients-per-round": config.federation.clients_per_round,
        "steps": config.train.local_steps, "batch-size": config.train.batch_size,
        "max-length": config.data.max_length, "rate": config.train.lr,
        "rank": config.lora.rank, "alpha": int(config.lora.alpha), "dropout": config.lora.dropout,
    }  # fmt: skip
    found = measured(folder, flat, HERE / "plain", options)
    told = json.loads(out.read_text())
    messages = 2 * config.federation.rounds * config.federation.clients_per_round
    sent = messages * told["adapter_bytes"] / 1e6
    lines = sum(
        bool(line.strip())
        for path in sorted((HERE / "plain").rglob("*"))
        if path.suffix in (".py", ".toml")
        for line in path.read_text().splitlines()
    )
    return found | {
        "MB sent": f"{sent:.1f}", "accuracy, %": f"{100 * told['accuracy']:.1f}",
        "lines a user writes": str(lines),
    }  # fmt: skip


def ours(
    folder: Path, config: configs.Config, options: str, more: dict[str, Any]
) -> dict[str, Any]:
    flat = configs.to_flat(config) | more | {"run.dir": str(folder)}
    found = measured(folder, configs.to_flat(configs.from_flat(flat)), None, options)
    record = fold(line for _, line in read_events(folder / "events.jsonl"))
    sent = sum(
        e["bytes"]
        for _, e in read_events(folder / "events.jsonl")
        if e["event"] == "bytes" and not e.get("arm")
    )
    product = next(r.fm for r in reversed(record.rounds) if r.fm)
    return found | {
        "MB sent": f"{sent / 1e6:.1f}", "accuracy, %": f"{100 * product.value:.1f}",
        "lines a user writes": "0",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--only", default="plain,exchange,fedpft")
    args = parser.parse_args()
    config = configs.from_flat({
        "federation.rounds": args.rounds, "federation.clients": args.clients,
        "federation.clients-per-round": args.clients, "run.baselines": False,
        "run.evaluate-every": 1000, "data.validation-share": 0.1,
    })  # fmt: skip
    f = config.federation
    options = launch.federation_config(
        f.clients, f.clients_per_round, config.train.threads, launch.cpu_count()
    )
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for which in args.only.split(","):
            folder = Path(name) / which
            if which == "plain":
                found[which] = plain(folder, config, options)
            else:
                found[which] = ours(folder, config, options, BARE if which == "exchange" else {})
            print(which, found[which], flush=True)
    print("\n| | " + " | ".join(found) + " |\n|---|" + "--:|" * len(found))
    for row in next(iter(found.values())):
        print(f"| {row} | " + " | ".join(found[w][row] for w in found) + " |")


if __name__ == "__main__":
    main()
