"""What a warm message costs a node beyond training, piece by piece.

In a deployment every message starts a new process. Here a node's data and store are prepared
once (MiniLM, the default plan, one client's built-in rows as a CSV file); then real Python
processes do what `flwr-clientapp` does with a training message: import Flower and the app, read
the message, answer it. Prints medians as a Markdown table.

    python benchmarks/warm.py [--repeats N] [--against CHECKOUT]   # processes by hand
    python benchmarks/warm.py --worker [--repeats N]               # the same with the node's worker
    python benchmarks/warm.py --real [--rounds N]                  # SuperLink and SuperNode

`--against` takes turns with another checkout of this repository, so that noise falls on both.
CPU seconds (user and system) are the steadier figure where other work shares the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN = {"data.train": "", "data.test": "unused.csv", "align.interval": 1}


# ------------------------------------------------------------------ one message, in a process


class Clock:
    """CPU seconds of named pieces."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._at
        self._at = now

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Replace a function by one that adds what it takes to `name`."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        setattr(owner, attribute, timed)


def child(folder: Path) -> None:
    """Answer the message kept in `folder`; print the pieces as JSON."""
    clock = Clock()
    # What flwr-clientapp imports before it looks at the app; not ours to change.
    import flwr.supernode.runtime.run_clientapp  # noqa: F401

    clock.lap("Flower")
    from client_app import app  # noqa: F401

    with contextlib.suppress(ImportError):  # an older checkout imports everything in `app`
        from client_app import answer  # noqa: F401

    clock.lap("imports of the app")
    # Counted apart from the model that needs them, whenever the code under test loads them.
    from transformers import BertForSequenceClassification  # noqa: F401

    clock.lap("imports of the app")
    from client_app import chain
    from client_app import client as module
    from client_app.node import client_for
    from client_app.store import Store
    from fedpft_core.wire import flower as wire

    record = wire.to_record(kept(folder))
    for owner, attribute, name in (
        (Store, "get", "read and verify the sub-FM"),
        (module, "rebuild", "build the model"),
        (module.Client, "_rows", "read and tokenise the rows"),
        (chain.adapters, "load", "load the adapter"),
        (chain, "fine_tune", "training"),
        (chain, "count_inactive", "count inactive neurons"),
    ):
        clock.around(owner, attribute, name)
    before = sum(clock.seconds.values())
    start = time.process_time()
    node = client_for(json.loads((folder / "node.json").read_text()), RUN)
    reply = node.handle(wire.from_record(record))
    wire.to_record(reply)
    spent = time.process_time() - start
    assert reply.kind == "train-reply", reply.head
    clock.seconds["the rest (message, reply)"] = spent - (sum(clock.seconds.values()) - before)
    print(json.dumps(clock.seconds))


def kept(folder: Path) -> Any:
    """The message that was prepared."""
    from fedpft_core.wire.envelope import Envelope

    saved = json.loads((folder / "message.json").read_text())
    parts = {p.name: p.read_bytes() for p in (folder / "parts").iterdir()}
    return Envelope("train", saved["head"], parts, saved["check"])


def asker(folder: Path) -> None:
    """Hand the message kept in `folder` to the node's worker, as the ClientApp does."""
    clock = Clock()
    import flwr.supernode.runtime.run_clientapp  # noqa: F401

    clock.lap("Flower's own imports")
    from client_app import app  # noqa: F401

    clock.lap("imports of the app")
    from client_app.warm.ask import ask
    from fedpft_core.wire import flower as wire
    from fedpft_core.wire.form import Envelope

    saved = json.loads((folder / "message.json").read_text())
    parts = {p.name: p.read_bytes() for p in (folder / "parts").iterdir()}
    record = wire.to_record(Envelope("train", saved["head"], parts, saved["check"]))
    node = json.loads((folder / "node.json").read_text())
    clock.lap("")
    reply = ask(node, RUN, wire.from_record(record))
    assert reply is not None and reply.kind == "train-reply", reply
    wire.to_record(reply)
    clock.lap("hand the message over, take the answer")
    clock.seconds.pop("")
    print(json.dumps(clock.seconds))


def training(folder: Path) -> None:
    """CPU seconds of training on the message kept in `folder`, everything being in memory."""
    from client_app import answer, chain

    clock = Clock()
    clock.around(chain, "fine_tune", "training")
    node = json.loads((folder / "node.json").read_text())
    node["cache-dir"] += "-alone"
    (folder / "cache").rename(node["cache-dir"])
    found = []
    for _ in range(5):
        clock.seconds.clear()
        reply = answer.answer(node, RUN, lambda: kept(folder))
        assert reply.kind == "train-reply", reply.head
        found.append(clock.seconds["training"])
    Path(node["cache-dir"]).rename(folder / "cache")
    print(json.dumps(statistics.median(found[1:])))


def with_worker(repeats: int, steps: int) -> None:
    """Messages handed to the worker: CPU seconds of both processes, beyond training."""
    import psutil

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(again(ROOT, "--prepare", name, "--steps", str(steps), "--no-counts").stdout)
        train = json.loads(again(ROOT, "--training", name).stdout.splitlines()[-1])
        found: list[dict[str, float]] = []
        worker: psutil.Process | None = None
        for turn in range(repeats + 2):
            used = sum(worker.cpu_times()[:2]) if worker else 0.0
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = again(ROOT, "--asker", name)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            pieces = json.loads(done.stdout.splitlines()[-1])
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            pieces["start and end of the process"] = cpu - sum(pieces.values())
            worker = worker or next(
                p for p in psutil.process_iter() if str(folder / "cache") in _words(p)
            )
            pieces["the worker, training left out"] = sum(worker.cpu_times()[:2]) - used - train
            pieces["**all of these**"] = sum(pieces.values())
            pieces["of these Flower's: its imports, start and end of a process"] = (
                pieces["Flower's own imports"] + pieces["start and end of the process"]
            )
            if turn > 1:  # the first starts the worker, the second is the first it is warm for
                found.append(pieces)
        assert worker is not None
        print(f"training {train:.2f} s, the worker holds {worker.memory_info().rss / 1e6:.0f} MB\n")
        worker.terminate()
    print("| CPU seconds | |\n|---|--:|")
    for key in found[0]:
        print(f"| {key} | {statistics.median(p[key] for p in found):.2f} |")


def _words(process: Any) -> list[str]:
    try:
        return list(process.cmdline())
    except Exception:
        return []


def again(checkout: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """This program in a new process, with the code of a checkout."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *args],
        env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done


def one(checkout: Path, folder: Path) -> dict[str, float]:
    """One warm message in a new process: CPU seconds by piece, and the whole."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = again(checkout, "--child", str(folder))
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    pieces: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    pieces["start and end of the process"] = cpu - sum(pieces.values())
    pieces["all but training, CPU"] = cpu - pieces["training"]
    pieces["wall clock, training included"] = wall
    return pieces


# ------------------------------------------------------------------ what is prepared once


def prepare(folder: Path, steps: int, counts: bool = True) -> None:
    """A node's data file, its configuration, and a training message for what it has in store."""
    from client_app.store import Store
    from fedpft_core import config
    from fedpft_core.adapter import lora as adapters
    from fedpft_core.data.partition import partition
    from fedpft_core.model import load as models
    from fedpft_core.proxy.build import build
    from fedpft_core.proxy.choose import make_plan
    from fedpft_core.proxy.package import make_package
    from fedpft_core.task import load_task
    from fedpft_core.train.tune import LocalSettings
    from fedpft_core.wire.envelope import seal
    from fedpft_core.wire.messages import TrainRequest

    cfg = config.Config()
    data = load_task(cfg.data, 0)
    task = data.task
    rows = data.train.select(partition(task.strata(data.train), 10, "dirichlet", 1.0, 0)[0])
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for text, label in zip(rows.inputs, rows.labels, strict=True):
            writer.writerow([text, task.labels[int(label)]])
    loaded = models.load(cfg.model, task.model(), 0)
    plan = make_plan(loaded.model, cfg.plan, 0)
    spec = adapters.make_spec(loaded.family, plan, loaded.fresh, cfg.lora)
    proxy = build(loaded.model, plan)
    package = make_package(
        proxy, plan, spec, loaded.processor, task.name, task.labels, cfg.data.max_length
    )
    digest = package.digest()
    Store(folder / "cache" / "store").put(digest, package)
    adapter = adapters.initial(adapters.attach(proxy, spec, plan), 0, plan)
    settings = LocalSettings(1e-3, cfg.train.batch_size, 1, steps, 0.0, 1.0, 1, 10.0)
    sealed = seal(
        TrainRequest(
            2, digest, adapter, "fp32", settings, 0, run="0" * 16,
            count_rule="nonpositive" if counts else "",
        )
    )  # fmt: skip
    (folder / "message.json").write_text(json.dumps({"head": sealed.head, "check": sealed.check}))
    (folder / "parts").mkdir()
    for name, data in sealed.parts.items():
        (folder / "parts" / name).write_bytes(data)
    node = {"name": "a", "data-path": str(folder / "rows.csv"), "cache-dir": str(folder / "cache")}
    (folder / "node.json").write_text(json.dumps(node))
    print(f"{len(rows)} rows, {steps} steps of {cfg.train.batch_size}")


def by_hand(repeats: int, against: Path | None, steps: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        checkouts = ([against] if against else []) + [ROOT]
        folders = {c: Path(name) / str(i) for i, c in enumerate(checkouts)}
        for checkout, folder in folders.items():
            folder.mkdir()
            done = again(checkout, "--prepare", str(folder), "--steps", str(steps))
        print(done.stdout)
        found: dict[Path, list[dict[str, float]]] = {c: [] for c in checkouts}
        for turn in range(repeats + 1):
            for checkout in checkouts:
                pieces = one(checkout, folders[checkout])
                if turn:  # the first one warms the page cache and whatever the node keeps
                    found[checkout].append(pieces)
    medians = [
        {k: statistics.median(p[k] for p in found[c]) for k in found[c][0]} for c in checkouts
    ]
    head = ["before", "after"] if against else ["seconds"]
    print("| CPU seconds | " + " | ".join(head) + " |\n|---" + "|--:" * len(head) + "|")
    for key in medians[-1]:
        print(f"| {key} | " + " | ".join(f"{m.get(key, 0.0):.2f}" for m in medians) + " |")


# ------------------------------------------------------------------ real SuperLink and SuperNode


def real(rounds: int, checkout: Path) -> None:
    """Rounds of one SuperNode: seconds from sending to the reply, less those of training."""
    sys.path[:0] = [str(checkout), str(ROOT / "tests")]
    import flower

    flower.ROOT = checkout
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        again(checkout, "--prepare", str(folder))
        os.environ["PYTHONPATH"] = str(checkout)
        keys = {
            "data.train": "", "data.test": str(folder / "rows.csv"), "federation.rounds": rounds,
            "federation.clients": 1, "federation.clients-per-round": 1, "federation.min-clients": 1,
            "run.baselines": False, "run.undistilled": False, "distill.steps": 2,
            "run.gradient-rows": 0, "data.max-test-rows": 40, "data.max-public-rows": 200,
            "align.interval": 0,
        }  # fmt: skip
        with flower.deployment(folder / "net") as net:
            net.start_node("a", folder / "rows.csv", **{"cache-dir": str(folder / "cache")})
            config = flower.write_config(folder / "run.yaml", keys)
            process = net.run(folder / "run", config)
            if process.wait(1200):
                raise SystemExit(net.logs())
        replies = [e for e in flower.events(folder / "run") if e["event"] == "reply"]
        costs = [float(e["seconds"]) - float(e["train_seconds"]) for e in replies[1:]]  # type: ignore[arg-type]
        spread = ", ".join(f"{c:.1f}" for c in costs)
        print(f"real SuperNode, wall clock less training: {statistics.median(costs):.2f} s")
        print(f"({spread}; load {os.getloadavg()[0]:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    for name in ("--asker", "--training"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-counts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.asker:
        asker(args.asker)
    elif args.training:
        training(args.training)
    elif args.worker:
        with_worker(args.repeats, args.steps)
    elif args.child:
        child(args.child)
    elif args.prepare:
        prepare(args.prepare, args.steps, not args.no_counts)
    elif args.real:
        real(args.rounds, (args.against or ROOT).resolve())
    else:
        against = args.against.resolve() if args.against else None
        by_hand(args.repeats, against, args.steps)


if __name__ == "__main__":
    main()
