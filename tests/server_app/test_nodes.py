"""Nodes are asked who they are while the server is at other work, and not a second time."""

from __future__ import annotations

import fabricate
from fabricate import Network, Node

from fedpft_core.wire.messages import Failure
from server_app.run.events import EventLog
from server_app.strategy import Strategy


def rounds(greets: bool, deaf: bool = False) -> tuple[Network, EventLog, list[str]]:
    """One round of three nodes, of which one may not hear the first query."""
    members = {i: Node(name) for i, name in ((11, "a"), (12, "b"), (13, "c"))}
    if deaf:
        members[12].greet = lambda made: Failure("no reply")
    net, events, work = Network(members), EventLog(None), []
    strategy = Strategy(fabricate.config(), net, events)
    if greets:
        strategy.nodes.greet(lambda: work.append("done"))
        assert work == ["done"]
        assert not strategy.nodes.known and not events.seen, "read when there is a state"
    members[12].greet = None
    outcome = strategy.run_round(fabricate.state(), 1, "")
    assert outcome.good == 3
    return net, events, work


def hellos(net: Network) -> list[int]:
    return [node for way, node, e in net.log if way == "down" and e.kind == "hello"]


def test_a_node_that_answered_early_is_not_asked_again() -> None:
    net, events, _ = rounds(True)
    assert sorted(hellos(net)) == [11, 12, 13]
    _, plain, _ = rounds(False)
    sent = [[{k: e[k] for k in e if k != "t"} for e in log.seen if e["event"] == "bytes"]
            for log in (events, plain)]  # fmt: skip
    assert sent[0] == sent[1], "booked once, where it was before"


def test_a_node_that_did_not_answer_is_asked_again() -> None:
    net, _, _ = rounds(True, deaf=True)
    assert sorted(hellos(net)) == [11, 12, 12, 13]


def test_the_work_is_done_without_nodes() -> None:
    strategy = Strategy(fabricate.config(), Network({}), EventLog(None))
    work: list[str] = []
    strategy.nodes.greet(lambda: work.append("done"))
    assert work == ["done"]
