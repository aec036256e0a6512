"""What a run says while it waits: for nodes, and for replies."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

from fedpft_core import config as configs
from fedpft_core.errors import RunError
from fedpft_core.wire.envelope import seal
from fedpft_core.wire.messages import Failure, Hello
from server_app.phases.reporting import Waits
from server_app.rounds.nodes import Nodes
from server_app.run.events import EventLog
from server_app.transport import FlowerTransport


class One:
    """A transport that one node is connected to."""

    def nodes(self) -> list[int]:
        return [1]


def test_nodes_that_are_missing_are_named_with_the_time_left() -> None:
    f = configs.from_flat({
        "federation.clients": 2, "federation.clients-per-round": 2, "federation.min-clients": 2,
        "federation.node-timeout": 1.5,
    }).federation  # fmt: skip
    log = EventLog(None)
    with pytest.raises(RunError, match=r"only 1 of federation\.min-clients = 2"):
        Nodes(f, One(), log).wait()  # type: ignore[arg-type]
    (said,) = [e for e in log.seen if e["event"] == "waiting"]
    assert (said["what"], said["done"], said["total"]) == ("nodes", 1, 2)
    assert 0 < said["seconds_left"] < 1


class Silent:
    """A grid whose nodes never answer."""

    def push_messages(self, messages: Any) -> list[str]:
        return [f"m{messages[0].metadata.dst_node_id}"]

    def pull_messages(self, ids: Any) -> list[Any]:
        return []


def test_replies_that_are_missing_are_counted_anew_in_every_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("_run_id", 1), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value, raising=False)
    log, got = EventLog(None), []
    transport = FlowerTransport(
        Silent(), 0.01, waits=lambda: Waits(log, "replies", silent=0.05, every=60.0)  # type: ignore[arg-type]
    )  # fmt: skip
    for _ in range(2):
        transport.exchange(
            {1: seal(Hello()), 2: seal(Hello())}, 1, 0.2, lambda n, reply: got.append((n, reply))
        )
    said = [e for e in log.seen if e["event"] == "waiting"]
    assert [(e["done"], e["total"]) for e in said] == [(0, 2), (0, 2)]
    assert len(got) == 4 and all(isinstance(reply, Failure) for _, reply in got)
