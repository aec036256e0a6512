"""A whole run in which some clients keep rows from training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from client_app.client import Client
from client_app.node import client_for
from fedpft_core.wire.envelope import open_envelope


class Keeping(tiny.Federation):
    """Every other client keeps 30 % of its rows."""

    def client(self, index: int) -> Client:
        node = {"partition-id": index, "num-partitions": self.count}
        made = client_for(node | {"validation-share": 0.3 if index % 2 else 0}, self.flat)
        made.cache = self.caches[index]
        return made


def test_each_round_reports_what_clients_keep_back(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path, rows=240)
    flat |= {
        "federation.partition": "iid",
        "federation.clients-per-round": 4,
        "federation.rounds": 2,
        "distill.steps": 2,
    }
    federation = Keeping(flat)
    events = tiny.run(flat, tmp_path / "run", federation)
    replies: dict[int, list[Any]] = {}
    for _, envelope in federation.received:
        message = open_envelope(envelope)
        if envelope.kind == "train-reply":
            replies.setdefault(message.round, []).append(message)  # type: ignore[union-attr]
    found = tiny.main_run(events, "client_validation")
    assert [e["round"] for e in found] == [0, 1]
    for event, round in zip(found, (1, 2), strict=True):
        kept = [m for m in replies[round] if m.validation_rows]
        assert event["clients"] == len(kept) == 2
        assert event["rows"] == sum(m.validation_rows for m in kept) > 5
        assert event["value"] == sum(m.validation_sums["correct"] for m in kept) / event["rows"]
        assert all(m.validation_sums.keys() == {"rows", "correct", "loss"} for m in kept)
        assert not event.get("more"), "macro-F1 needs figures by class, which no client sends"
    # No row is in both parts, and none is lost: the training file has 240 less those of the server.
    total = sum(m.examples + m.validation_rows for m in replies[1])
    (task,) = tiny.main_run(events, "task")
    further = [
        {"name": "macro-F1", "higher_is_better": True, "share": True},
        {"name": "Matthews correlation", "higher_is_better": True, "share": False},
    ]
    assert task["further"] == further
    assert all(0 <= e["more"]["macro-F1"] <= 1 for e in tiny.main_run(events, "evaluation"))
    assert total == task["train"]
