"""Replies merged without common rounds: whole runs in this process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripted
import tiny
import torch

from fedpft_core import config
from fedpft_core.errors import RunError, UserError
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.messages import TrainReply, TrainRequest
from server_app.run.record import fold
from server_app.schedule.flight import rebased, weight

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    quick = {
        "distill.steps": 2, "align.interval": 0, "align.steps": 2, "align.proportion": 1.0,
        "federation.clients-per-round": 4, "train.local-steps": 3, "run.evaluate-every": 9,
        "federation.rounds": 5, "run.gradient-rows": 0, "federation.schedule": "async",
        "federation.speed-spread": 0.8,
    }  # fmt: skip
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=90) | quick


class Done:
    def __init__(self, flat: dict[str, Any], folder: Path, keys: Any = None, **script: Any) -> None:
        self.folder = folder
        self.clients = scripted.Clients(flat | (keys or {}), **script)
        self.events = tiny.run(self.clients.flat, folder, self.clients)

    def of(self, name: str) -> list[dict[str, Any]]:
        return tiny.main_run(self.events, name)

    @property
    def adapter(self) -> bytes:
        return (self.folder / ADAPTER).read_bytes()

    @property
    def replies(self) -> list[tuple[int, str, int | None]]:
        return [(e["round"], e["client"], e.get("staleness")) for e in self.of("reply")]


@pytest.fixture(scope="module")
def done(flat: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(flat, tmp_path_factory.mktemp("done") / "run")


def test_stale_replies_are_merged_and_weigh_less(done: Done) -> None:
    assert done.of("run_started")[0]["method"] == "async fedpft-b"
    assert [e["good"] for e in done.of("round_finished")] == [2] * 5  # half of four
    stale = [s for _, _, s in done.replies]
    assert 0 in stale and max(s or 0 for s in stale) > 0
    assert len({c for _, c, _ in done.replies}) > 2
    # At most one reply of a client in a merge.
    assert len({(r, c) for r, c, _ in done.replies}) == len(done.replies)
    clock = [e["clock"] for e in done.of("merged")]
    assert clock == sorted(clock) and clock[0] > 0
    assert len(fold(done.events).round(3).merges) == 1


def test_every_merge_is_what_fedbuff_says(flat: dict[str, Any], tmp_path: Path) -> None:
    """By hand from the messages alone: start + Σ p (1 + s)^-a (reply - what it started from)."""
    run = Done(flat, tmp_path / "run", {"wire.adapter": "fp32", "head.end": "trained"})
    asked: dict[tuple[int, str], TrainRequest] = {}
    given: dict[tuple[int, str], TrainReply] = {}
    for (node, sent), (_, received) in zip(run.clients.sent, run.clients.received, strict=True):
        request, reply = open_envelope(sent), open_envelope(received)
        if isinstance(request, TrainRequest) and isinstance(reply, TrainReply):
            asked[request.round, f"client-{node}"] = request
            given[request.round, f"client-{node}"] = reply
    now = {k: t.double() for k, t in asked[1, next(c for r, c in asked if r == 1)].adapter.items()}
    for version in range(1, 6):
        mine = [(c, version - (s or 0)) for r, c, s in run.replies if r == version]
        for client, round in mine:
            if round == version:  # it started from what the merges before have given
                for k, t in asked[round, client].adapter.items():
                    assert torch.allclose(t.double(), now[k], atol=1e-6)
        total = sum(given[round, c].examples for c, round in mine)
        then = dict(now)
        for client, round in mine:
            reply, base = given[round, client], asked[round, client].adapter
            part = reply.examples / total * (1 + version - round) ** -0.5
            for k, t in reply.adapter.items():
                then[k] = then[k] + part * (t.double() - base[k].double())
        now = then
    norm = math.sqrt(sum(float(t.square().sum()) for t in now.values()))
    assert np.isclose(norm, run.of("adapter")[-1]["norm"], rtol=1e-5)


def test_in_step_it_is_multi_round_to_the_bit(flat: dict[str, Any], tmp_path: Path) -> None:
    keys = {"federation.buffer": 4, "federation.rounds": 3, "align.interval": 1}
    both = [
        Done(flat, tmp_path / schedule, keys | {"federation.schedule": schedule})
        for schedule in ("async", "multi-round")
    ]
    assert both[0].adapter == both[1].adapter
    assert {s for _, _, s in both[0].replies} == {0}
    assert len(both[0].of("alignment")) == 2
    a, b = (
        [{k: e[k] for k in ("loss", "good", "examples")} for e in r.of("round_finished")]
        for r in both
    )
    assert a == b


def test_the_order_of_arrival_does_not_matter(
    flat: dict[str, Any], done: Done, tmp_path: Path
) -> None:
    """On the simulated clock; in order of arrival it decides who is merged when."""
    seconds = {1: 30.0, 2: 3.0, 3: 7.0, 4: 1.0}
    other = Done(flat, tmp_path / "other", seconds=seconds)
    assert other.replies == done.replies and other.adapter == done.adapter
    arrived = Done(flat, tmp_path / "arrived", {"federation.clock": "arrival"}, seconds=seconds)
    assert arrived.replies != done.replies
    assert "client-0" not in {c for _, c, _ in arrived.replies}  # 30 s; all is over before
    assert all(e.get("clock") is None for e in arrived.of("merged"))


def test_an_alignment_waits_for_all_that_is_under_way(flat: dict[str, Any], tmp_path: Path) -> None:
    run = Done(flat, tmp_path / "run", {"align.interval": 2})
    assert [e["round"] for e in run.of("alignment")] == [2, 4]
    good = [e["good"] for e in run.of("round_finished")]
    assert good[1] > 2 and good[3] > 2 and good[0] == good[2] == good[4] == 2
    assert all(s == 0 for r, _, s in run.replies if r in (3, 5))
    assert not any(e["status"] == "refused" for e in run.of("reply"))


@pytest.mark.parametrize("stop", [1, 3])
def test_it_is_resumed_to_the_bit(
    flat: dict[str, Any], done: Done, tmp_path: Path, stop: int
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunError, match="stopped after round"):
        Done(flat, folder, {"run.stop-after": stop})
    run = Done(flat, folder, {"run.resume": True}, seconds={2: 9.0})
    assert run.replies == done.replies and run.adapter == done.adapter


def test_who_joins_takes_part_and_who_is_gone_costs_nothing(
    flat: dict[str, Any], tmp_path: Path
) -> None:
    keys = {"federation.clock": "arrival", "federation.node-timeout": 60.0,
            "federation.clients-per-round": 4, "federation.rounds": 8}  # fmt: skip
    run = Done(flat, tmp_path / "run", keys, joins={4: 2.5}, gone=(1,))
    who = {(c, e["status"]) for e in run.of("reply") for c in [e["client"]]}
    assert ("client-3", "ok") in who and ("client-0", "error") in who
    assert ("client-0", "ok") not in who


def test_nobody_left_is_one_sentence(flat: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"round 1: 1 good replies .*min-clients = 2 .*gone"):
        Done(flat, tmp_path / "run", gone=(1, 2, 3))


def test_a_client_that_takes_too_long_is_given_up(flat: dict[str, Any], tmp_path: Path) -> None:
    keys = {"federation.round-timeout": 20.0, "federation.rounds": 2}
    run = Done(flat, tmp_path / "run", keys, seconds={2: math.inf})
    (lost,) = [e for e in run.of("reply") if e["status"] == "error"][:1]
    assert lost["client"] == "client-1" and "no reply within 20.0 s" in lost["reason"]


def test_weights_and_rebasing() -> None:
    assert weight(0, 0.5) == 1 and weight(3, 0.5) == 0.5 and weight(9, 0.0) == 1
    now, base = {"x": torch.tensor([1.0])}, {"x": torch.tensor([3.0])}
    reply = {"x": torch.tensor([5.0])}
    assert rebased(reply, now, now, 1.0) is reply
    assert torch.equal(rebased(reply, base, now, 0.5)["x"], torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"federation.buffer": 5}, "federation.buffer = 5 is not between"),
        ({"federation.buffer": 1}, "federation.min-clients = 2"),
        ({"run.undistilled": True}, "run.undistilled = false"),
        ({"federation.aggregate": "none"}, "federation.aggregate = none"),
    ],
)
def test_contradictions_are_named(flat: dict[str, Any], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.from_flat(flat | keys)


def test_counts_need_rounds(flat: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"async has no counts.*align.proportion = 0.5"):
        Done(flat, tmp_path / "run", {"align.interval": 2, "align.proportion": 0.5})
