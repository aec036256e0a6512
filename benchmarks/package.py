"""Bytes of a sub-FM on its way: first contact, another task on the same FM, a steady round.

`python benchmarks/package.py` prints Markdown tables for the run that `fedpft run` makes when it is
given no configuration. What is counted is what is sent, with heads and safetensors headers, by the
server's own code to a node's own store on disk. The second task has other rows and other labels
(whether a built-in sentence is long); FM, public text and plan keys are the same, and its sub-FM is
pruned and distilled for itself. With `--second FILE.yaml` it is another one.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch

from client_app.fetch import fetch
from client_app.policy import Policy
from client_app.store import Store
from fedpft_core import config
from fedpft_core.task import load_task
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import NeedReply, TrainReply, TrainRequest
from server_app.delivery import Holds
from server_app.phases import distil, load
from server_app.rounds.nodes import Node
from server_app.state import State, fresh_state
from server_app.strategy import Strategy

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {"wire.package": "fp32"},
    "bf16": {"wire.package": "bf16"},
    "fp16": {"wire.package": "fp16"},
    "int8": {"wire.package": "int8"},
    "int8, embeddings int4": {"wire.package": "int8", "wire.embeddings": "int4"},
}
NODE = Node(1, "node-1", 478)
LONG = 60  # characters of a sentence that counts as long


class Silent:
    """A log that keeps nothing."""

    def emit(self, event: Any) -> None:
        """Take an event."""


def size(envelope: Envelope) -> int:
    """Bytes of a message as the ledger counts them."""
    return sum(envelope.sizes().values())


def other_task(folder: Path) -> dict[str, Any]:
    """Keys of a task of other rows and labels."""
    data = load_task(config.Config().data, 0)
    for part, rows in (("train", data.train), ("test", data.test)):
        with open(folder / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for text in rows.inputs[::2]:
                writer.writerow([text, "long" if len(str(text)) > LONG else "short"])
    return {"data.train": str(folder / "train.csv"), "data.test": str(folder / "test.csv")}


def server(keys: dict[str, Any]) -> tuple[config.Config, State, Strategy]:
    """A server with its sub-FM distilled, before round 1."""
    cfg = config.from_flat({"run.baselines": False, "wire.patch": "same", **keys})
    bench = load.load(cfg, Silent())
    distil.distil(bench)
    state = fresh_state(bench.models.start, bench.package())
    return cfg, state, Strategy(cfg, None, Silent())  # type: ignore[arg-type]


def contact(state: State, strategy: Strategy, store: Store) -> tuple[int, int]:
    """Serve a node until it has the sub-FM; bytes down and up, without the adapter's."""
    prepared, holds, down, up = strategy.prepare(state, 1), Holds(store.digests()), 0, 0
    while True:
        sent = prepared.request(NODE, holds)
        down += size(sent) - sent.sizes()["adapter"]
        request = open_envelope(sent)
        assert isinstance(request, TrainRequest)
        got = fetch("node", store, Policy(), request)
        if not isinstance(got, NeedReply):
            assert got.digest() == state.digest
            return down, up
        up += size(seal(got))
        holds = Holds(got.have, got.lacks)


def steady(cfg: config.Config, state: State, strategy: Strategy) -> tuple[int, int]:
    """A round's messages to and from a client that has the sub-FM, and the adapter's numbers."""
    prepared = strategy.prepare(state, 2)
    sent = prepared.request(NODE, Holds((state.digest,)))
    fmt = prepared.want.fmt
    back = seal(TrainReply(
        "node-1", 2, state.digest, 478, 16, 0.6931471805599453, 4.123456789,
        codec.encode(prepared.want.trained, fmt), fmt, {}, {"train": 4.123456, "validate": 0.12345},
    ))  # fmt: skip
    own = codec.layout_bytes(codec.update_layout(prepared.want.adapter, cfg.wire.adapter))
    return size(sent) + size(back), own + codec.layout_bytes(prepared.want.layout)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--second", type=Path, help="a YAML file of the second task's keys")
    parser.add_argument("--only", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| wire.package | first contact | of fp32 | another task, first contact | second | of the "
        "first | of fp32's |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    whole = 0
    last = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.second:
            import yaml

            second = config.flatten(yaml.safe_load(options.second.read_text(encoding="utf-8")))
        else:
            second = other_task(folder)
        for fmt in options.only:
            store = Store(folder / fmt)
            last = server(FORMATS[fmt])
            first, _ = contact(*last[1:], store)
            whole = whole or first
            _, state, strategy = server(FORMATS[fmt] | second)
            fresh, _ = contact(state, strategy, Store(folder / f"{fmt}-fresh"))
            again, up = contact(state, strategy, store)
            print(
                f"| {fmt} | {first:,} | 1/{whole / first:.1f} | {fresh:,} | {again + up:,} | "
                f"1/{first / (again + up):.0f} | 1/{whole / (again + up):.0f} |",
                flush=True,
            )
    if last:
        both, own = steady(*last)
        print(f"\nA steady round, both ways: {both:,} bytes, {both / own:.3f} of the adapter's.")


if __name__ == "__main__":
    main()
