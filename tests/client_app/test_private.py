"""Example-level privacy at a node: its budget over rounds and runs, and what does not leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from client_app.node import checked
from client_app.private import ExamplePrivacy
from fedpft_core.errors import UserError
from fedpft_core.privacy.accounting import Spend, epsilon
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.messages import TrainReply

SETTINGS = LocalSettings(
    lr=5e-3, batch_size=4, epochs=1, steps=3, weight_decay=0.0, clip=1.0, threads=1
)


def private(root: Path, **changes: Any) -> ExamplePrivacy:
    return replace(ExamplePrivacy(1.5, 0.5, 0.0, 1e-5, root / "below" / "privacy.json"), **changes)


def test_rounds_and_runs_add_up_in_the_nodes_file(tmp_path: Path) -> None:
    found = [private(tmp_path).spend("a", SETTINGS, 16) for _ in range(3)]
    assert found == [epsilon([Spend(1.5, 0.25)] * n, 1e-5).value for n in (3, 6, 9)]
    other = private(tmp_path).spend("a", replace(SETTINGS, steps=0, batch_size=8), 16)
    assert other == epsilon([Spend(1.5, 0.25)] * 9 + [Spend(1.5, 0.5)] * 2, 1e-5).value


def test_a_round_that_would_pass_the_budget_is_refused_and_not_booked(tmp_path: Path) -> None:
    limit = epsilon([Spend(1.5, 0.25)] * 6, 1e-5).value * 1.0001
    node = private(tmp_path, epsilon=limit)
    node.spend("a", SETTINGS, 16)
    node.spend("a", SETTINGS, 16)
    before = node.ledger.read_bytes()
    with pytest.raises(UserError, match="dp-epsilon") as error:
        node.spend("a", SETTINGS, 16)
    assert error.value.public and node.ledger.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", '{"1.5": 3}', '{"1.5 2.0": 3}', '{"1.5 0.1": "x"}'])
def test_a_damaged_count_is_not_taken_for_none(tmp_path: Path, text: str) -> None:
    node = private(tmp_path)
    node.ledger.parent.mkdir()
    node.ledger.write_text(text)
    with pytest.raises(UserError, match="damaged"):
        node.spend("a", SETTINGS, 16)


@pytest.mark.parametrize(
    "keys",
    [
        {"dp-noise": -1.0}, {"dp-noise": float("nan")}, {"dp-noise": 1.0, "dp-clip": 0.0},
        {"dp-epsilon": 3.0}, {"dp-noise": 1.0, "dp-delta": 0.0},
        {"dp-noise": 1.0, "validation-share": 0.2}, {"dp-noise": "strong"},
    ],
)  # fmt: skip
def test_settings_that_protect_nothing_are_refused_by_name(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"node config: (dp-|validation-share)"):
        checked({"name": "a", "data-path": "rows.csv"} | keys)


def test_a_private_run_sends_no_loss_and_keeps_its_clients_count(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path, rows=90) | {
        "distill.steps": 3, "align.interval": 0, "federation.rounds": 2, "train.local-steps": 2,
        "run.evaluate-every": 9, "privacy.example-noise": 1.0, "privacy.example-epsilon": 50.0,
    }  # fmt: skip
    federation = tiny.Federation(flat)
    events = tiny.run(flat, tmp_path / "run", federation)
    replies = [open_envelope(e) for _, e in federation.received if e.kind == "train-reply"]
    assert replies and all(
        isinstance(m, TrainReply) and m.private and m.loss == 0 and not m.validation_sums
        for m in replies
    )
    assert all("loss" not in e or e["loss"] is None for e in events if e["event"] == "reply")
    ledgers = list((tmp_path / "run" / "clients" / "privacy").iterdir())
    assert len(ledgers) >= 3
    # What is asked for besides is refused at the node too, whatever the server's settings.
    request = next(open_envelope(e) for _, e in federation.sent if e.kind == "train")
    client = federation.client(0)
    with pytest.raises(UserError, match="gives no counts"):
        client._train(replace(request, count_rule="nonpositive"))  # type: ignore[type-var]
