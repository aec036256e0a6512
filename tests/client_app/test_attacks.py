"""Simulated attackers do what they are called, and only in simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from client_app import attacks
from client_app.node import client_for
from fedpft_core.config import SimulateConfig, from_flat
from fedpft_core.data.examples import Examples
from fedpft_core.errors import UserError

SENT = {"a": torch.zeros(4), "b": torch.ones(3)}
TRAINED = {"a": torch.full((4,), 0.5), "b": torch.tensor([1.0, 2.0, 1.0])}


def sent(attack: str, boost: float = 2.0) -> dict[str, Any]:
    return attacks.spoiled(SimulateConfig(attack=attack, boost=boost), TRAINED, SENT, 3)


def test_what_attackers_send() -> None:
    assert torch.equal(sent("sign-flip")["a"], torch.full((4,), -1.0))
    assert torch.equal(sent("scale")["b"], torch.tensor([1.0, 3.0, 1.0]))
    noise = sent("noise")
    for name in SENT:
        want = 2 * (TRAINED[name] - SENT[name]).norm()
        assert float((noise[name] - SENT[name]).norm()) == pytest.approx(float(want), rel=1e-5)
    assert not torch.equal(noise["b"], sent("scale")["b"])
    assert all(torch.equal(noise[k], sent("noise")[k]) for k in SENT)  # by the seed
    assert torch.equal(sent("label-flip", 1.0)["a"], TRAINED["a"])


def test_what_attackers_train_on() -> None:
    rows = Examples(("x", "y", "z"), np.array([0, 1, 2]))
    flipped = attacks.poisoned(SimulateConfig(attack="label-flip"), rows, 3)
    assert flipped.labels.tolist() == [2, 1, 0] and flipped.inputs == rows.inputs
    door = attacks.poisoned(SimulateConfig(attack="backdoor", trigger="cf"), rows, 3)
    assert door.labels.tolist() == [0, 0, 0] and door.inputs == ("cf x", "cf y", "cf z")
    assert attacks.poisoned(SimulateConfig(attack="noise"), rows, 3) is rows


def test_who_attacks() -> None:
    some = SimulateConfig(attack="noise", attackers=0.2)
    assert [attacks.hostile(some, i, 20) for i in range(20)] == [True] * 4 + [False] * 16
    assert not any(attacks.hostile(SimulateConfig(attackers=0.5), i, 20) for i in range(20))


def test_a_node_with_rows_of_its_own_refuses(tmp_path: Path) -> None:
    node = {"name": "n", "data-path": str(tmp_path / "a.csv"), "cache-dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"simulate\.attack is for simulations"):
        client_for(node, {"simulate.attack": "noise"})


def test_half_of_the_clients_flipping_signs_spoil_the_mean_and_not_without(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path, rows=120) | {
        "federation.rounds": 2, "distill.steps": 2, "run.gradient-rows": 0, "align.interval": 0,
        "federation.clients": 4, "federation.clients-per-round": 4, "train.local-steps": 4,
    }  # fmt: skip
    norms = {}
    for attack in ("none", "scale"):
        keys = flat | {"simulate.attack": attack, "simulate.attackers": 0.5, "simulate.boost": 5.0}
        from_flat(keys)
        events = tiny.run(keys, tmp_path / attack)
        norms[attack] = [e["norm"] for e in events if e["event"] == "adapter"][-1]
    assert norms["scale"] > 1.1 * norms["none"]
