"""Clients that send well-formed lies, and clients that do not answer: what they cannot do."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import fabricate
import pytest
import torch
from fabricate import Network
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedpft_core.adapter.lora import change_norms
from fedpft_core.errors import RunError, UserError
from fedpft_core.head.statistics import Statistics
from fedpft_core.tensors import Tensors
from fedpft_core.wire import flower as wire
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import Hello, HelloReply, TrainReply
from server_app.rounds import caution
from server_app.run.events import EventLog
from server_app.strategy import Strategy
from server_app.transport import FlowerTransport

NAMES = tuple("abcdefghi")


def started(network: Any, **keys: Any) -> tuple[Strategy, Any, EventLog]:
    keys = {"federation__clients_per_round": 9, "federation__min_clients": 2} | keys
    events = EventLog(None)
    return Strategy(fabricate.config(**keys), network, events), fabricate.state(), events


def warnings(events: EventLog) -> list[str]:
    return [e["text"] for e in events.seen if e["event"] == "warning"]


def moved(tensors: Tensors, factor: float, only: str = "") -> Any:
    """A client that sends its change `factor` times."""
    start = fabricate.adapter()

    def spoil(made: TrainReply) -> TrainReply:
        return replace(made, adapter={
            k: start[k] + (factor if only in k else 1) * (t - start[k])
            for k, t in made.adapter.items()
        })  # fmt: skip

    return spoil


def distance(a: Tensors, b: Tensors) -> float:
    return sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5


def honest(**keys: Any) -> tuple[Tensors, float]:
    """The outcome without attackers, and how far it moved."""
    strategy, state, _ = started(fabricate.network(*NAMES), **keys)
    found = strategy.run_round(state, 1, "").adapter
    return found, distance(found, state.adapter)


# --- claims of rows -----------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["capped", "uniform"])
def test_a_claim_of_very_many_rows_does_not_own_the_round(weighting: str) -> None:
    network = fabricate.network(*NAMES)
    liar = network.members[11]
    liar.examples = 2**40 - 1
    liar.spoil = lambda made: replace(made, loss=1e6, adapter={
        k: t + 0.005 for k, t in made.adapter.items()
    })  # fmt: skip
    keys = {"federation__weighting": weighting, "federation__weight_cap": 0.15}
    strategy, state, _ = started(network, **keys)
    got = strategy.run_round(state, 1, "nonpositive")
    want, length = honest(**keys)
    assert distance(got.adapter, want) < length
    # Its counts weigh as little, and its absurd loss is no part of the mean.
    assert got.loss < 2
    assert got.counts is not None
    total = got.counts.tokens[fabricate.PLAN.pruned[0]]
    assert total <= 2 * 3 * sum(m.examples for m in network.members.values() if m is not liar)
    believed, state, events = started(network)
    outcome = believed.run_round(state, 1, "")
    reply = open_envelope(next(e for way, n, e in reversed(network.log) if (way, n) == ("up", 11)))
    assert isinstance(reply, TrainReply)
    assert distance(outcome.adapter, reply.adapter) < 1e-3 * distance(reply.adapter, state.adapter)
    assert any("a has 100% of all rows" in text for text in warnings(events))
    believed.run_round(state, 2, "")
    assert sum("of all rows" in text for text in warnings(events)) == 1


def test_nobody_is_warned_of_where_rows_are_about_equal() -> None:
    strategy, state, events = started(fabricate.network(*NAMES))
    strategy.run_round(state, 1, "")
    assert not warnings(events)


def test_validation_rows_and_counts_weigh_as_examples_do() -> None:
    f = fabricate.config(
        federation__weighting="capped", federation__weight_cap=0.25,
        federation__clients_per_round=9,
    ).federation  # fmt: skip
    parts = caution.scales([10, 10, 10, 2**40 - 1], f)
    assert parts[:3] == [1, 1, 1] and parts[3] * (2**40 - 1) == pytest.approx(10)
    assert caution.scales([3, 5], fabricate.config().federation) == [1, 1]
    stats = Statistics.of(torch.randn(50, 4).double(), torch.arange(50) % 3, 3)
    some = stats.part(0.01)
    assert torch.allclose(some.means(), stats.means()) and float(some.counts.sum()) == 0.5


def test_a_loss_out_of_all_proportion_is_left_out_of_the_mean() -> None:
    assert caution.mean_loss([1.0, 2.0, 3.0], [1, 1, 2]) == 9 / 4
    assert caution.mean_loss([1.0, 2.0, 1e30, 3.0], [1, 1, 5, 2]) == 9 / 4
    assert caution.mean_loss([1.0, 1e30], [1, 1]) == (1 + 1e30) / 2  # nobody knows which


# --- lengths of changes -------------------------------------------------------------------


@pytest.mark.parametrize("only", ["", "lora", "classifier"])
def test_a_change_many_times_the_rounds_median_is_left_out(only: str) -> None:
    """Sign-flipped and scaled to just under wire.max-update-norm, it used to be averaged."""
    network = fabricate.network(*NAMES)
    for i in (11, 12):
        network.members[i].spoil = moved({}, -2000.0, only)
    strategy, state, events = started(network)
    got = strategy.run_round(state, 1, "")
    assert (got.good, got.bad) == (7, 2)
    assert distance(got.adapter, state.adapter) < 0.1
    said = warnings(events)
    assert len(said) == 2 and "a is left out" in said[0] and "largest-change" in said[0]
    strategy, state, _ = started(network, federation__largest_change=0.0)
    assert distance(strategy.run_round(state, 1, "").adapter, state.adapter) > 1


def test_too_few_left_is_a_failed_round() -> None:
    network = fabricate.network("a", "b", "c")
    network.members[11].spoil = moved({}, -500.0)
    strategy, state, _ = started(network, federation__clients_per_round=3,
                                 federation__min_clients=3)  # fmt: skip
    with pytest.raises(RunError, match="a: its change"):
        strategy.run_round(state, 1, "")


def test_more_steps_may_go_further() -> None:
    norms = {n: {"the head": 1.0} for n in "abc"} | {"d": {"the head": 20.0}}
    assert list(caution.outliers(norms, dict.fromkeys("abcd", 1), 10)) == ["d"]
    assert not caution.outliers(norms, {"a": 1, "b": 1, "c": 1, "d": 9}, 10)
    assert not caution.outliers({"a": {"x": 0.0}, "b": {"x": 0.0}, "c": {"x": 5.0}}, dict.fromkeys(
        "abc", 1), 10)  # fmt: skip  # most did not move: no measure


def test_norms_of_a_change_are_those_of_the_dense_matrices() -> None:
    start, new = fabricate.adapter(0), fabricate.adapter(1)
    found = change_norms(new, start, 3.0)
    a, b = (next(k for k in start if k.endswith(f"lora_{x}.weight")) for x in "AB")
    product = 3 * (new[b].double() @ new[a].double() - start[b].double() @ start[a].double())
    assert found["LoRA's product"] == pytest.approx(float(product.norm()))
    both = [(new[k].double() - start[k].double()).square().sum() for k in (a, b)]
    assert found["LoRA's factors"] == pytest.approx(float(sum(both)) ** 0.5)
    rest = [(new[k] - start[k]).double().square().sum() for k in start if "classifier" in k]
    assert found["the head"] == pytest.approx(float(sum(rest)) ** 0.5)


# --- time ---------------------------------------------------------------------------------


def test_a_round_ends_at_enough_good_replies() -> None:
    network = fabricate.network(*NAMES)
    strategy, state, events = started(network, federation__enough=4)
    got = strategy.run_round(state, 1, "")
    assert (got.good, got.bad) == (4, 0)
    status = [e["status"] for e in events.seen if e["event"] == "reply"]
    assert status == ["ok"] * 4 + ["late"] * 5


def test_bad_replies_are_not_enough() -> None:
    network = fabricate.network(*NAMES)
    network.members[11].spoil = fabricate.refuse("no")
    strategy, state, _ = started(network, federation__enough=4)
    got = strategy.run_round(state, 1, "")
    assert (got.good, got.bad) == (4, 1)


@pytest.mark.parametrize("enough", [1, 10])
def test_enough_lies_between_what_is_needed_and_what_is_asked(enough: int) -> None:
    with pytest.raises(UserError, match=r"federation\.enough"):
        fabricate.config(federation__enough=enough, federation__clients_per_round=9)


def test_a_need_does_not_renew_the_clock() -> None:
    waited: list[float] = []

    class Timed(Network):
        def exchange(
            self, messages: Any, round: int, timeout: float, on_reply: Any, *more: Any
        ) -> None:
            waited.append(timeout)
            super().exchange(messages, round, timeout, on_reply, *more)

    network = Timed(fabricate.network("a", "b", "c").members)
    strategy, state, _ = started(network, federation__clients_per_round=3)
    strategy.run_round(state, 1, "")
    network.members[12].packages.clear()
    waited.clear()
    assert strategy.run_round(state, 2, "").good == 3
    again = waited[-1]
    assert again < 30.0  # what is left of the round's time, not as much again


def test_a_round_waits_no_longer_than_past_rounds_have_taught() -> None:
    strategy, state, _ = started(fabricate.network(*NAMES), federation__patience=3.0,
                                 federation__round_timeout=500.0)  # fmt: skip
    assert strategy.patience.seconds(1) == 500.0
    strategy.run_round(state, 1, "")
    assert strategy.patience.seconds(2) == 500.0
    assert strategy.patience.seconds(3) == 10.0  # replies take milliseconds here
    strategy.patience.slowest = 40.0
    assert strategy.patience.seconds(3) == 120.0
    strategy.patience.slowest = 400.0
    assert strategy.patience.seconds(3) == 500.0


def test_flower_is_not_asked_for_replies_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A grid whose second node never answers: the exchange ends with the first one's reply."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 2**62, raising=False)
    sent: list[Message] = []

    def pull(ids: list[str]) -> list[Any]:
        out = []
        for i in ids:
            if i == "m1":
                content = wire.to_record(seal(HelloReply("a", 5)))
                meta = SimpleNamespace(reply_to_message_id=i)
                out.append(SimpleNamespace(metadata=meta, content=content, has_error=lambda: False))
        return out

    def push(messages: list[Message]) -> list[str]:
        sent.extend(messages)
        return [f"m{len(sent)}"]

    grid = SimpleNamespace(push_messages=push, pull_messages=pull)
    got: list[tuple[int, Any]] = []

    def take(node: int, reply: Any) -> bool:
        got.append((node, reply))
        return True

    thread = threading.Thread(
        target=FlowerTransport(grid).exchange,  # type: ignore[arg-type]
        args=({1: seal(Hello()), 2: seal(Hello())}, 1, 3600.0, take),
        daemon=True,
    )
    thread.start()
    end = time.monotonic() + 30
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.05)
    assert not thread.is_alive()
    assert [node for node, _ in got] == [1, 2] and got[1][1].late


def test_more_attackers_than_a_rule_stands_are_warned_of_once() -> None:
    keys = {"federation__aggregate": "krum", "federation__attackers": 0.4}
    network = fabricate.network("a", "b", "c", "d")
    strategy, state, events = started(network, federation__clients_per_round=4, **keys)
    for round in (1, 2):
        strategy.run_round(state, round, "")
    assert warnings(events) == [
        "federation.aggregate = krum stands 0 attackers among 4 replies, not the 2 of "
        "federation.attackers = 0.4"
    ]
    strategy, state, events = started(fabricate.network(*NAMES), federation__aggregate="krum")
    strategy.run_round(state, 1, "")
    assert not warnings(events)


def test_the_recommended_configuration_is_one() -> None:
    from pathlib import Path

    from fedpft_core.config import from_flat, read_file

    found = from_flat(read_file(Path(__file__).parents[2] / "examples" / "hospital" / "run.yaml"))
    f = found.federation
    assert (f.aggregate, f.weighting) == ("geometric-median", "uniform")
    assert f.min_clients <= f.enough <= f.clients_per_round
