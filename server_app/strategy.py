"""What each round sends, and how replies become the next adapter.

The loop is our own instead of a subclass of Flower's `Strategy`: a client that lacks weights is
served again within its round, a round can be repeated, and replies are averaged in stable-name
order, none of which that class's `start` has room for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedpft_core.adapter.lora import clip_change
from fedpft_core.aggregation.average import Average
from fedpft_core.aggregation.counts import sum_counts
from fedpft_core.config import Config
from fedpft_core.errors import ReplyError, RunError
from fedpft_core.model.plan import Plan
from fedpft_core.seeds import numpy_stream
from fedpft_core.tensors import Tensors
from fedpft_core.train.inactivity import Counts
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import (
    Failure,
    Hello,
    HelloReply,
    NeedReply,
    RefusalReply,
    TrainReply,
    TrainRequest,
)
from fedpft_core.wire.validate import Expected, check_size, validate
from server_app.delivery import delivery, useful
from server_app.state import Events, State
from server_app.transport import Transport

_SETTLE_SECONDS = 3.0  # how long the set of nodes must stand still before a smaller one will do
_HELLO_SECONDS = 300.0  # a fresh process has to import torch, on a machine that may be busy
_HELLO_BYTES = 2**17  # the largest answer to the first query
_MOST_PATCHES = 2**16  # tokens an image can become
_MOST_EXAMPLES = 2**40  # keeps sums over clients exact in float64


@dataclass(frozen=True)
class Node:
    """A connected client: Flower's id for this run, its stable name, rows it announced to train
    on and to keep from training."""

    id: int
    name: str
    examples: int
    validation: int = 0


@dataclass(frozen=True)
class Good:
    """A valid reply, with its tensors decoded; `arrived` in seconds since the round began."""

    reply: TrainReply
    adapter: Tensors
    counts: Counts | None
    arrived: float


def training_wall(replies: Iterable[Good]) -> float:
    """Seconds during which at least one of these clients was training.

    By the clients' own figures: each trained up to when its reply arrived.
    """
    wall, end = 0.0, 0.0
    for start, stop in sorted((r.arrived - r.reply.seconds, r.arrived) for r in replies):
        wall += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return wall


@dataclass(frozen=True)
class Outcome:
    """A finished round; during `busy_seconds` a client was training or the server averaging."""

    adapter: Tensors
    counts: Counts | None
    loss: float
    examples: int
    good: int
    bad: int
    train_seconds: float
    busy_seconds: float
    seconds: float


def learning_rate(lr0: float, round: int, rounds: int) -> float:
    """lr0 · (T − t + 1) / T for round t of T: linear, never 0 (paper section 5.1)."""
    return lr0 * (rounds - round + 1) / rounds


def reply_format(config: Config) -> str:
    """The format of the adapters clients send back."""
    up = config.wire.adapter_up
    return config.wire.adapter if up == "same" else up


def _printable(text: object) -> str:
    """A client's words, fit for a terminal and a log."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:500])


def _tokens_per_row(meta: Mapping[str, Any]) -> int:
    """The most real tokens one example of the package's task can have."""
    return int(meta["max_length"]) if meta["kind"] != "image" else _MOST_PATCHES


class Strategy:
    """Sampling, delivery, validation and averaging for one federation of clients."""

    def __init__(self, config: Config, transport: Transport, events: Events) -> None:
        self.config = config
        self.transport = transport
        self.events = events
        self.known: dict[int, Node] = {}
        self.left_out: dict[int, str] = {}  # why, by node id
        self._package_bytes: tuple[str, bytes] = ("", b"")

    # --- who is there -----------------------------------------------------------------------

    def wait_for_nodes(self) -> None:
        """Wait for all `federation.clients`, or for a standing set of at least min-clients.

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
            if nodes >= f.clients:
                return
            if nodes >= f.min_clients and now - changed >= _SETTLE_SECONDS:
                if nodes >= f.clients_per_round:
                    return
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
            dict.fromkeys(new, hello),
            round,
            min(_HELLO_SECONDS, self.config.federation.round_timeout),
        )
        for node_id in new:
            reply = replies[node_id]
            name = self._introduce(node_id, reply, state)
            self._count_bytes(round, name, "down", hello)
            if isinstance(reply, Envelope):
                self._count_bytes(round, name, "up", reply)
        present = [self.known[i] for i in ids if i in self.known]
        if new:
            names = sorted(n.name for n in present)
            self.events.emit("nodes", count=len(names), names=names)
        return sorted(present, key=lambda n: n.name)

    def _introduce(self, node_id: int, reply: Envelope | Failure, state: State) -> str:
        """Note who a node is; its name, or `?` when it is left out."""
        try:
            if isinstance(reply, Failure):
                raise ReplyError(reply.reason)
            check_size(reply, _HELLO_BYTES)
            message = open_envelope(reply)
            if isinstance(message, RefusalReply):
                raise ReplyError(message.reason)
            if not isinstance(message, HelloReply):
                raise ReplyError(f"it answered the first query with a {type(message).__name__}")
            name = message.name
            if not 0 < len(name) <= 64 or not name.isprintable():
                raise ReplyError("its name is not a printable text of 1 to 64 characters")
            if not 1 <= message.examples < _MOST_EXAMPLES:
                raise ReplyError(f"client {name} says it has {message.examples} rows")
            if not 0 <= message.validation < _MOST_EXAMPLES:
                raise ReplyError(f"client {name} says it has {message.validation} validation rows")
            connected = set(self.transport.nodes())
            for other_id, other in list(self.known.items()):
                if other.name == name:
                    if other_id in connected:
                        raise ReplyError(f"another connected node is already named {name}")
                    # The same client back under a new node id.
                    del self.known[other_id]
        except ReplyError as error:
            self.left_out[node_id] = _printable(error)
            text = f"node {node_id} is left out: {self.left_out[node_id]}"
            self.events.emit("warning", text=text)
            return "?"
        self.left_out.pop(node_id, None)
        self.known[node_id] = Node(node_id, name, message.examples, message.validation)
        if message.have:
            state.have[name] = message.have
        return name

    # --- one round --------------------------------------------------------------------------

    def run_round(self, state: State, round: int, count_rule: str) -> Outcome:
        """Train round `round` from `state`, trying again when too few replies are good.

        Raises RunError naming what was wrong after `federation.attempts` tries.
        """
        f = self.config.federation
        for attempt in range(1, f.attempts + 1):
            if len(self.transport.nodes()) < f.min_clients:
                self.wait_for_nodes()
            start = time.perf_counter()
            lr = learning_rate(self.config.train.lr, round, f.rounds)
            nodes = self._sample(self.meet(state, round), round, attempt)
            self.events.emit(
                "round_started", round=round, rounds=f.rounds, attempt=attempt,
                clients=[n.name for n in nodes], lr=lr,
            )  # fmt: skip
            good, bad = self._collect(state, round, lr, nodes, count_rule)
            if len(good) >= f.min_clients:
                self._report_validation(round, [g.reply for g in good.values()])
                return self._average(good, len(bad), start)
            out = {f"node {i}": why for i, why in self.left_out.items()}
            why = "; ".join(f"{name}: {reason}" for name, reason in sorted((out | bad).items()))
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
        if not size:
            return []
        return [nodes[i] for i in sorted(stream.choice(len(nodes), size=size, replace=False))]

    def _requests(
        self, state: State, round: int, lr: float, adapter: Tensors, count_rule: str
    ) -> Callable[[Iterable[str]], Envelope]:
        """A function from what a client has to the message it gets.

        Clients that need the same things get the same message: one copy in memory serves all.
        """
        t, wire = self.config.train, self.config.wire
        if self._package_bytes[0] != state.digest:
            self._package_bytes = (state.digest, state.package.to_bytes())
        blob = self._package_bytes[1]
        state.patches = useful(state.patches, len(blob))
        made: dict[tuple[bool, int], Envelope] = {}

        def request(have: Iterable[str]) -> Envelope:
            whole, chain = delivery(tuple(have), state.digest, len(blob), state.patches)
            key = (whole, len(chain))
            if key not in made:
                made[key] = seal(
                    TrainRequest(
                        round=round,
                        digest=state.digest,
                        adapter=adapter,
                        fmt=wire.adapter,
                        settings=LocalSettings(
                            lr, t.batch_size, t.local_epochs, t.local_steps, t.weight_decay,
                            t.clip, t.threads, t.head_lr_scale,
                        ),
                        seed=self.config.run.seed,
                        count_rule=count_rule,
                        package=blob if whole else b"",
                        patches=chain,
                        reply_fmt=reply_format(self.config),
                        run=state.run,
                    )
                )  # fmt: skip
            return made[key]

        return request

    def _collect(
        self, state: State, round: int, lr: float, nodes: list[Node], count_rule: str
    ) -> tuple[dict[str, Good], dict[str, str]]:
        """Good replies and the reasons of bad ones, by client name.

        Of several replies of one node only the first that settles it counts, whatever order
        they come in.
        """
        good: dict[str, Good] = {}
        bad: dict[str, str] = {}
        deadline = time.monotonic() + self.config.federation.round_timeout
        by_id = {n.id: n for n in nodes}
        fmt = self.config.wire.adapter
        adapter = codec.encode(state.adapter, fmt)
        request = self._requests(state, round, lr, adapter, count_rule)
        want = self._expected(state, round, codec.decode(adapter, fmt), count_rule)
        again: dict[int, tuple[str, ...]] = {}
        serving_again = False
        started = time.perf_counter()

        def judge(node: Node, reply: Envelope | Failure) -> tuple[str, dict[str, Any]]:
            if isinstance(reply, Failure):
                bad[node.name] = reason = _printable(reply.reason)
                return "error", {"reason": reason}
            try:
                check_size(reply, want.max_bytes)
                message = open_envelope(reply)
                if isinstance(message, NeedReply) and not serving_again:
                    again[node.id] = message.have
                    state.have.pop(node.name, None)
                    return "need", {}
                if isinstance(message, RefusalReply):
                    raise ReplyError(message.reason)
                if not isinstance(message, TrainReply):
                    raise ReplyError(f"unexpected {type(message).__name__}")
                adapter, counts = validate(message, want, node.name, node.examples, node.validation)
            except ReplyError as error:
                bad[node.name] = reason = _printable(error)
                return "refused", {"reason": reason}
            longest = self.config.federation.clip_update_norm
            if longest:
                adapter = clip_change(adapter, want.adapter, longest)
            good[node.name] = Good(message, adapter, counts, time.perf_counter() - started)
            state.have[node.name] = (state.digest,)
            held_out = {
                "validation_rows": message.validation_rows,
                "validation_correct": message.validation_correct,
            }
            return "ok", {
                "examples": message.examples, "loss": message.loss, "steps": message.steps,
                "train_seconds": message.seconds, "timings": message.timings,
                **(held_out if message.validation_rows else {}),
            }  # fmt: skip

        def on_reply(node_id: int, reply: Envelope | Failure) -> None:
            node = by_id.get(node_id)
            if node is None:
                return
            if isinstance(reply, Envelope):
                self._count_bytes(round, node.name, "up", reply)
            settled = node.name in good or node.name in bad
            if settled or (node_id in again and not serving_again):
                return
            seconds = time.perf_counter() - started
            status, fields = judge(node, reply)
            self.events.emit(
                "reply", round=round, client=node.name, status=status, seconds=seconds, **fields
            )

        def send(wanted: Mapping[int, Iterable[str]]) -> None:
            messages = {node_id: request(have) for node_id, have in wanted.items()}
            for node_id, message in messages.items():
                self._count_bytes(round, by_id[node_id].name, "down", message)
            left = max(1.0, deadline - time.monotonic())
            self.transport.exchange(messages, round, left, on_reply)

        send({n.id: state.have.get(n.name, ()) for n in nodes})
        if again:
            # They lack the weights they were asked to train on: serve them within this round.
            # A straggler may have used up the time, so they get as much again.
            serving_again = True
            deadline = time.monotonic() + self.config.federation.round_timeout
            send(again)
        return good, bad

    def _expected(self, state: State, round: int, sent: Tensors, count_rule: str) -> Expected:
        meta = json.loads(state.package.meta)
        plan = Plan.from_json(meta["plan"])
        return Expected(
            round=round,
            digest=state.digest,
            fmt=reply_format(self.config),
            adapter=sent,
            max_update_norm=self.config.wire.max_update_norm,
            count_blocks={b: len(plan.blocks[b].kept) for b in plan.pruned} if count_rule else {},
            tokens_per_row=_tokens_per_row(meta),
        )

    def _average(self, good: Mapping[str, Good], bad: int, start: float) -> Outcome:
        averaging = time.perf_counter()
        average, loss, busy = Average(), 0.0, 0.0
        replies = [good[name] for name in sorted(good)]
        for r in replies:
            average.add(r.adapter, r.reply.examples)
            loss += r.reply.loss * r.reply.examples
            busy += r.reply.seconds
        counts = [r.counts for r in replies if r.counts is not None]
        adapter = average.result()
        done = time.perf_counter()
        return Outcome(
            adapter=adapter,
            counts=sum_counts(counts) if counts else None,
            loss=loss / average.examples,
            examples=average.examples,
            good=len(good),
            bad=bad,
            train_seconds=busy,
            busy_seconds=training_wall(replies) + done - averaging,
            seconds=done - start,
        )

    def _report_validation(self, round: int, replies: Iterable[TrainReply]) -> None:
        """What clients found on rows they keep from training: of the adapter the round began with,
        so of the round before."""
        having = [r for r in replies if r.validation_rows]
        correct, rows = (
            sum(r.validation_correct for r in having), sum(r.validation_rows for r in having),
        )  # fmt: skip
        if rows:
            self.events.emit(
                "client_validation", round=round - 1, accuracy=correct / rows, correct=correct,
                rows=rows, clients=len(having),
            )  # fmt: skip

    def _count_bytes(self, round: int, client: str, direction: str, envelope: Envelope) -> None:
        for kind, size in envelope.sizes().items():
            self.events.emit(
                "bytes", round=round, client=client, direction=direction, kind=kind, bytes=size
            )
