"""The server's side of a round with nodes made by hand: no network, no models, every order."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import corrupt
import fabricate
import pytest
import torch
from fabricate import Network, Node

from fedpft_core.config import Config
from fedpft_core.errors import RunError
from fedpft_core.train.inactivity import Counts
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import PROTOCOL, Envelope, open_envelope, seal
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.messages import Failure, HelloReply, NeedReply, TrainReply, TrainRequest
from fedpft_core.wire.parcel import Parcel
from server_app.local import local_only
from server_app.rounds import nodes as nodes_module
from server_app.rounds.outcome import Good, Outcome, training_wall
from server_app.rounds.requests import learning_rate, reply_format
from server_app.run.events import EventLog
from server_app.state import State
from server_app.strategy import Strategy

NAMES = tuple("abcdef")


def started(network: Network, **keys: Any) -> tuple[Strategy, State, EventLog]:
    events = EventLog(None)
    return Strategy(fabricate.config(**keys), network, events), fabricate.state(), events


def seen(events: EventLog, name: str, *fields: str) -> list[Any]:
    found = [e for e in events.seen if e["event"] == name]
    return [tuple(e[f] for f in fields) if len(fields) > 1 else e[fields[0]] for e in found]


def requests(network: Network) -> list[tuple[int, TrainRequest]]:
    opened = [(node, open_envelope(e)) for way, node, e in network.log if way == "down"]
    return [(node, m) for node, m in opened if isinstance(m, TrainRequest)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- a good round -------------------------------------------------------------------------


def test_a_round_averages_by_examples() -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, events = started(network)
    outcome = strategy.run_round(state, 1, "nonpositive")
    replies = [open_envelope(e) for way, _, e in network.log if way == "up"]
    trained = {m.name: m for m in replies if isinstance(m, TrainReply)}
    assert outcome.examples == 5 + 6 + 7 and (outcome.good, outcome.bad) == (3, 0)
    for name, value in outcome.adapter.items():
        total = sum(trained[n].adapter[name].double() * trained[n].examples for n in "abc")
        assert torch.equal(value, (total / 18).float())
    assert isinstance(outcome.counts, Counts)
    assert outcome.counts.tokens == dict.fromkeys(fabricate.PLAN.pruned, 3 * 18)
    assert outcome.loss == 1.0 and outcome.train_seconds == 1.5
    assert seen(events, "reply", "client", "status") == [("a", "ok"), ("b", "ok"), ("c", "ok")]
    assert (
        outcome.counts.inactive[1].tolist() == sum(t.counts["1"] for t in trained.values()).tolist()
    )


def test_rows_kept_from_training_are_summed_over_clients() -> None:
    network = fabricate.network("a", "b", "c")
    network.members[11].validation = (3, 4)
    network.members[13].validation = (0, 6)
    strategy, state, events = started(network)
    strategy.run_round(state, 1, "")
    network.members[13].spoil = fabricate.refuse("no")
    strategy.run_round(state, 2, "")
    found = seen(events, "client_validation", "round", "value", "rows", "clients", "metric")
    # Measured with the adapter a round began with: that of the round before.
    assert found == [(0, 0.3, 10, 2, "accuracy"), (1, 0.75, 4, 1, "accuracy")]
    assert seen(events, "client_validation", "error")[0] == pytest.approx((0.3 * 0.7 / 10) ** 0.5)
    assert [e.get("validation_rows") for e in events.seen if e["event"] == "reply"][:3] == [
        4, None, 6,
    ]  # fmt: skip


def test_without_such_rows_nothing_is_said_of_them() -> None:
    strategy, state, events = started(fabricate.network("a", "b", "c"))
    strategy.run_round(state, 1, "")
    assert not seen(events, "client_validation", "round")


def test_learning_rate_falls_to_one_step_above_zero() -> None:
    assert [learning_rate(1.0, t, 5) for t in range(1, 6)] == [1.0, 0.8, 0.6, 0.4, 0.2]


def test_requests_say_what_the_round_is() -> None:
    network = fabricate.network(*NAMES)
    strategy, state, _ = started(network, train__lr=0.6, train__local_steps=9)
    strategy.run_round(state, 3, "nonpositive")
    for _, m in requests(network):
        assert (m.round, m.digest, m.count_rule, m.run) == (
            3,
            state.digest,
            "nonpositive",
            state.run,
        )
        assert m.settings.lr == pytest.approx(0.4) and m.settings.steps == 9
        assert m.reply_fmt == m.fmt == "fp32"


def test_sampling_is_a_function_of_seed_round_and_attempt() -> None:
    def picked(seed: int, ids: list[int], round: int) -> list[str]:
        network = Network(dict(zip(ids, (Node(n) for n in NAMES), strict=True)))
        strategy, state, events = started(network, run__seed=seed)
        strategy.run_round(state, round, "")
        return list(seen(events, "round_started", "clients")[0])

    first = picked(0, [1, 2, 3, 4, 5, 6], 1)
    assert first == picked(0, [60, 50, 40, 30, 20, 10], 1)  # node ids do not matter
    rounds = {tuple(picked(0, [1, 2, 3, 4, 5, 6], t)) for t in range(1, 8)}
    seeds = {tuple(picked(s, [1, 2, 3, 4, 5, 6], 1)) for s in range(7)}
    assert len(rounds) > 2 and len(seeds) > 2


# --- what is delivered --------------------------------------------------------------------


def parts_sent(network: Network, since: int) -> dict[str, set[str]]:
    out = {}
    for way, node, e in network.log[since:]:
        if way == "down" and e.kind == "train":
            out[network.members[node].name] = {p.partition(".")[0] for p in e.parts}
    return out


def test_each_client_gets_what_it_lacks() -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, _ = started(network)
    strategy.run_round(state, 1, "")
    assert parts_sent(network, 0) == {n: {"adapter", "package"} for n in "abc"}

    mark = len(network.log)
    strategy.run_round(state, 2, "")
    assert parts_sent(network, mark) == {n: {"adapter"} for n in "abc"}

    fabricate.align(state, 1)
    mark = len(network.log)
    strategy.run_round(state, 3, "")
    assert parts_sent(network, mark) == {n: {"adapter", "patch"} for n in "abc"}

    # a has kept up with the next alignment; b's disk is wiped and it says so when it comes
    # back under a new id; c has missed two alignments; d is new.
    fabricate.align(state, 2)
    state.have["a"] = (state.digest,)
    network.members[11].packages[state.digest] = state.package
    fabricate.align(state, 3)
    network.members[99] = network.members.pop(12)
    network.members[99].packages.clear()
    state.have.pop("b")
    network.members[14] = Node("d", 9)
    mark = len(network.log)
    strategy.config = fabricate.config(federation__clients_per_round=4)
    strategy.run_round(state, 4, "")
    sent = parts_sent(network, mark)
    assert sent["a"] == sent["c"] == {"adapter", "patch"}
    assert sent["b"] == sent["d"] == {"adapter", "package"}
    chains = {network.members[n].name: len(m.patches) for n, m in requests(network)[-4:]}
    assert chains == {"a": 1, "b": 0, "c": 2, "d": 0}
    assert all(state.digest in node.packages for node in network.members.values())


def test_a_chain_longer_than_the_package_is_not_sent() -> None:
    network = fabricate.network("a", "b")
    strategy, state, _ = started(network, federation__clients_per_round=2)
    strategy.run_round(state, 1, "")
    size = len(state.package.to_bytes())
    for seed in range(1, 10):
        fabricate.align(state, seed)
    assert sum(len(p.to_bytes()) for p in state.patches) > size
    mark = len(network.log)
    strategy.run_round(state, 2, "")
    assert parts_sent(network, mark) == {n: {"adapter", "package"} for n in "ab"}
    assert sum(len(p.to_bytes()) for p in state.patches) < size  # the useless ones are forgotten


@pytest.mark.parametrize("aligned", [0, 1, 2])
def test_who_lacks_weights_is_served_again_in_the_same_round(aligned: int) -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, events = started(network)
    strategy.run_round(state, 1, "")
    for seed in range(aligned):
        fabricate.align(state, seed)
    network.members[12].packages.clear()
    mark = len(network.log)
    outcome = strategy.run_round(state, 2, "")
    assert outcome.good == 3 and outcome.bad == 0
    assert seen(events, "reply", "client", "status")[3:] == [
        ("a", "ok"), ("b", "need"), ("c", "ok"), ("b", "ok"),
    ]  # fmt: skip
    to_b = [set(e.parts) for way, n, e in network.log[mark:] if way == "down" and n == 12]
    assert to_b[-1] == {"adapter", "package"} and len(to_b) == 2


def test_who_needs_again_and_again_is_refused() -> None:
    def insatiable(reply: TrainReply) -> NeedReply:
        return NeedReply(reply.name, reply.digest)

    network = fabricate.network("a", "b", "c")
    network.members[12].spoil = insatiable
    strategy, state, events = started(network)
    outcome = strategy.run_round(state, 1, "")
    assert (outcome.good, outcome.bad) == (2, 1)
    assert [s for c, s in seen(events, "reply", "client", "status") if c == "b"] == [
        "need", "refused",
    ]  # fmt: skip


def test_clients_that_need_the_same_share_one_message() -> None:
    """What the server holds for a round does not grow with copies of package and adapter."""
    network = fabricate.network(*NAMES)
    strategy, state, _ = started(network, federation__clients_per_round=6)
    strategy.run_round(state, 1, "")
    envelopes = [e for way, _, e in network.log if way == "down" and e.kind == "train"]
    assert len(envelopes) == 6 and len({id(e) for e in envelopes}) == 1


# --- bad replies --------------------------------------------------------------------------


def forged(change: Any) -> Any:
    return lambda reply: corrupt.reseal(seal(reply), **change(seal(reply)))


SPOILS: dict[str, tuple[Any, str, str]] = {
    "refusal": (fabricate.refuse("label 'x'\nis new\x1b[31m"), "refused", "label 'x'?is new?[31m"),
    "failure": (fabricate.fail("no reply within 30 s"), "error", "no reply within 30 s"),
    "loss": (lambda r: replace(r, loss=float("nan")), "refused", "loss or seconds"),
    "examples": (lambda r: replace(r, examples=r.examples + 1), "refused", "announced"),
    "validation": (lambda r: replace(r, validation_rows=1), "refused", "the 0 announced"),
    "wrong kind": (lambda r: HelloReply(r.name, 5), "refused", "unexpected HelloReply"),
    "echo": (lambda r: replace(r, name="a"), "refused", "signed 'a'"),
    "damage": (lambda r: replace(seal(r), head=seal(r).head + " "), "refused", "damaged"),
    "head": (forged(lambda e: {"head": "[]"}), "refused", "malformed"),
    "too large": (
        forged(lambda e: {"parts": e.parts | {"adapter": bytes(10**6)}}), "refused", "bytes, more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILS)
def test_a_bad_reply_is_dropped_counted_and_named(kind: str) -> None:
    spoil, status, reason = SPOILS[kind]
    network = fabricate.network("a", "b", "c")
    network.members[12].spoil = spoil
    strategy, state, events = started(network)
    outcome = strategy.run_round(state, 1, "")
    assert (outcome.good, outcome.bad) == (2, 1)
    (event,) = [e for e in events.seen if e["event"] == "reply" and e["client"] == "b"]
    assert event["status"] == status and reason in event["reason"]
    # The others are averaged as if b had not been asked.
    alone = fabricate.network("a", "c")
    alone.members[12].examples = 7
    only, state, _ = started(alone, federation__clients_per_round=2)
    assert same(outcome.adapter, only.run_round(state, 1, "").adapter)


def test_too_few_good_replies_repeat_the_round_with_a_new_sample() -> None:
    network = fabricate.network(*NAMES)
    calls = []

    def fails_at_first(reply: TrainReply) -> Any:
        calls.append(reply.name)
        return Failure("gone") if len(calls) <= 2 else reply

    for node in network.members.values():
        node.spoil = fails_at_first
    strategy, state, events = started(network, federation__attempts=3)
    outcome = strategy.run_round(state, 1, "")
    assert outcome.good == 3
    attempts = seen(events, "round_started", "attempt", "clients")
    assert [a for a, _ in attempts] == [1, 2]
    assert attempts[0][1] != attempts[1][1]
    assert "attempt 1 of 3" in seen(events, "warning", "text")[-1]


def test_a_round_that_never_succeeds_ends_the_run_with_reasons() -> None:
    network = fabricate.network("a", "b", "c")
    network.members[11].spoil = fabricate.refuse("no rows")
    network.members[13].spoil = fabricate.fail("the node is gone")
    strategy, state, events = started(network)
    before = {k: t.clone() for k, t in state.adapter.items()}
    with pytest.raises(
        RunError, match=r"round 1: 1 good replies .*a: no rows; c: the node is gone"
    ):
        strategy.run_round(state, 1, "")
    assert len(seen(events, "round_started", "attempt")) == 2
    assert same(state.adapter, before)


def test_fewer_replies_than_asked_will_do() -> None:
    network = fabricate.network("a", "b", "c")
    network.members[13].spoil = fabricate.fail("no reply within 30 s")
    strategy, state, _ = started(network)
    assert strategy.run_round(state, 1, "").good == 2


# --- who is there -------------------------------------------------------------------------


def greeted(**changes: Any) -> Any:
    return lambda hello: replace(hello, **changes)


@pytest.mark.parametrize(
    ("greet", "reason"),
    [
        (greeted(name="a"), "already named a"),
        (greeted(name=""), "1 to 64 characters"),
        (greeted(name="x" * 65), "1 to 64 characters"),
        (greeted(name="x\ny"), "1 to 64 characters"),
        (greeted(examples=0), "says it has 0 rows"),
        (greeted(examples=-3), "says it has -3 rows"),
        (greeted(examples=2**60), "rows"),
        (greeted(validation=-1), "says it has -1 validation rows"),
        (greeted(validation=2**60), "validation rows"),
        (greeted(examples=10**30), "examples is not a whole number"),
        (greeted(have=("x",)), "list of sha256"),
        (fabricate.refuse("train.csv: no such file"), "no such file"),
        (fabricate.fail("the client raised an error"), "raised an error"),
        (
            lambda hello: NeedReply(hello.name, "0" * 64),
            "answered the first query with a NeedReply",
        ),
        (lambda hello: replace(seal(hello), head="{}"), "damaged"),
        (lambda h: corrupt.reseal(seal(h), head=seal(h).head + " " * 2**18), "bytes, more than"),
    ],
)
def test_who_cannot_introduce_itself_is_left_out(greet: Any, reason: str) -> None:
    network = fabricate.network("a", "b", "c")
    network.members[13].greet = greet
    strategy, state, events = started(network)
    assert [n.name for n in strategy.nodes.meet(state, 1)] == ["a", "b"]
    (text,) = seen(events, "warning", "text")
    assert text.startswith("node 13 is left out: ") and reason in text
    network.members[13].greet = None
    assert [n.name for n in strategy.nodes.meet(state, 1)] == ["a", "b", "c"]  # asked again


@pytest.mark.parametrize("left_out", [(12, 13), (11, 12, 13)])
def test_local_only_needs_as_many_clients_as_a_round(left_out: tuple[int, ...]) -> None:
    network = fabricate.network("a", "b", "c")
    for node in left_out:
        network.members[node].greet = fabricate.refuse("train.csv: no such file")
    _, state, events = started(network)
    config = fabricate.config(federation__aggregate="none", federation__clients=3)
    why = (
        rf"^local-only tuning: {3 - len(left_out)} clients of .* = 2 needed \(.*node 13: .*no such"
    )
    no_models: Any = None  # it fails before they are looked at
    with pytest.raises(RunError, match=why):
        local_only(config, network, events, no_models, state)


def test_two_nodes_with_one_name_are_one_too_many() -> None:
    network = fabricate.network("a", "b", "a")
    strategy, state, _ = started(network)
    nodes = strategy.nodes.meet(state, 1)
    assert [(n.id, n.name) for n in nodes] == [(11, "a"), (12, "b")]
    del network.members[11]
    assert [(n.id, n.name) for n in strategy.nodes.meet(state, 2)] == [(13, "a"), (12, "b")]


def test_a_node_that_returns_under_a_new_id_keeps_what_it_has() -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, _ = started(network)
    strategy.run_round(state, 1, "")
    network.members[99] = network.members.pop(12)
    mark = len(network.log)
    outcome = strategy.run_round(state, 2, "")
    assert outcome.good == 3
    assert parts_sent(network, mark)["b"] == {"adapter"}
    assert sorted(n.name for n in strategy.nodes.known.values()) == ["a", "b", "c"]


def test_a_late_node_joins_the_next_round() -> None:
    network = fabricate.network("a", "b")
    strategy, state, events = started(network)
    strategy.nodes.wait = lambda: None  # type: ignore[method-assign]
    assert strategy.run_round(state, 1, "").good == 2
    network.members[50] = Node("0-late", 4)
    assert strategy.run_round(state, 2, "").good == 3
    assert seen(events, "nodes", "names") == [["a", "b"], ["0-late", "a", "b"]]
    assert seen(events, "round_started", "clients")[1] == ["0-late", "a", "b"]


def test_a_node_that_is_gone_is_not_asked() -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, _ = started(network)
    strategy.run_round(state, 1, "")
    del network.members[12]
    mark = len(network.log)
    assert strategy.run_round(state, 2, "").good == 2
    assert set(parts_sent(network, mark)) == {"a", "c"}


def test_waiting_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "_SETTLE_SECONDS", 0.1)
    network = fabricate.network("a")
    strategy, state, events = started(network)
    with pytest.raises(RunError, match=r"only 1 of federation.min-clients = 2 nodes connected"):
        strategy.nodes.wait()
    with pytest.raises(RunError, match="only 1 of"):
        strategy.run_round(state, 1, "")
    network.members[12] = Node("b")
    strategy.nodes.wait()
    assert "only 2 nodes are connected" in seen(events, "warning", "text")[-1]


# --- determinism --------------------------------------------------------------------------


def whole_run(network: Network, config: Config) -> tuple[list[Outcome], State, EventLog]:
    """Six rounds with an alignment after every second one."""
    events = EventLog(None)
    strategy, state, outcomes = Strategy(config, network, events), fabricate.state(), []
    for round in range(1, 7):
        counted = "nonpositive" if round % 2 == 0 else ""
        outcome = strategy.run_round(state, round, counted)
        state.adapter, state.round = outcome.adapter, round
        outcomes.append(outcome)
        if counted:
            fabricate.align(state, round)
    return outcomes, state, events


def bits(outcomes: list[Outcome], state: State) -> list[Any]:
    out: list[Any] = [codec.pack(o.adapter) for o in outcomes]
    out += [(o.loss, o.examples, o.good, o.bad, o.train_seconds) for o in outcomes]
    out += [
        (c.tokens, {b: t.tolist() for b, t in c.inactive.items()})
        for c in (o.counts for o in outcomes)
        if c
    ]
    return [*out, state.digest, [p.to_bytes() for p in state.patches]]


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_replies_does_not_matter(seed: int) -> None:
    """Shuffled, repeated, with other node ids and a disk wiped: the same bits."""
    config = fabricate.config()
    plain, plain_state, plain_events = whole_run(fabricate.network(*NAMES), config)
    rng = random.Random(seed)
    ids = rng.sample(range(1, 1000), len(NAMES))
    members = {i: Node(n, 5 + NAMES.index(n)) for i, n in zip(ids, NAMES, strict=True)}
    network = Network(members, chaos=rng, duplicates=seed % 2 == 0)
    for node in rng.sample(sorted(members), 2):
        members[node].spoil = wiping(members[node], rng)
    shuffled, state, events = whole_run(network, config)
    assert bits(shuffled, state) == bits(plain, plain_state)

    def accepted(log: EventLog) -> list[Any]:
        return sorted(e for e in seen(log, "reply", "round", "client", "status") if e[2] == "ok")

    assert accepted(events) == accepted(plain_events)


def test_replies_are_summed_by_name_where_order_shows_in_the_bits() -> None:
    """1e18 + 1 − 1e18 is 0 or 1 in float64, as the order is."""
    results = set()
    for seed in range(6):
        network = fabricate.network("a", "b", "c", chaos=random.Random(seed))
        for node, value in zip(network.members.values(), (1e18, 1.0, -1e18), strict=True):
            node.examples = 1
            node.spoil = filling(value)
        strategy, state, _ = started(network, wire__max_update_norm=1e30)
        outcome = strategy.run_round(state, 1, "")
        results.add(codec.pack(outcome.adapter))
    assert len(results) == 1
    assert float(outcome.adapter["classifier.bias"][0]) == 0.0  # a, then b, then c


def filling(value: float) -> Any:
    return lambda reply: replace(
        reply, adapter={k: torch.full_like(t, value) for k, t in reply.adapter.items()}
    )


def wiping(node: Node, rng: random.Random) -> Any:
    def spoil(reply: TrainReply) -> TrainReply:
        if rng.random() < 0.5:
            node.packages.clear()
        return reply

    return spoil


def test_duplicates_are_used_once() -> None:
    network = fabricate.network("a", "b", "c", duplicates=True, chaos=random.Random(0))
    network.members[12].spoil = fabricate.refuse("no")
    strategy, state, events = started(network)
    outcome = strategy.run_round(state, 1, "")
    assert (outcome.good, outcome.bad, outcome.examples) == (2, 1, 12)
    assert sorted(seen(events, "reply", "client", "status")) == [
        ("a", "ok"), ("b", "refused"), ("c", "ok"),
    ]  # fmt: skip


def test_a_duplicated_need_is_no_fault() -> None:
    network = fabricate.network("a", "b", "c", duplicates=True)
    strategy, state, events = started(network)
    strategy.run_round(state, 1, "")
    network.members[12].packages.clear()
    outcome = strategy.run_round(state, 2, "")
    assert (outcome.good, outcome.bad) == (3, 0)
    assert [s for c, s in seen(events, "reply", "client", "status")[3:] if c == "b"] == [
        "need", "ok",
    ]  # fmt: skip


def test_a_reply_from_a_node_that_was_not_asked_is_ignored() -> None:
    class Noisy(Network):
        def exchange(
            self, messages: Any, round: int, timeout: float, on_reply: Any, *more: Any
        ) -> None:
            on_reply(777, Failure("who?"))
            super().exchange(messages, round, timeout, on_reply, *more)

    network = Noisy(fabricate.network("a", "b", "c").members)
    strategy, state, _ = started(network)
    assert strategy.run_round(state, 1, "").good == 3


# --- formats and the ledger ---------------------------------------------------------------


def test_reply_format() -> None:
    assert reply_format(fabricate.config(wire__adapter="bf16")) == "bf16"
    assert reply_format(fabricate.config(wire__adapter_up="ternary")) == "ternary"


@pytest.mark.parametrize(
    ("down", "up"), [("bf16", "same"), ("fp16", "int8"), ("fp32", "ternary"), ("int8", "ternary")]
)
def test_formats_differ_by_direction(down: str, up: str) -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, _ = started(network, wire__adapter=down, wire__adapter_up=up)
    outcome = strategy.run_round(state, 1, "")
    assert outcome.good == 3
    fmt = down if up == "same" else up
    replies = [open_envelope(e) for way, _, e in network.log if way == "up"]
    assert {m.fmt for m in replies if isinstance(m, TrainReply)} == {fmt}
    moved = max(float((outcome.adapter[k] - state.adapter[k]).abs().max()) for k in state.adapter)
    assert 0 < moved < 0.1


def test_the_ledger_counts_every_byte_of_every_message() -> None:
    network = fabricate.network(*NAMES, chaos=random.Random(3), duplicates=True)
    network.members[12].spoil = wiping(network.members[12], random.Random(0))
    network.members[13].spoil = fabricate.refuse("no")
    _, _, events = whole_run(network, fabricate.config())
    booked: dict[Any, int] = {}
    for e in events.seen:
        if e["event"] == "bytes":
            key = (e["client"], e["direction"], e["kind"])
            booked[key] = booked.get(key, 0) + e["bytes"]
    crossed: dict[Any, int] = {}

    def cross(envelope: Envelope, name: str, way: str) -> None:
        sizes = [("control", len(envelope.head.encode()) + len(envelope.check))]
        sizes += [(p.partition(".")[0], len(data)) for p, data in envelope.parts.items()]
        for kind, size in sizes:
            crossed[name, way, kind] = crossed.get((name, way, kind), 0) + size

    for way, node, envelope in network.log:
        cross(envelope, network.members[node].name, way)
    assert booked == crossed


def test_training_wall_is_the_union_of_the_clients_intervals() -> None:
    def reply(seconds: float, arrived: float) -> Good:
        return Good(1, 0.0, seconds, arrived)

    assert training_wall([]) == 0.0
    # 1 to 3 and 2 to 4 overlap, 6 to 7 stands alone.
    replies = [reply(2.0, 4.0), reply(1.0, 7.0), reply(2.0, 3.0)]
    assert training_wall(replies) == 4.0
    # No client trained before the round began, whatever it says.
    assert training_wall([reply(100.0, 2.0)]) == 2.0


# --- packages in parts --------------------------------------------------------------------


def reasons(events: EventLog, client: str) -> str:
    found = [e for e in events.seen if e["event"] == "reply" and e["client"] == client]
    return "; ".join(e.get("reason") or "" for e in found)


def test_who_has_another_sub_fm_says_what_it_lacks_and_gets_only_that() -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, events = started(network)
    before = fabricate.package()
    _, state.package = fabricate.aligned(before, 1)
    state.digests = {k: tensor_digest(t) for k, t in state.package.weights.items()}
    state.digest = state.package.digest()
    node = network.members[12]
    node.packages[before.digest()] = before
    node.tensors = {tensor_digest(t): t for t in before.weights.values()}
    node.files = {v: before.files[k] for k, v in before.manifest().files.items()}
    strategy.run_round(state, 1, "")
    assert [s for c, s in seen(events, "reply", "client", "status") if c == "b"] == ["need", "ok"]
    sent = [m for n, m in requests(network) if n == 12]
    parcels = [Parcel.from_bytes(m.package) for m in sent]
    assert not parcels[0].sizes
    new = state.package.manifest().contents - before.manifest().contents
    assert new == parcels[1].sizes.keys() and len(parcels) == 2


def test_a_package_goes_in_messages_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.rounds.requests._MEGABYTE", 1000)
    network = fabricate.network("a", "b", "c")
    strategy, state, _ = started(network, wire__message_mb=1)
    assert strategy.run_round(state, 1, "").good == 3
    for id in network.members:
        sent = [Parcel.from_bytes(m.package) for n, m in requests(network) if n == id]
        assert len(sent) > 2
        assert all(p.size <= 1000 or len(p.sizes) == 1 for p in sent)
        names = [name for p in sent for name in p.sizes]
        assert sorted(names) == sorted(state.package.manifest().contents)


@pytest.mark.parametrize(
    ("lacks", "why"),
    [
        ((), "it lacks nothing"),
        (("f" * 64,), "none of the sub-FM's"),
        ("all", "lacks the sub-FM as before"),
    ],
)
def test_a_client_that_says_nonsense_of_what_it_lacks(lacks: Any, why: str) -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, events = started(network)
    every = tuple(sorted(state.package.manifest().contents))
    said = every if lacks == "all" else lacks
    network.members[12].spoil = lambda r: NeedReply(r.name, r.digest, (), said)
    outcome = strategy.run_round(state, 1, "")
    assert (outcome.good, outcome.bad) == (2, 1)
    assert why in reasons(events, "b")


def test_a_need_for_another_sub_fm_is_refused() -> None:
    network = fabricate.network("a", "b", "c")
    network.members[12].spoil = lambda r: NeedReply(r.name, "f" * 64)
    strategy, state, events = started(network)
    assert strategy.run_round(state, 1, "").bad == 1
    assert "another sub-FM" in reasons(events, "b")


def test_a_node_of_another_protocol_is_left_out_and_says_which() -> None:
    def older(hello: HelloReply) -> Any:
        sealed = seal(hello)
        head = json.dumps(json.loads(sealed.head) | {"protocol": PROTOCOL - 1})
        return corrupt.reseal(sealed, head=head)

    network = fabricate.network("a", "b", "c")
    network.members[12].greet = older
    strategy, state, events = started(network)
    assert strategy.run_round(state, 1, "").good == 2
    said = [e["text"] for e in events.seen if e["event"] == "warning"]
    both = (f"protocol '{PROTOCOL - 1}'", f"this side {PROTOCOL}")
    assert any(all(part in text for part in both) for text in said), said


def test_a_link_cut_after_most_of_a_package_costs_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.rounds.requests._MEGABYTE", 500)
    network = fabricate.network("a", "b", "c")
    strategy, state, _ = started(network, wire__message_mb=1)
    node = network.members[12]
    whole = Parcel.from_bytes(state.package.to_bytes()).size
    answer, cut = node.answer, []

    def cutting(envelope: Envelope) -> Envelope | Failure:
        arrived = sum(t.nbytes for t in node.tensors.values()) + sum(map(len, node.files.values()))
        if envelope.kind == "train" and arrived >= 0.8 * whole and not cut:
            cut.append(arrived)
            return Failure("the node is gone")
        return answer(envelope)

    monkeypatch.setattr(node, "answer", cutting)
    assert strategy.run_round(state, 1, "").bad == 1 and cut
    mark = len(requests(network))
    assert strategy.run_round(state, 2, "").bad == 0
    sent = [m.package for n, m in requests(network)[mark:] if n == 12 and m.package]
    again = [Parcel.from_bytes(data) for data in sent]
    assert not again[0].sizes, "the manifest, for it to say what it lacks"
    assert 0 < sum(p.size for p in again) <= whole - cut[0]


def test_what_was_lost_while_it_was_served_is_made_good_by_the_whole_package() -> None:
    network = fabricate.network("a", "b", "c")
    strategy, state, events = started(network)
    node = network.members[12]
    node.packages["f" * 64] = fabricate.package(7)  # so that it is asked what it lacks
    every = sorted(state.package.manifest().contents)
    answer, needs = node.answer, iter([tuple(every[:2]), tuple(every[:4])])

    def losing(envelope: Envelope) -> Envelope | Failure:
        lacks = next(needs, None) if envelope.kind == "train" else None
        if lacks is None:
            return answer(envelope)
        return seal(NeedReply("b", state.digest, ("f" * 64,), lacks))

    node.answer = losing  # type: ignore[method-assign]
    assert strategy.run_round(state, 1, "").good == 3
    sent = [set(Parcel.from_bytes(m.package).sizes) for n, m in requests(network) if n == 12]
    assert sent == [set(), set(every[:2]), set(every)]
    found = [s for c, s in seen(events, "reply", "client", "status") if c == "b"]
    assert found == ["need", "need", "ok"]
