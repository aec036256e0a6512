"""Class statistics under masks: the sum is exact, whoever is lost, and nobody's own is sent."""

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

from client_app.secure import Secure
from fedpft_core.errors import RunError
from fedpft_core.head.closed import Classes
from fedpft_core.head.fixed import Fixed
from fedpft_core.head.statistics import Statistics
from fedpft_core.secure import ring
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import (
    RefusalReply,
    SecureStatisticsReply,
    SecureStatisticsRequest,
)
from fedpft_core.wire.validate import ExpectedStatistics
from server_app.run.events import EventLog
from server_app.state import State
from server_app.strategy import Strategy

NAMES = tuple("abcdefg")
FORM = Classes(3)
LONGEST = 9.0
SECURE = {
    "privacy__secure": True, "federation__weighting": "uniform", "federation__min_clients": 3,
    "federation__clients_per_round": 7, "federation__attempts": 1,
}  # fmt: skip


def sums(name: str, rows: int) -> Statistics:
    g = torch.Generator().manual_seed(ord(name))
    x = torch.randn(rows, fabricate.WIDTH, generator=g, dtype=torch.float64)
    return FORM.of(x, torch.randint(0, 3, (rows,), generator=g))


def network(root: Path, names: tuple[str, ...] = NAMES) -> Network:
    return Network({
        11 + i: SecureNode(n, 5 + i, root=root, form=FORM, sums=sums(n, 5 + i))
        for i, n in enumerate(names)
    })  # fmt: skip


def started(net: Network, **keys: Any) -> tuple[Strategy, State, EventLog, ExpectedStatistics]:
    events, state = EventLog(None), fabricate.state()
    want = ExpectedStatistics(0, state.digest, FORM, fabricate.WIDTH, LONGEST, fabricate.MAX_LENGTH)
    return Strategy(fabricate.config(**(SECURE | keys)), net, events), state, events, want


def plain(names: str, clients: int = 7, rows: int = 16) -> dict[str, torch.Tensor]:
    """The plain sum of the quantised statistics of some of seven clients of at most 16 rows."""
    agreed = Fixed(FORM, fabricate.WIDTH, 62, clients, rows, fabricate.MAX_LENGTH, LONGEST)
    whole = [agreed.quantise(sums(n, 5 + NAMES.index(n)).tensors()) for n in names]
    return agreed.restore(np.sum(whole, axis=0))


def sent(net: Network, kind: str) -> list[tuple[int, Envelope]]:
    return [(n, e) for way, n, e in net.log if way == "up" and e.kind == kind]


@pytest.mark.parametrize(
    ("lost", "names"),
    [("", "abcdefg"), ("keys", "acdefg"), ("shares", "acdefg"), ("secure-statistics", "acdefg"),
     ("reveal", "abcdefg")],
)  # fmt: skip
def test_the_sum_is_that_of_the_quantised_statistics_exactly(
    tmp_path: Path, lost: str, names: str
) -> None:
    """With nobody lost, and with one lost in each exchange; lost after it was sent, it counts."""
    net = network(tmp_path)
    net.members[12].lost = lost  # type: ignore[attr-defined]
    strategy, state, events, want = started(net)
    (found,) = strategy.gather(state, want).values()
    exact, got = plain(names), found.tensors()
    assert all(torch.equal(got[k], exact[k]) for k in exact)
    rows = sum(5 + NAMES.index(n) for n in names)
    assert found.rows == rows
    unrounded = sum((sums(n, 5 + NAMES.index(n)).outer for n in names), torch.zeros(4, 4))
    torch.testing.assert_close(found.outer, unrounded, rtol=0, atol=1e-12)
    said = [e["text"] for e in events.seen if e["event"] == "warning"]
    assert bool(lost) == any("class statistics without b" in text for text in said)
    assert not [e for e in events.seen if e["event"] == "reply"]
    booked = [e for e in events.seen if e["event"] == "bytes" and e["kind"] == "statistics"]
    assert {(e["client"], e["direction"]) for e in booked} == {(n, "up") for n in names}


def test_no_message_holds_a_clients_own_sums(tmp_path: Path) -> None:
    net = network(tmp_path)
    strategy, state, _, want = started(net)
    strategy.gather(state, want)
    assert not sent(net, "statistics-reply")
    replies = sent(net, "secure-statistics-reply")
    assert len(replies) == 7
    agreed = Fixed(FORM, fabricate.WIDTH, 62, 7, 16, fabricate.MAX_LENGTH, LONGEST)
    residues = []
    for node, envelope in replies:
        message = open_envelope(envelope)
        assert isinstance(message, SecureStatisticsReply) and "examples" not in envelope.head
        own = ring.wrap(agreed.quantise(net.members[node].sums.tensors()), 62)  # type: ignore[attr-defined]
        packed = message.statistics["masked"].numpy().tobytes()
        residues.append(ring.unpack(packed, len(own), 62))
        assert not (residues[-1] == own).any()
    # Nor does leaving any one of them out of the sum show anything but noise.
    total = ring.reduced(np.sum(residues, axis=0, dtype=np.uint64), 62)
    clear = ring.wrap(
        np.sum([agreed.quantise(m.sums.tensors()) for m in net.members.values()], axis=0),
        62,  # type: ignore[attr-defined]
    )
    assert not (total == clear).any()
    up = b"".join(part for way, _, e in net.log if way == "up" for part in e.parts.values())
    for member in net.members.values():
        raw = member.sums.outer.numpy().tobytes()  # type: ignore[attr-defined]
        assert raw[:8] not in up and member.sums.sums.numpy().tobytes()[:8] not in up  # type: ignore[attr-defined]


def test_too_few_are_a_failed_attempt_and_nothing_is_learned(tmp_path: Path) -> None:
    net = network(tmp_path)
    for node in range(11, 16):
        net.members[node].lost = "secure-statistics"  # type: ignore[attr-defined]
    strategy, state, _, want = started(net)
    with pytest.raises(RunError, match=r"class statistics: 2 good replies of the"):
        strategy.gather(state, want)
    assert not [e for way, _, e in net.log if way == "down" and e.kind == "reveal"]


def test_an_attempt_that_fails_is_made_again_in_a_new_session(tmp_path: Path) -> None:
    net = network(tmp_path)
    for node in range(11, 16):
        net.members[node].lost = "shares"  # type: ignore[attr-defined]
    strategy, state, _, want = started(net, federation__attempts=2)
    keys = Network.exchange
    count = 0

    def exchange(self: Network, *args: Any, **more: Any) -> None:
        nonlocal count
        count += any(e.kind == "keys" for e in args[0].values())
        if count == 2:
            for member in self.members.values():
                member.lost = ""  # type: ignore[attr-defined]
        keys(self, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "exchange", exchange)
        (found,) = strategy.gather(state, want).values()
    exact = plain("abcdefg")
    assert all(torch.equal(t, exact[k]) for k, t in found.tensors().items())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"session": "0" * 32}, "another session"),
        ({"round": 4}, "another round"),
        ({"seconds": float("inf")}, "seconds"),
        ({"statistics": {"masked": torch.zeros(3, dtype=torch.uint8)}}, "bytes"),
        ({"statistics": {"sums": torch.zeros(3)}}, "not the one tensor"),
    ],
)
def test_a_reply_that_does_not_fit_is_left_out(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    net = network(tmp_path)

    def bend(made: Any) -> Any:
        return replace(made, **change) if isinstance(made, SecureStatisticsReply) else made

    net.members[12].bend = bend  # type: ignore[attr-defined]
    strategy, state, events, want = started(net)
    (found,) = strategy.gather(state, want).values()
    exact = plain("acdefg")
    assert all(torch.equal(t, exact[k]) for k, t in found.tensors().items())
    (text,) = [e["text"] for e in events.seen if e["event"] == "warning"]
    assert "class statistics without b" in text and why in text


def test_a_sum_of_no_rows_is_refused_and_not_asked_for_again(tmp_path: Path) -> None:
    """One client's negative scatter makes the sum impossible, and nobody can say whose it is."""
    net = network(tmp_path)
    liar = net.members[12]
    honest, agreed = (
        type(liar).answer,
        Fixed(FORM, fabricate.WIDTH, 62, 7, 16, fabricate.MAX_LENGTH, LONGEST),
    )

    def lie(self: SecureNode, envelope: Envelope) -> Any:
        if self.name != "b" or envelope.kind != "secure-statistics":
            return honest(self, envelope)
        message = open_envelope(envelope)
        assert isinstance(message, SecureStatisticsRequest)
        worse = dict(self.sums.tensors())
        worse["outer"] = worse["outer"] - 60.0
        data = Secure(self.root, self.name).mask(message, agreed.quantise(worse))
        return seal(SecureStatisticsReply("b", message.session, 0, message.digest, 0.5, data))

    strategy, state, _, want = started(net, federation__attempts=3)
    for member in net.members.values():
        member.packages[state.digest] = state.package
        state.have[member.name] = (state.digest,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecureNode, "answer", lie)
        with pytest.raises(RunError, match="the sum over all clients is refused"):
            strategy.gather(state, want)
    assert len(sent(net, "keys-reply")) == 7


def test_a_client_refuses_what_lies_outside_and_says_no_figure(tmp_path: Path) -> None:
    net = network(tmp_path)
    net.members[12].sums = Statistics(  # type: ignore[attr-defined]
        net.members[12].sums.counts,
        net.members[12].sums.sums,
        1e4 * torch.eye(4).double(),  # type: ignore[attr-defined]
    )
    net.members[13].examples = 200
    net.members[13].sums = sums("c", 7)  # type: ignore[attr-defined]
    strategy, state, _, want = started(net)
    strategy.gather(state, want)
    said = [open_envelope(e) for _, e in sent(net, "refusal")]
    assert {m.name for m in said if isinstance(m, RefusalReply)} == {"b", "c"}
    for m in said:
        assert isinstance(m, RefusalReply) and not any(c.isdigit() for c in m.reason)
