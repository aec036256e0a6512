"""Server work beside the next round (align.lag): the bits of an obvious loop, whatever happens."""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fabricate
import kill_loop
import pytest
import tiny
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

import server_app.transport as transports
from fedpft_core.config import from_flat
from fedpft_core.errors import RunError, UserError
from fedpft_core.train.evaluate import evaluate
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import Failure, Hello, TrainRequest
from server_app import app
from server_app.phases import align, load
from server_app.run.events import EventLog
from server_app.schedule import overlap
from server_app.strategy import Strategy
from server_app.transport import FlowerTransport, LocalTransport

ROUNDS = 5
LAST = f"checkpoints/round-{ROUNDS:04d}"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quick task whose clients count inactive neurons, re-aligned after every round."""
    quick = {
        "align.lag": 1, "align.interval": 1, "align.steps": 2, "distill.steps": 2,
        "train.local-steps": 2, "federation.rounds": ROUNDS, "federation.clients": 3,
        "plug.refit": "none", "run.gradient-rows": 0,
        "run.checkpoints": 2 * ROUNDS,
    }  # fmt: skip
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=60) | quick


@pytest.fixture(scope="module")
def whole(task: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The task from beginning to end, to compare others with."""
    return Run(task, tmp_path_factory.mktemp("whole"))


class Run:
    """A run in this process, its events, and what its clients were asked."""

    def __init__(self, flat: dict[str, Any], folder: Path, **keys: Any) -> None:
        self.folder = folder
        self.federation = tiny.Federation(flat)
        self.events = tiny.run(flat, folder, self.federation, **keys)

    def of(self, *names: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] in names]

    def digests(self) -> dict[int, str]:
        """The sub-FM that clients train on, by round."""
        asked = [open_envelope(e) for _, e in self.federation.sent if e.kind == "train"]
        return {m.round: m.digest for m in asked if isinstance(m, TrainRequest)}


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "events.jsonl").read_text().splitlines()]


def by_hand(flat: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rounds one after the other; what is re-aligned after one is kept back for a whole round."""
    config = from_flat(flat | {"run.dir": str(folder)})
    folder.mkdir()
    log = EventLog(None)
    bench = load.load(config, log)
    transport = tiny.Federation(flat).transport()
    strategy = Strategy(config, transport, log)
    state = app._before_round_1(bench, strategy, transport, log)
    kept_back, scores, rounds = None, [], config.federation.rounds
    for round in range(1, rounds + 1):
        counted = round % config.align.interval == 0 and round <= rounds - 2
        outcome = strategy.run_round(state, round, config.align.inactive if counted else "")
        if kept_back is not None:
            state.package, state.digests = kept_back.package, kept_back.digests
            state.digest = kept_back.digest
            state.patches.append(kept_back.patches[-1])
            kept_back = None
        state.adapter, state.round = outcome.adapter, round
        bench.models.plug(state.adapter)
        for model in (bench.models.proxy, bench.models.fm):
            found = evaluate(model, bench.rows.task, bench.rows.scored, 64)
            scores.append((round, found.value, found.loss))
        if counted:
            kept_back = copy.deepcopy(state)
            align.align(bench, kept_back, round, outcome.counts)
    return {
        "digest": state.digest, "adapter": state.adapter, "scores": scores,
        "frozen": {k: state.package.weights[k] for k in bench.models.trained_names()},
        "patches": [(p.source, p.target) for p in state.patches],
    }  # fmt: skip


@pytest.mark.parametrize("interval", [1, 2])
def test_bits_are_those_of_rounds_one_after_the_other(
    task: dict[str, Any], whole: Run, tmp_path: Path, interval: int
) -> None:
    run = whole if interval == 1 else Run(task, tmp_path / "run", align__interval=interval)
    want = by_hand(task | {"align.interval": interval}, tmp_path / "by-hand")
    end = run.folder / LAST
    saved = json.loads(json.loads((end / "state.json").read_text())["state"])
    assert saved["digest"] == want["digest"]
    assert [(a, b) for a, b, _ in saved["patches"]] == want["patches"]
    assert len(want["patches"]) == (3 if interval == 1 else 1)
    assert tiny.same_bits(load_file(end / "adapter.safetensors"), want["adapter"])
    assert tiny.same_bits(load_file(end / "frozen.safetensors"), want["frozen"])
    found = [(e["round"], e["value"], e["loss"]) for e in run.of("evaluation") if e["round"]]
    assert found == want["scores"]


def test_what_is_realigned_reaches_clients_with_the_round_after_next(whole: Run) -> None:
    made = {e["round"]: e for e in whole.of("alignment")}
    assert list(made) == [1, 2, 3]  # nobody would train on what follows round 4
    got = whole.digests()
    assert got[1] == got[2] == made[1]["digest_from"]
    for round, event in made.items():
        assert got[round + 2] == event["digest_to"]
        assert event["digest_from"] == got[round + 1]


def test_the_work_of_a_round_is_named_after_it_and_done_in_the_next(whole: Run) -> None:
    course = [
        (e["event"], e["round"])
        for e in whole.of("round_started", "reply", "evaluation", "alignment", "round_finished")
        if e["round"] in (2, 3) and e.get("model") != "fm"
    ]
    work = [("evaluation", 2), ("alignment", 2)]
    at = course.index(("round_started", 3))
    assert course[at - 1] == ("round_finished", 2)
    assert course[at + 1 : at + 3] == work
    assert course[at + 3 :].count(("reply", 3)) == 3
    finished = whole.of("round_finished")
    assert "meanwhile_seconds" not in finished[0]
    for e in finished[1:]:
        assert 0 < e["meanwhile_seconds"] < e["exchange_seconds"] <= e["seconds"]
        assert e["overhead_seconds"] <= e["seconds"] - e["meanwhile_seconds"]
    # The last round has nothing beside which it could be scored.
    assert [e["evaluate_seconds"] > 0 for e in finished] == [False] * (ROUNDS - 1) + [True]


def test_where_nothing_is_realigned_the_lag_changes_nothing(
    task: dict[str, Any], tmp_path: Path
) -> None:
    runs = [
        Run(task, tmp_path / f"{lag}", align__lag=lag, align__interval=0, federation__rounds=3,
            run__evaluate_every=2)
        for lag in (0, 1)
    ]  # fmt: skip
    exported = "adapter/adapter_model.safetensors"
    assert len({(run.folder / exported).read_bytes() for run in runs}) == 1
    scores = [[(e["round"], e["model"], e["value"]) for e in r.of("evaluation")] for r in runs]
    assert scores[0] == scores[1]


def differences(folder: Path, other: Path) -> list[str]:
    """What of the files and events of a run is another, where nothing may be."""
    return kill_loop.differences(kill_loop.outcome(folder), kill_loop.outcome(other))


OTHER = {
    "align.proportion": 1.0, "align.interval": 2, "align.threshold": 1e-9,
    "align.disagreement": "output-error", "federation.server-optimiser": "adam",
    "run.evaluate-every": 3,
}  # fmt: skip


@pytest.mark.parametrize(("keys", "stops"), [({}, (1, 3)), (OTHER, (2, 4))])
def test_a_run_that_stops_goes_on_to_the_same_bits(
    task: dict[str, Any], whole: Run, tmp_path: Path, keys: dict[str, Any], stops: tuple[int, ...]
) -> None:
    run = Run(task | keys, tmp_path / "whole") if keys else whole
    for round in stops:
        resume = {"run.resume": True} if round > stops[0] else {}
        with pytest.raises(RunError, match=f"stopped after round {round} "):
            Run(task | keys | resume | {"run.stop-after": round}, tmp_path / "parts")
    Run(task | keys | {"run.resume": True}, tmp_path / "parts")
    assert not differences(tmp_path / "parts", run.folder)


class Dies(Exception):
    """What ends a run in the middle of something."""


@pytest.mark.parametrize("where", ["before the work", "in the work", "after the work"])
def test_a_run_that_dies_in_a_round_goes_on_to_the_same_bits(
    task: dict[str, Any], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def dies(*args: Any) -> None:
        raise Dies

    with monkeypatch.context() as patched:
        if where == "in the work":
            real = align.make_patch

            def half(*args: Any) -> Any:
                made = real(*args)
                if open_rounds(tmp_path) == 3:
                    raise Dies
                return made

            patched.setattr(align, "make_patch", half)
        elif where == "before the work":
            patched.setattr(overlap.Work, "__call__", dies)
        else:
            patched.setattr(overlap.Work, "merge", dies)
        with pytest.raises(Dies):
            Run(task, tmp_path)
    Run(task, tmp_path, run__resume=True)
    assert not differences(tmp_path, whole.folder)


def open_rounds(folder: Path) -> int:
    """The round that is under way."""
    return max(e["round"] for e in events_of(folder) if e["event"] == "round_started")


class Fails(LocalTransport):
    """A transport on which all clients fail the first time they are asked in round 3."""

    failed = False

    def exchange(
        self, messages: Any, round: int, timeout: float, on_reply: Any, *more: Any
    ) -> None:
        train = any(m.kind == "train" for m in messages.values())
        if train and round == 3 and not self.failed:
            self.failed = True
            for work in more:
                if work:
                    work()
            for node in messages:
                on_reply(node, Failure("no power"))
            return
        super().exchange(messages, round, timeout, on_reply, *more)


def test_a_round_that_is_tried_again_has_the_same_bits(
    task: dict[str, Any], whole: Run, tmp_path: Path
) -> None:
    federation = tiny.Federation(task)
    plain = federation.transport()
    federation.transport = lambda: Fails(plain.clients)  # type: ignore[method-assign]
    events = tiny.run(task, tmp_path, federation)
    tries = [e for e in events if e["event"] == "round_started" and e["round"] == 3]
    assert [e["attempt"] for e in tries] == [1, 2]
    assert len([e for e in events if e["event"] == "alignment"]) == 3
    for file in ("adapter.safetensors", "frozen.safetensors"):
        assert (tmp_path / LAST / file).read_bytes() == (whole.folder / LAST / file).read_bytes()


def test_an_alignment_that_diverges_ends_the_run(task: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"align\.lr"):
        Run(task, tmp_path, align__lr=1e30)
    events = events_of(tmp_path)
    assert events[-1]["event"] == "run_failed" and "align.lr" in events[-1]["reason"]
    assert [e["round"] for e in events if e["event"] == "round_finished"] == [1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["round-0001"]


# --- what happens meanwhile ---------------------------------------------------------------


def test_the_work_is_done_once_however_often_a_round_is_tried() -> None:
    network, calls = fabricate.network("a", "b", "c"), []
    network.members[11].spoil = fabricate.refuse("not today")
    config = fabricate.config(federation__min_clients=3, federation__clients_per_round=3)
    strategy = Strategy(config, network, EventLog(None))
    with pytest.raises(RunError, match="not today"):
        strategy.run_round(fabricate.state(), 1, "", lambda: calls.append("work"))
    assert calls == ["work"]
    assert sum(e.kind == "train" and way == "down" for way, _, e in network.log) == 6


class Grid:
    """A grid whose nodes answer after so many seconds; nothing comes that is not pulled."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.ttl = 0.0
        self.due: dict[str, float] = {}

    def push_messages(self, messages: Any) -> list[str]:
        (message,) = messages
        node = message.metadata.dst_node_id
        self.ttl = message.metadata.ttl
        self.due[f"m{node}"] = time.monotonic() + self.seconds[node]
        return [f"m{node}"]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        now = time.monotonic()
        return [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=i), content=i, has_error=lambda: False
            )
            for i in ids
            if self.due[i] <= now
        ]


def test_what_has_come_during_the_work_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    hello = seal(Hello())
    monkeypatch.setattr(transports, "_opened", lambda reply: hello)
    grid = Grid({1: 0.0, 2: 0.0, 3: 3600.0})
    got: dict[int, Envelope | Failure] = {}
    transport = FlowerTransport(grid, 0.01)  # type: ignore[arg-type]
    messages = dict.fromkeys(grid.seconds, hello)

    def work() -> None:
        assert len(grid.due) == 3 and not got
        time.sleep(0.2)

    transport.exchange(messages, 1, 0.05, got.__setitem__, work)
    assert got[1] is hello and got[2] is hello
    late = got[3]
    assert isinstance(late, Failure) and late.late and "no reply within" in late.reason
    kept = grid.ttl
    transport.exchange(messages, 1, 0.05, got.__setitem__)
    assert kept - grid.ttl == pytest.approx(600.0)


@pytest.mark.parametrize(("changes", "named"), [
    ({"federation.schedule": "one-shot", "federation.rounds": 1}, "federation.schedule = one-shot"),
    ({"federation.schedule": "async"}, "federation.schedule = async"),
    ({"federation.aggregate": "none"}, "federation.aggregate = none"),
    ({"federation.early-stopping": 2}, "federation.early-stopping = 2"),
    ({"head.interval": 1}, "head.interval = 1"),
    ({"plan.widths": "0.1,0.5"}, "plan.widths = 0.1,0.5"),
    ({"privacy.secure": True}, "privacy.secure = true"),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"align\.lag = 1 .*{re.escape(named)}"):
        from_flat({"align.lag": 1} | changes)
    with pytest.raises(UserError, match=r"align\.lag: expected at least 0 and at most 1"):
        from_flat({"align.lag": 2})
