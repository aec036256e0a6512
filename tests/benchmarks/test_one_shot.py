"""Membership inference and the one-shot theory's quantities where the answer is known."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import exposure
import membership
import one_shot_theory as theory

from fedpft_core.adapter import lora as adapters
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded

SHOT = {"federation.schedule": "one-shot", "federation.rounds": 1}


def test_the_advantage_of_scores_that_are_known() -> None:
    rng = np.random.default_rng(0)
    assert membership.advantage([10.0, 10.5, 11.0, 11.5], [0.0, 1.0, 2.0, 2.5]) == 1.0
    assert membership.advantage([1.0] * 10, [1.0] * 10) == 0.0
    same = [membership.advantage(rng.normal(size=200), rng.normal(size=200), s) for s in range(20)]
    assert abs(np.mean(same)) < 0.03  # not the best of many thresholds
    shifted = membership.advantage(list(rng.normal(size=5000) + 1), list(rng.normal(size=5000)))
    assert shifted == pytest.approx(0.383, abs=0.03)  # 2 Phi(1/2) - 1
    with pytest.raises(ValueError, match="at least two rows"):
        membership.advantage([1.0], [0.0, 1.0])


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    quick = {
        "distill.steps": 2, "align.interval": 0, "federation.clients": 2,
        "federation.clients-per-round": 2, "federation.partition": "iid", "wire.adapter": "fp32",
        "run.evaluate-every": 9, "run.gradient-rows": 0, "plug.method": "as-trained",
        "head.start": "zero", "head.end": "trained", "federation.largest-change": 0.0,
    }  # fmt: skip
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=200) | quick


@pytest.fixture(scope="module")
def shot(flat: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> exposure.Exposed:
    folder = tmp_path_factory.mktemp("shot") / "run"
    keys = SHOT | {"train.local-steps": 6, "train.lr": 1e-3, "train.local-decay": "linear"}
    return exposure.federate(flat | keys, folder, held_out=0.5)


def test_what_a_server_sees_is_what_was_sent(shot: exposure.Exposed) -> None:
    assert [u.client for u in shot.updates] == ["client-0", "client-1"]
    assert set(shot.rows) == {"client-0", "client-1"}
    n = [len(shot.rows[u.client].train) for u in shot.updates]
    for key, value in shot.final.items():
        want = sum(u.got[key].double() * k for u, k in zip(shot.updates, n, strict=True)) / sum(n)
        assert torch.allclose(value.double(), want, atol=1e-6)


def test_rows_that_nobody_has_learned_cannot_be_told(shot: exposure.Exposed) -> None:
    """Both attacks on the adapter that training began with."""
    blind = replace(shot, final=shot.start, updates=[replace(u, got=u.sent) for u in shot.updates])
    found = membership.attack(blind)
    assert abs(found["merged"]["reference"]) == 0.0  # nothing moved: all scores are equal
    rows = next(iter(shot.rows.values()))
    scored = membership.scores(blind, [shot.start], rows.train)
    assert not scored["reference"].any() and scored["loss"].std() > 0
    assert found["updates"]["count"] == 1


def test_rows_learned_by_heart_are_found_out() -> None:
    """Labels at random, until the model has them all: nothing but memory tells them.

    Of many classes, so that a row that was not learned is seldom right by chance.
    """
    stream, classes = torch.Generator().manual_seed(0), 40
    task = tiny.task_of("bert", tuple(f"{i}" for i in range(classes)))
    words = torch.randint(5, len(tiny.vocabulary()), (48 * 12,), generator=stream)
    labels = torch.randint(0, classes, (48,), generator=stream)
    rows = Encoded(labels, ids=words.to(torch.int32), offsets=torch.arange(49) * 12)
    inside, outside = rows.select(np.arange(24)), rows.select(np.arange(24, 48))
    model = tiny.model("bert", labels=classes)
    (batch,) = batches(inside, 24, None)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        optimiser.zero_grad()
        task.loss(model, batch).backward()
        optimiser.step()
    losses = [exposure.row_losses(model, task, part) for part in (inside, outside)]
    assert losses[0].max() < 0.5  # by heart
    assert membership.advantage(list(-losses[0]), list(-losses[1])) > 0.9


def test_the_theory_of_a_twin_of_itself(shot: exposure.Exposed) -> None:
    found = theory.compare(shot, shot, 6, 1e-3, rows=8)
    assert found.gap == 0 and found.share == 0
    assert 0 < found.tau < 1 and found.smoothness > 0
    far = max(theory.distance(u.got, shot.start) for u in shot.updates)
    assert found.bound == pytest.approx(found.smoothness * far * 6 * 2)
    assert found.tau == pytest.approx(far / found.size)
    assert found.stepped == pytest.approx(1e-3 * found.bound)
    assert found.losses["one-shot, after the merge"] == found.losses["rounds, after the last"]


def test_the_gap_is_between_the_two_products(
    flat: dict[str, Any], shot: exposure.Exposed, tmp_path: Path
) -> None:
    keys = {"federation.rounds": 3, "train.local-steps": 2, "train.lr": 1e-3}
    twin = exposure.federate(flat | keys, tmp_path / "run", held_out=0.5)
    assert [len(twin.of(c)) for c in twin.rows] == [3, 3]
    found = theory.compare(shot, twin, 6, 1e-3, rows=8)
    assert found.gap == pytest.approx(adapters.norm({
        k: t - twin.final[k] for k, t in shot.final.items()
    }), rel=1e-6)  # fmt: skip
    assert 0 < found.gap < found.bound
    others = replace(twin, updates=[replace(u, sent=u.got) for u in twin.updates])
    with pytest.raises(ValueError, match="different adapters"):
        theory.compare(shot, others, 6, 1e-3)
    one, three = membership.attack(shot), membership.attack(twin)
    assert (one["updates"]["count"], three["updates"]["count"]) == (1, 3)


def test_smoothness_of_a_path_by_hand(shot: exposure.Exposed) -> None:
    """Two points: the gradients' distance over theirs."""
    ends = [shot.start, shot.final]
    found = theory.smoothness(shot, ends, 8)
    assert theory.smoothness(shot, [shot.start, shot.start], 8) == 0
    middle = {k: (ends[0][k] + ends[1][k]) / 2 for k in ends[0]}
    assert theory.smoothness(shot, [ends[0], middle, ends[1]], 8) >= 0.99 * found > 0
