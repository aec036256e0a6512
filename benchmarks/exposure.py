"""A whole federation in this process, with everything that the server saw of each client.

What `membership.py` and `one_shot_theory.py` look at. No command of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from client_app.node import client_for
from client_app.process import ProcessCache, Rows
from fedpft_core import config as configs
from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.partition import client_names
from fedpft_core.proxy.package import ClientModel
from fedpft_core.task import Task
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope, open_envelope
from fedpft_core.wire.messages import TrainReply, TrainRequest
from server_app.app import run
from server_app.run.checkpoint import Checkpoints
from server_app.run.events import EventLog, read_events
from server_app.run.identity import identity
from server_app.transport import LocalTransport


@dataclass(frozen=True)
class Update:
    """One reply of a client, as the server has it.

    `sent` is the adapter that the client began with, `got` what it made of it, float32.
    """

    round: int
    client: str
    sent: Tensors
    got: Tensors
    loss: float


@dataclass
class Exposed:
    """What a run showed.

    Attributes:
        model: the sub-FM that clients trained on, with an adapter.
        task: what they learned.
        rows: each client's rows, those it trained on and those it kept from training.
        updates: all replies, in order.
        final: the last merged adapter.
        events: the run's log.
    """

    model: ClientModel
    task: Task
    rows: dict[str, Rows]
    updates: list[Update] = field(default_factory=list)
    final: Tensors = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def start(self) -> Tensors:
        """The adapter of the first round."""
        return self.updates[0].sent

    def of(self, client: str) -> list[Update]:
        """The updates of one client, by round."""
        return [u for u in self.updates if u.client == client]

    def put(self, adapter: Tensors) -> torch.nn.Module:
        """The sub-FM with an adapter."""
        adapters.resize(self.model.model, adapters.rank_of(adapter))
        adapters.load(self.model.model, adapter, self.model.plan)
        return self.model.model


def federate(flat: Mapping[str, Any], folder: Path, held_out: float = 0.0) -> Exposed:
    """Run a federation with all of its clients in this process.

    Args:
        flat: the run's configuration. The sub-FM must not change (align.interval = 0).
        folder: of the run; it must be empty.
        held_out: share of each client's rows that it never trains on.

    Returns:
        What the server saw, and the rows besides, which it did not see.
    """
    flat = {**flat, "run.dir": str(folder)}
    config = configs.from_flat(flat)
    count = config.federation.clients
    cache = ProcessCache(max_models=1, max_clients=count)
    replies: list[tuple[TrainRequest, TrainReply]] = []

    def answer(index: int, envelope: Envelope) -> Envelope:
        node = {"partition-id": index, "num-partitions": count, "validation-share": held_out}
        client = client_for(node, flat)
        client.cache = cache
        sealed = client.handle(envelope)
        if envelope.kind == "train":
            asked, said = open_envelope(envelope), open_envelope(sealed)
            if isinstance(asked, TrainRequest) and isinstance(said, TrainReply):
                replies.append((asked, said))
        return sealed

    clients: dict[int, Callable[[Envelope], Envelope]] = {
        i + 1: partial(answer, i) for i in range(count)
    }
    log = EventLog(folder / "events.jsonl")
    try:
        run(config, LocalTransport(clients), log)
    finally:
        log.close()
    (held,) = cache.models.values()
    by_name = {key[0]: rows for key, rows in cache.rows.items()}
    seen = Exposed(held.model, held.model.task, {n: by_name[n] for n in client_names(count)})
    for asked, said in replies:
        sent = codec.decode(asked.adapter, asked.fmt)
        trained = {k: sent[k] for k in codec_names(said)}
        got = sent | codec.decode_update(said.adapter, trained, said.fmt)
        seen.updates.append(Update(said.round, said.name, sent, got, said.loss))
    saved = Checkpoints(folder / "checkpoints", 1, identity(config)).latest()
    assert saved is not None
    seen.final = saved.adapter
    seen.events = [event for _, event in read_events(folder / "events.jsonl")]
    return seen


def codec_names(reply: TrainReply) -> list[str]:
    """The adapter's tensors that a reply has, without those that only say how others are coded."""
    return [k for k in reply.adapter if "//" not in k]


@torch.inference_mode()
def row_losses(model: torch.nn.Module, task: Task, rows: Encoded) -> np.ndarray:
    """The loss of each row by itself, dropout off.

    Args:
        model: a model of the task.
        task: whose loss.
        rows: labelled rows.

    Returns:
        float64 [rows].
    """
    model.eval()
    return np.array([float(task.loss(model, batch)) for batch in batches(rows, 1, None)])


__all__ = ["Exposed", "Update", "federate", "row_losses"]
