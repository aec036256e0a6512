"""Merging figures and ranks of single clients: fabricated replies, and whole runs in-process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import corrupt
import fabricate
import numpy as np
import pytest
import scripted
import tiny
import torch
from fabricate import Network
from safetensors.torch import load_file

from fedpft_core import config as configs
from fedpft_core.adapter.lora import rank_of
from fedpft_core.adapter.ranks import narrowed, widened
from fedpft_core.config.ranks import ranks_of
from fedpft_core.errors import UserError
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import HelloReply, TrainReply, TrainRequest
from server_app.run.events import EventLog
from server_app.state import State
from server_app.strategy import Strategy

SHOT = {"federation.schedule": "one-shot", "federation.rounds": 1}
A, B = "lora_A.weight", "lora_B.weight"


def started(network: Network, **keys: Any) -> tuple[Strategy, State, EventLog]:
    flat: dict[str, Any] = {
        "federation.clients": 3, "federation.clients-per-round": 3, "federation.min-clients": 1,
        "wire.adapter": "fp32", "federation.node-timeout": 0.2, "lora.rank": 2,
        "federation.largest-change": 0.0,
    }  # fmt: skip
    flat |= {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
    events = EventLog(None)
    return Strategy(configs.from_flat(flat), network, events), fabricate.state(), events


def with_figures(change: Callable[[Tensors], Tensors] = dict) -> Callable[[Any], Any]:
    """A node that sends Fisher figures of what it has trained."""

    def spoil(reply: TrainReply) -> TrainReply:
        figures = {k: t.float().square() for k, t in reply.adapter.items()}
        return replace(reply, merging=change(codec.encode(figures, "bf16")))

    return spoil


def altered(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    def made(figures: Tensors) -> Tensors:
        name = min(figures)
        return figures | {name: change(figures[name])}

    return made


BAD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "none": (lambda f: {}, "merging figures: missing tensor"),
    "negative": (altered(lambda t: t - 1), "negative squares"),
    "nan": (altered(lambda t: t * float("nan")), "not finite"),
    "shape": (altered(lambda t: t[:1].contiguous()), "merging figures: tensor"),
    "format": (lambda f: {k: t.float() for k, t in f.items()}, "not bfloat16"),
    "name": (lambda f: f | {"x": torch.zeros(1)}, "unexpected tensor 'x'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_figures_are_refused_by_name(kind: str) -> None:
    change, why = BAD[kind]
    network = fabricate.network("a", "b", "c")
    network.members[12].spoil = with_figures(change)
    strategy, state, events = started(network, federation__aggregate="fisher")
    outcome = strategy.run_round(state, 1, "")
    assert (outcome.good, outcome.bad) == (2, 1)
    (event,) = [e for e in events.seen if e["event"] == "reply" and e["client"] == "b"]
    assert event["status"] == "refused" and why in event["reason"], event["reason"]


def test_figures_that_nobody_asked_for_are_refused() -> None:
    network = fabricate.network("a", "b", "c")
    network.members[12].spoil = with_figures()
    strategy, state, events = started(network)
    assert strategy.run_round(state, 1, "").bad == 1
    (event,) = [e for e in events.seen if e["event"] == "reply" and e["client"] == "b"]
    assert "merging figures: unexpected tensor" in event["reason"]


@pytest.mark.parametrize(("gram", "why"), [
    (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
    (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
    (torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]), "not finite"),
])  # fmt: skip
def test_products_that_no_inputs_have_are_refused(gram: torch.Tensor, why: str) -> None:
    network = fabricate.network("a", "b", "c")

    def spoil(found: torch.Tensor) -> Callable[[Any], Any]:
        def made(reply: TrainReply) -> TrainReply:
            return replace(reply, merging={k: found for k in reply.adapter if k.endswith(B)})

        return made

    network.members[12].spoil = spoil(gram)
    strategy, state, events = started(network, federation__aggregate="regmean")
    assert strategy.run_round(state, 1, "").bad == 1
    (event,) = [e for e in events.seen if e["event"] == "reply" and e["client"] == "b"]
    assert why in event["reason"]


# --- whole runs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    quick = {
        "distill.steps": 2, "align.interval": 0, "federation.clients-per-round": 4,
        "train.local-steps": 3, "run.evaluate-every": 9, "run.gradient-rows": 0,
        "wire.adapter": "fp32",
    }  # fmt: skip
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=90) | quick


def exchanged(federation: tiny.Federation) -> list[tuple[TrainRequest, TrainReply]]:
    out = []
    for (_, sent), (_, received) in zip(federation.sent, federation.received, strict=True):
        request, reply = open_envelope(sent), open_envelope(received)
        if isinstance(request, TrainRequest) and isinstance(reply, TrainReply):
            out.append((request, reply))
    return out


@pytest.mark.parametrize(("rule", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
@pytest.mark.parametrize("schedule", ["one-shot", "multi-round", "async"])
def test_clients_send_figures_where_the_rule_needs_them(
    flat: dict[str, Any], tmp_path: Path, rule: str, kind: str, schedule: str
) -> None:
    keys = {"federation.aggregate": rule, "federation.schedule": schedule}
    federation = tiny.Federation(flat | keys | {"federation.rounds": 1})
    events = tiny.run(flat | keys | {"federation.rounds": 1}, tmp_path / "run", federation)
    assert events[-1]["event"] == "run_finished"
    pairs = exchanged(federation)
    assert pairs and all(q.merging_rule == kind for q, _ in pairs)
    for request, reply in pairs:
        assert request.settings.factors == ("b" if kind == "gram" else "both")
        if kind == "fisher":
            values = sum(t.numel() for t in reply.adapter.values())
            assert sum(t.numel() * t.element_size() for t in reply.merging.values()) == 2 * values
        else:
            assert {tuple(t.shape) for t in reply.merging.values()} == {(4, 4)}
    up = [e for e in events if e["event"] == "bytes" and e["kind"] == "merging"]
    assert len(up) == len(pairs) and {e["direction"] for e in up} == {"up"}


def test_one_shot_with_figures_does_not_depend_on_the_order(
    flat: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for i, seconds in enumerate(({1: 8.0, 2: 6.0, 3: 4.0}, {4: 9.0})):
        clients = scripted.Clients(
            flat | SHOT | {"federation.aggregate": "fisher"}, seconds=seconds
        )
        tiny.run(clients.flat, tmp_path / f"{i}", clients)
        found.append((tmp_path / f"{i}/adapter/adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


# --- ranks --------------------------------------------------------------------------------


def test_ranks_are_read_from_one_text() -> None:
    assert ranks_of("") == {} and ranks_of("a=2, b-1=16") == {"a": 2, "b-1": 16}
    for text, why in (("a", "'a'"), ("=2", "'=2'"), ("a=0", "'a=0'"), ("a=x", "'a=x'"),
                      ("a=1,a=2", "a twice")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            ranks_of(text)
    with pytest.raises(UserError, match=r"federation.ranks gives a the rank 9.*lora.rank = 8"):
        configs.from_flat({"federation.ranks": "a=9"})
    with pytest.raises(UserError, match=r"privacy.secure.*federation.ranks"):
        configs.from_flat({"federation.ranks": "a=2", "privacy.secure": True})


def test_a_narrower_adapter_and_back() -> None:
    start = fabricate.adapter()
    small = narrowed(start, 1)
    assert rank_of(small) == 1 and rank_of(start) == 2
    assert tiny.same_bits(widened(small, start), dict(start))
    assert tiny.same_bits(narrowed(start, 2), dict(start))


def announcing(rank: int) -> Callable[[HelloReply], HelloReply]:
    return lambda hello: replace(hello, rank=rank)


def test_a_client_trains_at_the_rank_that_it_announced() -> None:
    network = fabricate.network("a", "b", "c")
    network.members[12].greet = announcing(1)
    strategy, state, _ = started(network)
    outcome = strategy.run_round(state, 1, "")
    assert outcome.good == 3
    ranks = {
        network.members[n].name: rank_of(m.adapter)
        for way, n, e in network.log
        if way == "down" and isinstance(m := open_envelope(e), TrainRequest)
    }
    assert ranks == {"a": 2, "b": 1, "c": 2}
    replies = {
        network.members[n].name: m
        for way, n, e in network.log
        if way == "up" and isinstance(m := open_envelope(e), TrainReply)
    }
    total = sum(r.examples for r in replies.values())
    for key, value in outcome.adapter.items():
        want = np.zeros(value.shape)
        for reply in replies.values():
            full = state.adapter[key].double().numpy().copy()  # what it does not train stays
            t = reply.adapter[key].double().numpy()
            full[tuple(slice(0, n) for n in t.shape)] = t
            want += reply.examples / total * full
        assert np.allclose(value.numpy(), want, atol=1e-6)


def test_another_rank_than_announced_is_refused_by_name() -> None:
    network = fabricate.network("a", "b", "c")
    network.members[12].greet = announcing(1)

    def grown(reply: TrainReply) -> TrainReply:
        tensors = {
            k: torch.cat([t, t]) if k.endswith(A)
            else torch.cat([t, t], dim=1) if k.endswith(B) else t
            for k, t in reply.adapter.items()
        }  # fmt: skip
        return replace(reply, adapter=tensors)

    network.members[12].spoil = grown
    strategy, state, events = started(network)
    assert strategy.run_round(state, 1, "").bad == 1
    (event,) = [e for e in events.seen if e["event"] == "reply" and e["client"] == "b"]
    assert event["status"] == "refused"
    assert "the adapter has rank 2, not the 1 announced" in event["reason"]


@pytest.mark.parametrize("rank", [-1, 2**40])
def test_a_rank_that_cannot_be_is_left_out(rank: int) -> None:
    network = fabricate.network("a", "b", "c")
    network.members[12].greet = announcing(rank)
    strategy, state, events = started(network)
    assert strategy.run_round(state, 1, "").good == 2
    assert any(f"client b says it trains at rank {rank}" in e.get("text", "")
               for e in events.seen)  # fmt: skip


@pytest.mark.parametrize("rule", ["average", "product", "stacked", "fisher", "regmean"])
def test_runs_of_clients_with_different_ranks(
    flat: dict[str, Any], tmp_path: Path, rule: str
) -> None:
    """Exact products at alpha / rank alike: what each client has trained counts, and no more."""
    keys = SHOT | {
        "federation.aggregate": rule, "federation.ranks": "client-1=1,client-3=2",
        "head.start": "zero", "head.end": "trained", "plug.method": "as-trained",
        "federation.largest-change": 0.0,
    }  # fmt: skip
    federation = tiny.Federation(flat | keys)
    events = tiny.run(flat | keys, tmp_path / "run", federation)
    assert events[-1]["event"] == "run_finished"
    pairs = exchanged(federation)
    assert sorted(rank_of(q.adapter) for q, _ in pairs) == [1, 2, 4, 4]
    final = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    total = sum(r.examples for _, r in pairs)
    if rule == "stacked":
        assert {len(t) for k, t in final.items() if k.endswith(A)} == {1 + 2 + 4 + 4}
    for name in (k for k in pairs[0][0].adapter if k.endswith(A)):
        other = name.replace(A, B)
        if rule != "stacked":
            continue
        want = sum(
            r.examples / total * r.adapter[other].double() @ r.adapter[name].double()
            for _, r in pairs
        )
        a, b = (next(t for k, t in final.items() if k.endswith(n)) for n in (name, other))
        assert torch.allclose(b.double() @ a.double(), want, atol=1e-6)


def test_rounds_go_on_at_different_ranks(flat: dict[str, Any], tmp_path: Path) -> None:
    keys = {
        "federation.aggregate": "product", "federation.ranks": "client-1=1",
        "federation.rounds": 3, "wire.adapter": "int8", "federation.largest-change": 0.0,
    }  # fmt: skip
    federation = tiny.Federation(flat | keys)
    events = tiny.run(flat | keys, tmp_path / "run", federation)
    assert [e["good"] for e in events if e["event"] == "round_finished"] == [4, 4, 4]
    ranks = [rank_of(codec.decode(q.adapter, q.fmt)) for q, _ in exchanged(federation)]
    assert sorted(ranks) == [1] * 3 + [4] * 9


def test_a_reply_is_sealed_with_its_figures() -> None:
    reply = fabricate.reply(fabricate.expected(counted=False))
    sealed = seal(replace(reply, merging={"x": torch.ones(3)}))
    assert sealed.sizes()["merging"] > 12
    back = open_envelope(sealed)
    assert isinstance(back, TrainReply) and torch.equal(back.merging["x"], torch.ones(3))
    assert corrupt.reseal(sealed).parts.keys() == {"adapter", "merging"}
