"""Secure aggregation over messages: the sum is exact, whoever is lost in whichever exchange."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest
import torch
from fabricate import Network
from masking import SecureNode

from fedpft_core.errors import RunError, UserError
from fedpft_core.secure import ring
from fedpft_core.tensors import Tensors
from fedpft_core.wire.envelope import Envelope, open_envelope
from fedpft_core.wire.messages import (
    SecureTrainReply,
)
from server_app.run.events import EventLog
from server_app.state import State
from server_app.strategy import Strategy

NAMES = tuple("abcdefg")
SECURE = {
    "privacy__secure": True, "federation__weighting": "uniform", "head__start": "zero",
    "head__end": "trained", "plug__method": "as-trained", "federation__min_clients": 3,
    "federation__clients_per_round": 7, "federation__attempts": 1,
}  # fmt: skip


def network(root: Path, names: tuple[str, ...] = NAMES) -> Network:
    return Network({
        11 + i: SecureNode(n, 5 + i, root=root) for i, n in enumerate(names)
    })  # fmt: skip


def started(net: Network, **keys: Any) -> tuple[Strategy, State, EventLog]:
    events = EventLog(None)
    return Strategy(fabricate.config(**(SECURE | keys)), net, events), fabricate.state(), events


def expected(net: Network, names: str, start: Tensors, round: int = 1) -> tuple[Tensors, float]:
    """The plain mean of the quantised changes, and of the losses."""
    plain = [m.plain[round] for m in net.members.values() if m.name in names]  # type: ignore[attr-defined]
    total = np.sum(plain, axis=0)
    step = 0.1 / ring.largest(16)
    out, at = {}, 0
    for k in sorted(start):
        n = start[k].numel()
        change = torch.from_numpy(total[at : at + n] * (step / len(plain))).reshape(start[k].shape)
        out[k] = (start[k].double() + change).float()
        at += n
    return out, float(total[at]) * ring.LOSS_REACH / ring.largest(16) / len(plain)


def sent(net: Network, way: str, kind: str) -> list[tuple[int, Envelope]]:
    return [(n, e) for w, n, e in net.log if w == way and e.kind == kind]


@pytest.mark.parametrize(
    ("lost", "names"),
    [("", "abcdefg"), ("keys", "acdefg"), ("shares", "acdefg"), ("secure-train", "acdefg"),
     ("reveal", "abcdefg")],
)  # fmt: skip
def test_the_mean_is_that_of_the_quantised_changes_exactly(
    tmp_path: Path, lost: str, names: str
) -> None:
    """With nobody lost, and with one lost in each exchange; lost after it was sent, it counts."""
    net = network(tmp_path)
    net.members[12].lost = lost  # type: ignore[attr-defined]
    strategy, state, events = started(net)
    start = {k: t.clone() for k, t in state.adapter.items()}
    got = strategy.run_round(state, 1, "")
    want, loss = expected(net, names, start)
    assert all(torch.equal(got.adapter[k], want[k]) for k in want)
    assert got.loss == loss == pytest.approx(1.0, abs=0.01)
    assert (got.good, got.bad) == (len(names), 1 if lost else 0)
    status = [(e["client"], e["status"]) for e in events.seen if e["event"] == "reply"]
    assert [c for c, s in status if s == "ok"] == sorted(names)
    assert bool(lost) == (("b", "refused") in status)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("lost", ["", "secure-train", "reveal"])
def test_counts_come_out_exactly(tmp_path: Path, lost: str, bits: int) -> None:
    net = network(tmp_path)
    net.members[12].lost = lost  # type: ignore[attr-defined]
    strategy, state, _ = started(net, privacy__secure_bits=bits)
    names = "acdefg" if lost == "secure-train" else "abcdefg"
    got = strategy.run_round(state, 1, "nonpositive").counts
    assert got is not None
    rows = {n: 5 + NAMES.index(n) for n in names}
    made = [fabricate.counts(n, 1, 3 * r) for n, r in rows.items()]
    assert got.tokens == dict.fromkeys(fabricate.PLAN.pruned, 3 * sum(rows.values()))
    for block in fabricate.PLAN.pruned:
        assert got.inactive[block].tolist() == sum(c[f"{block}"] for c in made).tolist()
    assert not [e for _, e in sent(net, "up", "secure-train-reply") if "counts" in e.parts]


def test_counts_that_cannot_be_are_left_out_and_said(tmp_path: Path) -> None:
    """One client's counts are over more tokens than all rows have; the changes still count."""
    net = network(tmp_path)
    net.members[12].spoil = lambda made: replace(made, counts=fabricate.counts("b", 1, 500))
    strategy, state, events = started(net)
    start = {k: t.clone() for k, t in state.adapter.items()}
    got = strategy.run_round(state, 1, "nonpositive")
    want, _ = expected(net, "abcdefg", start)
    assert got.counts is None and all(torch.equal(got.adapter[k], want[k]) for k in want)
    said = [e["text"] for e in events.seen if e["event"] == "warning"]
    assert any("the sum of all counts is not used" in text for text in said)


def test_one_lost_in_each_exchange_at_once(tmp_path: Path) -> None:
    net = network(tmp_path, tuple("abcdefghij"))
    for member, lost in zip("abcd", ("keys", "shares", "secure-train", "reveal"), strict=True):
        next(m for m in net.members.values() if m.name == member).lost = lost  # type: ignore[attr-defined]
    strategy, state, _ = started(net, federation__clients_per_round=10,
                                 privacy__secure_threshold=0.5)  # fmt: skip
    start = {k: t.clone() for k, t in state.adapter.items()}
    got = strategy.run_round(state, 1, "")
    want, _ = expected(net, "defghij", start)
    assert all(torch.equal(got.adapter[k], want[k]) for k in want)


def test_rounds_follow_one_another_with_new_keys(tmp_path: Path) -> None:
    net = network(tmp_path)
    strategy, state, _ = started(net, privacy__secure_neighbours=4)
    for round in (1, 2):
        start = {k: t.clone() for k, t in state.adapter.items()}
        state.adapter = strategy.run_round(state, round, "").adapter
        want, _ = expected(net, "abcdefg", start, round)
        assert all(torch.equal(state.adapter[k], want[k]) for k in want)
    shown = [open_envelope(e) for _, e in sent(net, "up", "keys-reply")]
    assert len({m.masking for m in shown}) == len(shown) == 14  # type: ignore[union-attr]
    peers = [open_envelope(e).peers for _, e in sent(net, "down", "shares")]  # type: ignore[union-attr]
    assert {len(p) for p in peers} == {4}


def test_the_server_sees_no_change_loss_or_count_of_one_client(tmp_path: Path) -> None:
    net = network(tmp_path)
    strategy, state, _ = started(net)
    strategy.run_round(state, 1, "")
    for node, envelope in sent(net, "up", "secure-train-reply"):
        message = open_envelope(envelope)
        assert isinstance(message, SecureTrainReply)
        assert '"loss"' not in envelope.head and '"examples"' not in envelope.head
        plain = net.members[node].plain[1]  # type: ignore[attr-defined]
        k = ring.width(16, 7)
        values = ring.unpack(message.adapter["masked"].numpy().tobytes(), len(plain), k)
        assert np.mean(values == ring.wrap(plain, k)) < 0.05


def test_too_many_lost_fails_the_round_and_says_who(tmp_path: Path) -> None:
    net = network(tmp_path)
    for node in (11, 12, 13, 14):
        net.members[node].lost = "reveal"  # type: ignore[attr-defined]
    strategy, state, _ = started(net)
    with pytest.raises(RunError, match="shares of the"):
        strategy.run_round(state, 1, "")
    net = network(tmp_path)
    for node in range(11, 16):
        net.members[node].lost = "secure-train"  # type: ignore[attr-defined]
    strategy, state, _ = started(net)
    with pytest.raises(RunError, match=r"2 good replies of the federation\.min-clients = 3"):
        strategy.run_round(state, 1, "")


@pytest.mark.parametrize(
    ("kind", "change", "why"),
    [
        ("KeysReply", {"masking": "00" * 32}, "a public key is none"),
        ("KeysReply", {"session": "0" * 32}, "another session"),
        ("KeysReply", {"name": "c"}, "signed"),
        ("SharesReply", {"shares": {}}, "not one for each neighbour"),
        ("SecureTrainReply", {"adapter": {"masked": torch.zeros(3, dtype=torch.uint8)}}, "bytes"),
        ("SecureTrainReply", {"adapter": {"x": torch.zeros(3)}}, "not the one tensor"),
        ("SecureTrainReply", {"round": 7}, "another round"),
        ("SecureTrainReply", {"seconds": -1.0}, "not positive"),
        ("RevealReply", {"own_shares": {}}, "not those asked for"),
    ],
)
def test_a_reply_that_does_not_fit_is_refused_and_the_round_goes_on(
    tmp_path: Path, kind: str, change: dict[str, Any], why: str
) -> None:
    net = network(tmp_path)

    def bend(made: Any) -> Any:
        return replace(made, **change) if type(made).__name__ == kind else made

    net.members[12].bend = bend  # type: ignore[attr-defined]
    strategy, state, events = started(net)
    start = {k: t.clone() for k, t in state.adapter.items()}
    got = strategy.run_round(state, 1, "")
    names = "abcdefg" if kind == "RevealReply" else "acdefg"
    want, _ = expected(net, names, start)
    assert all(torch.equal(got.adapter[k], want[k]) for k in want)
    (reason,) = [e["reason"] for e in events.seen if e["event"] == "reply" and "reason" in e]
    assert why in reason


def test_wrong_shares_are_noticed_not_summed(tmp_path: Path) -> None:
    net = network(tmp_path)

    def bend(made: Any) -> Any:
        if type(made).__name__ != "RevealReply":
            return made
        return replace(made, own_shares={k: "ab" * 16 for k in made.own_shares})

    net.members[11].bend = bend  # type: ignore[attr-defined]
    strategy, state, _ = started(net)
    with pytest.raises(RunError, match="secret are wrong"):
        strategy.run_round(state, 1, "")


def test_a_client_that_lacks_the_weights_is_served_again(tmp_path: Path) -> None:
    net = network(tmp_path)
    strategy, state, _ = started(net)
    state.adapter = strategy.run_round(state, 1, "").adapter
    net.members[13].packages.clear()
    start = {k: t.clone() for k, t in state.adapter.items()}
    got = strategy.run_round(state, 2, "")
    want, _ = expected(net, "abcdefg", start, 2)
    assert all(torch.equal(got.adapter[k], want[k]) for k in want)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation__aggregate", "krum"),
        ("federation__weighting", "examples"),
        ("federation__clip_update_norm", 1.0),
        ("federation__enough", 4),
        ("federation__min_clients", 2),
        ("wire__adapter_up", "ternary"),
        ("wire__adapter_up", "fp16"),
        ("plan__widths", "0.25,0.5"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=r"privacy\.secure = true needs") as error:
        fabricate.config(**(SECURE | {"head__start": "statistics", key: value}))
    assert key.replace("__", ".").replace("_", "-") in str(error.value)
