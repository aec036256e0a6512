"""Names that pass for another's are refused when a node says who it is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import fabricate
import pytest
from fabricate import Network, Node

from fedpft_core.errors import ReplyError
from server_app.reach import registered_name
from server_app.rounds import nodes
from server_app.rounds.names import looks, usable_name
from server_app.run.events import EventLog
from server_app.strategy import Strategy
from server_app.transport import FlowerTransport

GOOD = (
    "a", "client-07", "St. Mary's Hospital (Leeds)", "Charité Berlin", "Клиника 3", "東京大学",
    "node_1@site.example:9", "ΑΒΓ", "zürich", "x" * 64,
)  # fmt: skip
BAD = (
    "", "x" * 65, " a", "a ", "a\u00a0", "a  b", "a\u200b", "a\u202eb", "cafe\u0301", "clіnic",
    "<b>x</b>", "[x](y)", "a`b", "a*b", "a|b", "a\x1b[31m", "a\u2028b", "!a", "＜img＞", "a\ufeff",
)  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_names_that_people_have(name: str) -> None:
    assert usable_name(name) == name


@pytest.mark.parametrize("name", BAD)
def test_names_that_nobody_needs(name: str) -> None:
    with pytest.raises(ReplyError, match="name"):
        usable_name(name)


@pytest.mark.parametrize(("a", "b"), [
    ("Clinic", "clinic"), ("сосо", "coco"), ("node-1", "node-l"), ("node-0", "node-O"),
    ("Charité", "Charite"), ("ΑΒ", "AB"), ("office", "oﬃce"),
])  # fmt: skip
def test_names_that_look_alike(a: str, b: str) -> None:
    assert looks(a) == looks(b)


def test_names_that_do_not() -> None:
    names = [f"client-{i:03d}" for i in range(200)] + ["a", "b", "ab", "ba", "node", "mode"]
    assert len({looks(n) for n in names}) == len(names)


@pytest.mark.parametrize("lookalike", ["B", "в", "ｂ", "b ", "<b>"])
def test_a_lookalike_of_a_connected_node_is_left_out(lookalike: str) -> None:
    members = {11: Node("a"), 12: Node("b"), 13: Node("c"), 14: Node("d")}
    members[14].greet = lambda made: replace(made, name=lookalike)
    events = EventLog(None)
    strategy = Strategy(fabricate.config(), Network(members), events)
    outcome = strategy.run_round(fabricate.state(), 1, "")
    assert outcome.good == 3
    (warned,) = [e["text"] for e in events.seen if e["event"] == "warning"]
    assert warned.startswith("node 14 is left out")


def test_a_name_belongs_to_the_key_it_was_registered_with(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {11: "a", 12: "b", 13: "", 14: "d"}
    monkeypatch.setattr(nodes, "registered_name", lambda transport, node: registered[node])
    members = {11: Node("a"), 12: Node("c"), 13: Node("e"), 14: Node("d")}
    events = EventLog(None)
    strategy = Strategy(fabricate.config(), Network(members), events)
    assert strategy.run_round(fabricate.state(), 1, "").good == 3
    (warned,) = [e["text"] for e in events.seen if e["event"] == "warning"]
    assert warned == "node 12 is left out: it says it is c, and its key is registered as b"


def test_flower_says_whose_key_a_node_has() -> None:
    info = [SimpleNamespace(node_id=11, name="a"), SimpleNamespace(node_id=12, name="")]
    transport = FlowerTransport(SimpleNamespace(get_nodes=lambda: info))  # type: ignore[arg-type]
    assert [registered_name(transport, n) for n in (11, 12, 13)] == ["a", "", ""]
    assert registered_name(Network({}), 11) == ""
