"""What each round sends, and how replies become the next adapter.

The loop is our own instead of a subclass of Flower's `Strategy`: a client that lacks weights is
served again within its round, a round can be repeated, and replies are averaged in stable-name
order, none of which that class's `start` has room for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fedpft_core import codec
from fedpft_core.config import Config
from fedpft_core.errors import ReplyError, RunError
from fedpft_core.exchange import (
    Average,
    Envelope,
    Expected,
    Failure,
    Hello,
    HelloReply,
    NeedReply,
    Package,
    Patch,
    RefusalReply,
    TrainReply,
    TrainRequest,
    delivery,
    open_envelope,
    seal,
    sum_counts,
    validate,
)
from fedpft_core.seeds import numpy_stream
from fedpft_core.training import Counts, LocalSettings
from server_app.transport import Transport

Tensors = dict[str, Tensor]
_SETTLE_SECONDS = 3.0  # how long the set of nodes must stand still before a smaller one will do


class Events(Protocol):
    """Where events go; an `EventLog`, or one that adds fields to each event."""

    def emit(self, event: str, **fields: Any) -> None: ...


@dataclass
class State:
    """All that changes over a run; `round` rounds are done."""

    round: int
    adapter: Tensors
    package: Package
    digests: dict[str, str]  # sha256 of each tensor in the package
    digest: str
    patches: list[Patch] = field(default_factory=list)
    have: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by client name


@dataclass(frozen=True)
class Node:
    """A connected client: Flower's id for this run, its stable name, rows it announced."""

    id: int
    name: str
    examples: int


@dataclass(frozen=True)
class Outcome:
    """A finished round."""

    adapter: Tensors
    counts: Counts | None
    loss: float
    examples: int
    good: int
    bad: int
    train_seconds: float
    seconds: float


def learning_rate(lr0: float, round: int, rounds: int) -> float:
    """lr0 · (T − t + 1) / T for round t of T: linear, never 0 (paper section 5.1)."""
    return lr0 * (rounds - round + 1) / rounds


class Strategy:
    """Sampling, delivery, validation and averaging for one federation of clients."""

    def __init__(self, config: Config, transport: Transport, events: Events) -> None:
        self.config = config
        self.transport = transport
        self.events = events
        self.known: dict[int, Node] = {}
        self._package_bytes: tuple[str, bytes] = ("", b"")

    # --- who is there -----------------------------------------------------------------------

    def wait_for_nodes(self) -> None:
        """Wait for clients-per-round nodes, or for a standing set of at least min-clients.

        Raises RunError when there are fewer than min-clients after node-timeout seconds.
        """
        f = self.config.federation
        start = changed = time.monotonic()
        count = -1
        while True:
            nodes = len(self.transport.nodes())
            now = time.monotonic()
            if nodes != count:
                count, changed = nodes, now
            if nodes >= f.clients_per_round:
                return
            if nodes >= f.min_clients and now - changed >= _SETTLE_SECONDS:
                self.events.emit(
                    "warning",
                    text=f"only {nodes} nodes are connected, so that many are used per round "
                    f"instead of federation.clients-per-round = {f.clients_per_round}",
                )
                return
            if now - start > f.node_timeout:
                raise RunError(
                    f"only {nodes} of federation.min-clients = {f.min_clients} nodes connected "
                    f"within federation.node-timeout = {f.node_timeout:g} s"
                )
            time.sleep(0.2)

    def meet(self, state: State, round: int) -> list[Node]:
        """The nodes connected now, by name; new ones are asked who they are."""
        ids = self.transport.nodes()
        new = [i for i in ids if i not in self.known]
        hello = seal(Hello())
        replies = self.transport.exchange(
            dict.fromkeys(new, hello), round, min(120.0, self.config.federation.round_timeout)
        )
        for node_id in new:
            self._count_bytes(round, "?", "down", hello)
            self._introduce(node_id, replies[node_id], state, round)
        present = [self.known[i] for i in ids if i in self.known]
        if new:
            names = sorted(n.name for n in present)
            self.events.emit("nodes", count=len(names), names=names)
        return sorted(present, key=lambda n: n.name)

    def _introduce(
        self, node_id: int, reply: Envelope | Failure, state: State, round: int
    ) -> None:
        def warn(why: str) -> None:
            self.events.emit("warning", text=f"node {node_id} is left out: {why}")

        if isinstance(reply, Failure):
            return warn(reply.reason)
        try:
            message = open_envelope(reply)
        except ReplyError as error:
            return warn(str(error))
        if isinstance(message, RefusalReply):
            return warn(str(message.reason)[:500])
        if not isinstance(message, HelloReply):
            return warn(f"it answered the first query with a {type(message).__name__}")
        name, examples = message.name, message.examples
        if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
            return warn("its name is not a printable text of 1 to 64 characters")
        if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
            return warn(f"client {name} has no rows")
        for other_id, other in list(self.known.items()):
            if other.name == name:
                if other_id in self.transport.nodes():
                    return warn(f"another connected node is already named {name}")
                # The same client back under a new node id.
                del self.known[other_id]
        self._count_bytes(round, name, "up", reply)
        self.known[node_id] = Node(node_id, name, examples)
        have = tuple(d for d in message.have if isinstance(d, str))
        if have:
            state.have[name] = have

    # --- one round --------------------------------------------------------------------------

    def run_round(self, state: State, round: int, count_rule: str) -> Outcome:
        """Train round `round` from `state`, trying again when too few replies are good.

        Raises RunError naming what was wrong after `federation.attempts` tries.
        """
        f = self.config.federation
        for attempt in range(1, f.attempts + 1):
            start = time.perf_counter()
            lr = learning_rate(self.config.train.lr, round, f.rounds)
            nodes = self._sample(self.meet(state, round), round, attempt)
            self.events.emit(
                "round_started", round=round, rounds=f.rounds, attempt=attempt,
                clients=[n.name for n in nodes], lr=lr,
            )  # fmt: skip
            good, bad = self._collect(state, round, lr, nodes, count_rule)
            if len(good) >= f.min_clients:
                return self._average(good, len(bad), time.perf_counter() - start)
            why = "; ".join(f"{name}: {reason}" for name, reason in sorted(bad.items()))
            text = (
                f"round {round}: {len(good)} good replies of the federation.min-clients = "
                f"{f.min_clients} needed ({why or 'no other clients are connected'})"
            )
            self.events.emit("warning", text=f"{text}; attempt {attempt} of {f.attempts}")
        raise RunError(text)

    def _sample(self, nodes: list[Node], round: int, attempt: int) -> list[Node]:
        f = self.config.federation
        size = min(f.clients_per_round, len(nodes))
        stream = numpy_stream(self.config.run.seed, "sample", round, attempt)
        picked = stream.choice(len(nodes), size=size, replace=False) if size else []
        return [nodes[i] for i in sorted(picked)]

    def _request(
        self, state: State, round: int, lr: float, have: Iterable[str], count_rule: str
    ) -> TrainRequest:
        t, fmt = self.config.train, self.config.wire.adapter
        if self._package_bytes[0] != state.digest:
            self._package_bytes = (state.digest, state.package.to_bytes())
        blob = self._package_bytes[1]
        whole, chain = delivery(tuple(have), state.digest, len(blob), state.patches)
        return TrainRequest(
            round=round,
            digest=state.digest,
            adapter=codec.encode(state.adapter, fmt),
            fmt=fmt,
            settings=LocalSettings(
                lr, t.batch_size, t.local_epochs, t.local_steps, t.weight_decay, t.clip, t.threads
            ),
            seed=self.config.run.seed,
            count_rule=count_rule,
            package=blob if whole else b"",
            patches=chain,
        )

    def _collect(
        self, state: State, round: int, lr: float, nodes: list[Node], count_rule: str
    ) -> tuple[dict[str, tuple[TrainReply, Tensors, Counts | None]], dict[str, str]]:
        """Good replies and the reasons of bad ones, by client name."""
        good: dict[str, tuple[TrainReply, Tensors, Counts | None]] = {}
        bad: dict[str, str] = {}
        deadline = time.monotonic() + self.config.federation.round_timeout
        by_id = {n.id: n for n in nodes}
        want = self._expected(state, round, count_rule)
        again: dict[int, tuple[str, ...]] = {}
        started = time.perf_counter()

        def on_reply(node_id: int, reply: Envelope | Failure) -> None:
            node = by_id[node_id]
            seconds = time.perf_counter() - started
            status, fields = "ok", {}
            try:
                if isinstance(reply, Failure):
                    status = "error"
                    raise ReplyError(reply.reason)
                self._count_bytes(round, node.name, "up", reply)
                message = open_envelope(reply)
                if isinstance(message, NeedReply) and node_id not in again:
                    again[node_id] = tuple(d for d in message.have if isinstance(d, str))
                    state.have.pop(node.name, None)
                    status = "need"
                elif isinstance(message, TrainReply):
                    adapter, counts = validate(message, want, node.name, node.examples)
                    good[node.name] = (message, adapter, counts)
                    state.have[node.name] = (state.digest,)
                    fields = {
                        "examples": message.examples, "loss": message.loss,
                        "steps": message.steps, "train_seconds": message.seconds,
                        "timings": message.timings,
                    }  # fmt: skip
                elif isinstance(message, RefusalReply):
                    raise ReplyError(str(message.reason)[:500])
                else:
                    raise ReplyError(f"unexpected {type(message).__name__}")
            except ReplyError as error:
                status = status if status == "error" else "refused"
                bad[node.name] = fields["reason"] = str(error)
            self.events.emit(
                "reply", round=round, client=node.name, status=status, seconds=seconds, **fields
            )

        messages = {}
        for node in nodes:
            have = state.have.get(node.name, ())
            messages[node.id] = seal(self._request(state, round, lr, have, count_rule))
            self._count_bytes(round, node.name, "down", messages[node.id])
        self.transport.exchange(messages, round, deadline - time.monotonic(), on_reply)
        if again:
            # They lack the weights they were asked to train on: serve them within this round.
            messages = {}
            for node_id, have in again.items():
                messages[node_id] = seal(self._request(state, round, lr, have, count_rule))
                self._count_bytes(round, by_id[node_id].name, "down", messages[node_id])
            left = max(1.0, deadline - time.monotonic())
            self.transport.exchange(messages, round, left, on_reply)
        return good, bad

    def _expected(self, state: State, round: int, count_rule: str) -> Expected:
        import json

        from fedpft_core.sub_fm import Plan

        plan = Plan.from_json(json.loads(state.package.meta)["plan"])
        return Expected(
            round=round,
            digest=state.digest,
            fmt=self.config.wire.adapter,
            adapter=state.adapter,
            max_update_norm=self.config.wire.max_update_norm,
            count_blocks={b: len(plan.blocks[b].kept) for b in plan.pruned} if count_rule else {},
        )

    def _average(
        self,
        good: Mapping[str, tuple[TrainReply, Tensors, Counts | None]],
        bad: int,
        seconds: float,
    ) -> Outcome:
        average, loss, busy = Average(), 0.0, 0.0
        for name in sorted(good):
            reply, adapter, _ = good[name]
            average.add(adapter, reply.examples)
            loss += reply.loss * reply.examples
            busy += reply.seconds
        counts = [c for _, _, c in (good[n] for n in sorted(good)) if c is not None]
        return Outcome(
            adapter=average.result(),
            counts=sum_counts(counts) if counts else None,
            loss=loss / average.examples,
            examples=average.examples,
            good=len(good),
            bad=bad,
            train_seconds=busy,
            seconds=seconds,
        )

    def _count_bytes(self, round: int, client: str, direction: str, envelope: Envelope) -> None:
        for kind, size in envelope.sizes().items():
            self.events.emit(
                "bytes", round=round, client=client, direction=direction, kind=kind, bytes=size
            )
