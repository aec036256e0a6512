"""One message to each client: whole runs in this process, on a clock that only a script moves."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripted
import tiny
import torch
from safetensors.torch import load_file

from fedpft_core import config
from fedpft_core.errors import RunError, UserError
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.messages import TrainReply, TrainRequest
from server_app.run.events import EventLog
from server_app.run.record import fold

NEVER = math.inf
ADAPTER = "adapter/adapter_model.safetensors"
SHOT = {"federation.schedule": "one-shot", "federation.rounds": 1}


@dataclass
class Done:
    folder: Path
    events: list[dict[str, Any]]
    clients: scripted.Clients

    def of(self, name: str) -> list[dict[str, Any]]:
        return tiny.main_run(self.events, name)

    @property
    def adapter(self) -> bytes:
        return (self.folder / ADAPTER).read_bytes()

    @property
    def statuses(self) -> list[tuple[str, str]]:
        return [(e["client"].removeprefix("client-"), e["status"]) for e in self.of("reply")]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    quick = {
        "distill.steps": 2, "align.interval": 0, "federation.clients-per-round": 4,
        "train.local-steps": 3, "run.evaluate-every": 9, "run.gradient-rows": 0,
    }  # fmt: skip
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=90) | quick | SHOT


def go(
    flat: dict[str, Any], folder: Path, keys: dict[str, Any] | None = None, **script: Any
) -> Done:
    clients = scripted.Clients(flat | (keys or {}), **script)
    return Done(folder, tiny.run(clients.flat, folder, clients), clients)


@pytest.fixture(scope="module")
def done(flat: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All four answer, the last one first."""
    folder = tmp_path_factory.mktemp("done") / "run"
    seconds = {1: 8.0, 2: 6.0, 3: 4.0, 4: 2.0}
    return go(flat, folder, {"federation.score-every": 2}, seconds=seconds)


def test_it_is_one_round_of_all_clients_to_the_bit(
    done: Done, flat: dict[str, Any], tmp_path: Path
) -> None:
    twin = go(flat, tmp_path / "twin", {"federation.schedule": "multi-round"})
    assert twin.of("run_started")[0]["method"] == "fedpft-b"
    assert done.of("run_started")[0]["method"] == "one-shot fedpft-b"
    assert twin.adapter == done.adapter
    (a,), (b,) = twin.of("round_finished"), done.of("round_finished")
    for name in ("loss", "examples", "good", "bad"):
        assert a[name] == b[name], name
    last = [{k: e[k] for k in ("model", "value", "loss")} for e in twin.of("evaluation")]
    assert last == [{k: e[k] for k in ("model", "value", "loss")} for e in done.of("evaluation")]


def test_each_client_has_one_message_and_sends_one_adapter(done: Done) -> None:
    assert sorted(done.clients.script.asked) == [1, 2, 3, 4]
    up = [e for e in done.of("bytes") if e["kind"] == "adapter" and e["direction"] == "up"]
    assert len(up) == 4 and {e["round"] for e in up} == {1}


@pytest.mark.parametrize("order", list(itertools.permutations(range(1, 4)))[1::2])
def test_the_order_of_arrival_does_not_matter(
    flat: dict[str, Any], done: Done, tmp_path: Path, order: tuple[int, ...]
) -> None:
    seconds = {node: 2.0 * place for place, node in enumerate((4, *order))}
    other = go(flat, tmp_path / "run", seconds=seconds)
    assert [name for name, _ in other.statuses] == [str(n - 1) for n in (4, *order)]
    assert other.adapter == done.adapter


def test_a_usable_adapter_after_every_arrival(
    flat: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is NumPy's mean of what has come so far, and the last one written is the product's."""
    found: list[dict[str, torch.Tensor]] = []
    emit = EventLog.emit

    def spy(self: EventLog, event: Any, arm: str = "") -> None:
        emit(self, event, arm)
        if event.event == "merged":
            found.append(load_file(tmp_path / "run/merged/adapter_model.safetensors"))

    monkeypatch.setattr(EventLog, "emit", spy)
    keys = {"wire.adapter": "fp32"}
    run = go(flat, tmp_path / "run", keys, seconds={1: 4.0, 2: 2.0, 3: 8.0, 4: 6.0})
    opened = {node: open_envelope(e) for node, e in run.clients.received}  # the last of each
    replies = {node: m for node, m in opened.items() if isinstance(m, TrainReply)}
    assert len(replies) == 4
    order = [int(name) for name, _ in run.statuses]
    assert order == [1, 0, 3, 2]
    merges = run.of("merged")
    assert [m["replies"] for m in merges] == [1, 2, 3, 4] and len(found) == 4
    for count, tensors in enumerate(found, start=1):
        mine = [replies[i] for i in order[:count]]
        total = sum(r.examples for r in mine)
        assert merges[count - 1]["examples"] == total
        for name in mine[0].adapter:
            want = sum(r.adapter[name].double().numpy() * r.examples for r in mine) / total
            (key,) = [k for k in tensors if k.removeprefix("base_model.model.") == name]
            assert np.allclose(tensors[key].numpy(), want, rtol=0, atol=1e-7)


def test_merges_are_scored_as_often_as_asked(
    done: Done, flat: dict[str, Any], tmp_path: Path
) -> None:
    assert [m.get("value") is not None for m in done.of("merged")] == [False, True, False, True]
    assert done.of("merged")[1]["metric"] == "accuracy"
    keys = {"federation.merge-every": 3, "federation.score-every": 3}
    rare = go(flat, tmp_path / "run", keys)
    (only,) = rare.of("merged")
    assert only["replies"] == 3 and only["value"] is not None
    assert rare.adapter == done.adapter  # looking does not change what is seen
    record = fold(done.events)
    assert [m.replies for m in record.round(1).merges] == [1, 2, 3, 4]


def test_one_client_joins_late_and_one_never_answers(
    flat: dict[str, Any], done: Done, tmp_path: Path
) -> None:
    keys = {"federation.round-timeout": 20.0}
    run = go(flat, tmp_path / "run", keys, joins={2: 9.0}, seconds={3: NEVER})
    assert run.statuses == [("0", "ok"), ("3", "ok"), ("1", "ok")]
    assert [e["client"] for e in run.of("joined")] == ["client-1"]
    assert run.of("round_finished")[0]["good"] == 3
    assert any("merged without client client-2: no reply by the deadline" in e["text"]
               for e in run.of("warning"))  # fmt: skip
    without = go(flat, tmp_path / "enough", {"federation.enough-replies": 3}, seconds={3: NEVER})
    assert without.adapter == run.adapter != done.adapter
    assert without.clients.script.time < 9  # nobody was waited for
    record = fold(run.events)
    started = record.round(1).started
    assert started and started.clients == [f"client-{i}" for i in (0, 2, 3, 1)]


def test_nobody_joins_after_the_deadline(flat: dict[str, Any], tmp_path: Path) -> None:
    run = go(flat, tmp_path / "run", {"federation.round-timeout": 10.0}, joins={2: 11.0})
    assert 2 not in run.clients.script.asked and len(run.statuses) == 3


def test_a_reply_after_the_deadline_is_recorded_and_not_merged(
    flat: dict[str, Any], tmp_path: Path
) -> None:
    keys = {"federation.round-timeout": 10.0}
    late = go(flat, tmp_path / "late", keys, seconds={2: 10.2})
    assert late.statuses == [("0", "ok"), ("2", "ok"), ("3", "ok"), ("1", "late")]
    assert late.of("reply")[-1]["reason"] == "it came after the final merge and is not used"
    absent = go(flat, tmp_path / "absent", keys, seconds={2: NEVER})
    assert late.adapter == absent.adapter
    assert fold(late.events).round(1).got == 3


def test_the_same_client_twice_is_merged_once(
    flat: dict[str, Any], done: Done, tmp_path: Path
) -> None:
    run = go(flat, tmp_path / "run", twice=(2,), seconds={3: 5.0})
    assert run.statuses.count(("1", "ok")) == 1
    assert run.adapter == done.adapter


def test_a_node_that_is_gone_costs_nothing(flat: dict[str, Any], tmp_path: Path) -> None:
    run = go(flat, tmp_path / "run", gone=(3,))
    assert dict(run.statuses)["2"] == "error"
    assert run.of("round_finished")[0]["good"] == 3 and run.clients.script.time < 5


def test_too_few_replies_are_one_sentence(flat: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"1 good replies of the federation.min-clients = 2 .*gone"):
        go(flat, tmp_path / "run", gone=(2, 3, 4))


# --- resumption ---------------------------------------------------------------------------


class Killed(BaseException):
    """The server's end, as sudden as that of a process."""


def killed(
    flat: dict[str, Any],
    folder: Path,
    moments: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Done, list[int]]:
    """A run that ends before its n-th event of a kind, again and again; with who was asked in all.

    The kind "" is any event. The last part is left to end by itself.
    """
    emit = EventLog.emit
    asked: list[int] = []
    for kind, moment in [*moments, ("", 10**9)]:
        left = [moment]

        def stop(
            self: EventLog, event: Any, arm: str = "", kind: str = kind, left: list[int] = left
        ) -> None:
            if kind in ("", event.event):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            emit(self, event, arm)

        again = any((folder / "checkpoints").glob("round-*"))
        if not again:
            (folder / "events.jsonl").unlink(missing_ok=True)
        clients = scripted.Clients(flat | {"run.resume": again}, seconds={1: 3.0, 3: 2.0})
        with monkeypatch.context() as patch:
            patch.setattr(EventLog, "emit", stop)
            try:
                events = tiny.run(clients.flat, folder, clients)
            except Killed:
                continue
            finally:
                asked += clients.script.asked
    return Done(folder, events, clients), asked


def check(run: Done, done: Done) -> None:
    assert run.adapter == done.adapter
    # No event is lost or there twice.
    assert sorted(run.statuses) == sorted(done.statuses)
    for kind in ("adapter", "counts", "patch"):
        for way in ("up", "down"):
            a, b = (
                [e["bytes"] for e in r.of("bytes") if (e["kind"], e["direction"]) == (kind, way)]
                for r in (run, done)
            )
            assert way == "down" or a == b
    (a,), (b,) = run.of("round_finished"), done.of("round_finished")
    assert all(a[k] == b[k] for k in ("loss", "examples", "good", "bad"))
    assert not (run.folder / "replies").exists()


def test_a_killed_server_asks_only_for_what_is_missing(
    flat: dict[str, Any], done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = killed(flat, tmp_path / "run", [("reply", 2)], monkeypatch)
    check(run, done)
    assert asked == [1, 2, 3, 4, 1, 3]  # two of the four replies were kept
    resumed = run.of("run_started")[-1]
    assert resumed["resumed_from"] == 0 and resumed["kept"] == 2
    record = fold(run.events)
    assert record.round(1).got == 4 and record.round(1).started


def moment(rng: random.Random) -> tuple[str, int]:
    """Half of the time anywhere, half of the time about an arrival."""
    if rng.random() < 0.5:
        return "", rng.randrange(90)
    return rng.choice(("reply", "merged", "memory")), rng.randrange(4)


def test_kills_at_random_moments_leave_the_same_bits(
    flat: dict[str, Any], done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(7)
    for i in range(3):
        moments = [moment(rng) for _ in range(2)]
        run, _ = killed(flat, tmp_path / f"run-{i}", moments, monkeypatch)
        check(run, done)


@pytest.mark.slow
def test_fifty_kills_leave_the_same_bits(
    flat: dict[str, Any], done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, kills = random.Random(1), 0
    while kills < 50:
        moments = [moment(rng) for _ in range(rng.randrange(1, 6))]
        run, _ = killed(flat, tmp_path / f"run-{kills}", moments, monkeypatch)
        check(run, done)
        kills += len(moments)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["one-shot", "async"])
def test_fifty_real_kills_leave_the_same_bits(tmp_path: Path, schedule: str) -> None:
    """Processes of their own, killed with -9 at random moments."""
    done = subprocess.run(
        [sys.executable, "tests/kill_loop.py", "--kills", "50", "--schedule", schedule,
         str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3000,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("fault", ["value", "torn", "other"])
def test_a_damaged_kept_reply_is_asked_for_again(
    flat: dict[str, Any], done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed), monkeypatch.context() as patch:
        emit = EventLog.emit
        left = [2]

        def stop(self: EventLog, event: Any, arm: str = "") -> None:
            if event.event == "reply":
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            emit(self, event, arm)

        patch.setattr(EventLog, "emit", stop)
        go(flat, folder, seconds={1: 3.0, 3: 2.0})
    values, index = folder / "replies/values.bin", folder / "replies/index.jsonl"
    if fault == "value":
        data = bytearray(values.read_bytes())
        data[5] ^= 1
        values.write_bytes(data)
    elif fault == "torn":
        index.write_bytes(index.read_bytes()[:-10])
    else:
        index.write_text(index.read_text().replace('"start":"', '"start":"0', 1))
    run = go(flat, folder, {"run.resume": True})
    assert len(run.clients.script.asked) == {"value": 3, "torn": 3, "other": 4}[fault]
    assert run.adapter == done.adapter


# --- settings that contradict each other ----------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"federation.rounds": 5, "train.local-steps": 7},
         r"one-shot .*contradicts federation.rounds = 5.*train.local-steps = 35"),
        ({"federation.clients-per-round": 3}, r"every client.*clients-per-round = 3"),
        ({"federation.aggregate": "none"}, "federation.aggregate = none"),
        ({"federation.enough-replies": 1}, "federation.enough-replies = 1 is not between"),
        ({"federation.merge-every": 2, "federation.score-every": 3}, "no multiple"),
    ],
)  # fmt: skip
def test_contradictions_are_named(flat: dict[str, Any], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.from_flat(flat | keys)


def test_the_message_carries_all_steps(done: Done) -> None:
    asked = [open_envelope(e) for _, e in done.clients.sent if e.kind == "train"]
    assert all(isinstance(m, TrainRequest) and m.settings.steps == 3 for m in asked)
