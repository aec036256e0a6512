"""Faults on real Flower processes: a SuperLink with SuperNodes on loopback, and what is killed.

`pytest -m slow tests/whole/test_deployment.py`; docs/faults.md says what each showed.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flower
import psutil
import pytest
import tiny
from flower import job
from flwr.supercore.task_identity import TaskIdentity

from client_app.node import client_for
from client_app.process import ProcessCache
from fedpft_core import config
from fedpft_core.errors import RunError, UserError
from fedpft_core.wire import flower as wire
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import Failure, Hello, RefusalReply
from server_app.app import run as server_run
from server_app.run.events import EventLog, read_events
from server_app.transport import FlowerTransport, LocalTransport

slow = pytest.mark.slow


def deployed(
    folder: Path, steps: int = 10, head: str = "statistics", **federation: Any
) -> tuple[Path, Path]:
    """A run's configuration and its folder. The server holds no training rows."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = job(folder, **federation)
    tree["data"]["train"] = ""
    tree["run"]["threads"] = 1
    tree["train"]["local-steps"] = steps
    tree["head"] = {"start": head}
    return flower.write_config(folder / "run.yaml", tree), folder / "run"


def node_rows(folder: Path, name: str) -> Path:
    """A node's own data file: other rows and another number of them for every name."""
    number = ord(name[-1])
    return tiny.write_csv(folder / f"{name}.csv", tiny.sentences(30 + number % 7, number))


def join(d: flower.Deployment, name: str, *more: str) -> None:
    """Start a node with its data file and a cache folder, both named after it."""
    data = d.folder / f"{name}.csv"
    if not data.exists():
        node_rows(d.folder, name)
    d.start_node(name, data, *more, **{"cache-dir": str(d.folder / f"cache-{name}")})


def lose_disk(d: flower.Deployment, name: str) -> None:
    shutil.rmtree(d.folder / f"cache-{name}", ignore_errors=True)


def of(run: Path, event: str, **fields: Any) -> list[dict[str, Any]]:
    return [
        e for e in flower.events(run)
        if e["event"] == event and all(e.get(k) == v for k, v in fields.items())
    ]  # fmt: skip


def statuses(run: Path, round: int) -> list[tuple[str, str]]:
    return sorted((e["client"], e["status"]) for e in of(run, "reply", round=round))


def in_training(d: flower.Deployment, name: str, started: dict[str, object]) -> psutil.Process:
    """The process of a node that has its training message, whose worker is at work on it.

    Killed before it has taken the message, Flower would start another in its place. Processor
    time tells how far the worker is, however busy the machine.
    """
    process = d.client_process(name, float(str(started["t"])))
    deadline = time.monotonic() + 60
    worker = d.worker_process(name)
    before = sum(worker.cpu_times()[:2])
    while sum(worker.cpu_times()[:2]) < before + 0.5 and time.monotonic() < deadline:
        assert process.is_running(), "it has trained before it was found"
        time.sleep(0.05)
    return process


def finished(d: flower.Deployment, cli: subprocess.Popen[bytes], seconds: float) -> int:
    try:
        return cli.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not over after {seconds:g} s\n{d.logs()}") from None


# ---------------------------------------------------------------- nodes that fail


@slow
def test_dead_clients_dead_nodes_late_nodes_and_lost_disks(tmp_path: Path) -> None:
    """One run of three rounds: a try too few have answered is repeated, another goes on."""
    conf, run = deployed(
        tmp_path / "job", 200, **{"rounds": 3, "clients": 5, "clients-per-round": 5,
                                  "min-clients": 3, "attempts": 3, "round-timeout": 170.0},
    )  # fmt: skip
    with flower.deployment(tmp_path / "flower") as d:
        for name in ("node-a", "node-b", "node-c", "node-d"):
            join(d, name)
        cli = d.run(run, conf)

        # Round 1: a client process and a whole SuperNode die; two of three needed are left.
        started = flower.wait_for(run, "round_started", 200, cli, round=1)
        assert started["clients"] == ["node-a", "node-b", "node-c", "node-d"]
        flower.kill(d.nodes["node-b"])
        in_training(d, "node-a", started).kill()
        gone = flower.wait_for(run, "reply", 160, cli, round=1, client="node-b")
        assert gone["status"] == "error" and "the node is gone (code 5" in str(gone["reason"])
        join(d, "node-b")
        join(d, "node-e")
        dead = flower.wait_for(run, "reply", 160, cli, round=1, client="node-a")
        assert dead["status"] == "error"
        assert "the client process died (code 8" in str(dead["reason"])
        # Flower looks at heartbeats: it takes up to a minute, not an instant nor the deadline.
        assert all(20 < float(str(e["seconds"])) < 150 for e in (gone, dead))
        flower.wait_for(run, "round_started", 200, cli, round=1, attempt=2)
        said = [e["text"] for e in of(run, "warning") if "attempt 1 of 3" in e["text"]]
        assert len(said) == 1 and "2 good replies of the federation.min-clients = 3" in said[0]
        flower.wait_for(run, "round_finished", 200, cli, round=1, bad=0)

        # Round 2: the late node and the restarted one are there; one client process dies, and
        # one node leaves in order after its reply, loses its disk and comes back.
        started = flower.wait_for(run, "round_started", 250, cli, round=2)
        assert started["clients"] == ["node-a", "node-b", "node-c", "node-d", "node-e"]
        in_training(d, "node-c", started).kill()
        flower.wait_for(run, "reply", 150, cli, round=2, client="node-d", status="ok")
        d.stop_node("node-d")
        lose_disk(d, "node-d")
        join(d, "node-d")
        flower.wait_for(run, "round_finished", 200, cli, round=2, good=4, bad=1)

        assert finished(d, cli, 300) == 0, d.logs()
        assert d.last_run()["status"] == "finished:completed"
    names = [f"node-{x}" for x in "abcde"]
    assert len(of(run, "round_started", round=2)) == 1, "enough had answered"
    assert statuses(run, 2) == [(n, "error" if n == "node-c" else "ok") for n in names]
    # The server believed that the disk was whole, was told better, and served it again.
    assert statuses(run, 3) == sorted([*((n, "ok") for n in names), ("node-d", "need")])
    packages = [e["client"] for e in of(run, "bytes", kind="package")]
    assert packages.count("node-d") == 2 and packages.count("node-e") == 1
    assert [(e["good"], e["bad"]) for e in of(run, "round_finished")] == [
        (of(run, "round_finished")[0]["good"], 0), (4, 1), (5, 0),
    ]  # fmt: skip


@slow
def test_a_slow_node_misses_the_deadline_and_its_late_reply_is_not_used(tmp_path: Path) -> None:
    deadline = 80.0
    conf, run = deployed(
        tmp_path / "job", 200, **{"rounds": 2, "clients": 3, "clients-per-round": 3,
                                  "min-clients": 1, "attempts": 4, "round-timeout": deadline},
    )  # fmt: skip
    with flower.deployment(tmp_path / "flower") as d:
        for name in ("node-a", "node-b", "node-c"):
            join(d, name)
        cli = d.run(run, conf)
        started = flower.wait_for(run, "round_started", 200, cli, round=1)
        in_training(d, "node-b", started)
        slowed = d.worker_process("node-b")
        slowed.suspend()  # the process that waits for it tells Flower that it lives
        try:
            while not of(run, "round_finished"):
                time.sleep(0.5)
                assert cli.poll() is None and time.time() < float(str(started["t"])) + 150
        finally:
            slowed.resume()
        assert finished(d, cli, 400) == 0, d.logs()
        log = (d.folder / "node-b.log").read_text()
    late = of(run, "reply", round=1, client="node-b")
    assert [e["status"] for e in late] == ["error"]
    assert re.fullmatch(r"no reply within (79|80)\.\d s", late[0]["reason"])
    assert deadline - 1 <= late[0]["seconds"] < deadline + 20
    assert {e["client"] for e in of(run, "reply", round=1, status="ok")} == {"node-a", "node-c"}
    # It did send that reply while round 2 was on, as it had sent its answer to "who are you" ...
    assert log.count("Sent successfully") >= 2
    # ... but round 2 took answers to its own questions only: a reply of round 1 would have been
    # refused, and node-b would have settled round 2 before it was asked.
    assert not of(run, "reply", status="refused")
    for tried in of(run, "round_started"):
        asked = of(run, "reply", round=tried["round"], client="node-b")
        assert len(asked) == len(of(run, "round_started", round=tried["round"]))


@slow
def test_the_run_fails_in_one_sentence_after_its_attempts(tmp_path: Path) -> None:
    conf, run = deployed(
        # With statistics the run would fail in the same words before round 1.
        tmp_path / "job", head="zero",
        **{"rounds": 2, "clients": 2, "min-clients": 2, "attempts": 2},
    )  # fmt: skip
    with flower.deployment(tmp_path / "flower") as d:
        join(d, "node-a")
        tiny.write_csv(d.folder / "node-b.csv", [("the cat", "animal"), ("the red", "colour")])
        join(d, "node-b")
        cli = d.run(run, conf)
        assert finished(d, cli, 300) == 1, d.logs()
        flower_says = d.last_run()
        told = (d.folder / "cli.log").read_text()
    assert [e["attempt"] for e in of(run, "round_started")] == [1, 2]
    reason = of(run, "run_failed")[0]["reason"]
    assert reason.startswith("round 1: 1 good replies of the federation.min-clients = 2 needed")
    assert "node-b: a row of this node has a label that is none of the run's" in reason
    assert "colour" not in reason and "colour" in d.logs()  # only the node's owner is told
    assert f"fedpft: error: {reason}" in told and "Traceback" not in told
    # Flower knows the run as failed, in the same words, and its log holds no traceback either.
    assert flower_says["status"] == "finished:failed"
    assert reason in str(flower_says["status-details"])
    log = (run / "flower" / "run.log").read_text()
    assert reason in log and "Traceback" not in log


def test_only_errors_for_people_lose_their_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("flwr")
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(handler.format(record))  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        for kind in (UserError, RunError, ValueError):
            try:
                raise kind("one sentence.")
            except Exception as error:
                log.error("%s raised an exception", "ServerApp", exc_info=error)
    finally:
        log.removeHandler(handler)
    assert shown[:2] == ["one sentence."] * 2
    assert "ServerApp raised" in shown[2] and "Traceback" in shown[2]


class Grid:
    """Flower's Grid as the transport sees it; `answers` come in turn, whoever is asked for."""

    def __init__(self, answers: list[Any], refuses: int = 0) -> None:
        self.answers, self.refuses, self.sent = answers, refuses, 0

    def push_messages(self, messages: Any) -> list[str]:
        self.sent += 1
        return [] if messages[0].metadata.dst_node_id == self.refuses else [f"question-{self.sent}"]

    def pull_messages(self, ids: Any) -> list[Any]:
        return [self.answers.pop(0)] if self.answers else []


def answer_to(question: str, code: int = 0, reason: str = "", text: str = "") -> Any:
    content = wire.to_record(seal(RefusalReply("x", text)))
    return SimpleNamespace(
        metadata=SimpleNamespace(reply_to_message_id=question, src_node_id=1),
        content=content,
        error=SimpleNamespace(code=code, reason=reason),
        has_error=lambda: bool(code),
    )


def test_replies_are_matched_by_the_message_they_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by their source, which a reply that Flower makes for a dead node does not tell; what
    answers an earlier question, or the same one again, is nobody's."""
    for name, value in (("_run_id", 2**63), ("_node_id", 1), ("_task_id", 2**62)):
        monkeypatch.setattr(TaskIdentity, name, value, raising=False)
    grid = Grid([
        answer_to("question-of-round-1", text="late"),
        answer_to("question-2", 5, "a long way to say so"),
        answer_to("question-4", 2, "Traceback\nValueError: bad row"),
        answer_to("question-1", text="good"),
        answer_to("question-1", text="again"),
        answer_to("question-5", 8, "No heartbeat"),
    ], refuses=13)  # fmt: skip
    told: list[int] = []
    replies: dict[int, Any] = {}

    def on_reply(node: int, reply: Any) -> None:
        told.append(node)
        replies[node] = reply

    messages = dict.fromkeys((11, 12, 13, 14, 15, 16), seal(Hello()))
    FlowerTransport(grid, 0.01).exchange(messages, 2, 0.3, on_reply)  # type: ignore[arg-type]
    good = replies.pop(11)
    assert isinstance(good, Envelope)
    assert open_envelope(good) == RefusalReply("x", "good")
    assert replies == {
        12: Failure("the node is gone (code 5)"),
        13: Failure("the node is gone"),
        14: Failure("the client raised an error (code 2: ValueError: bad row)"),
        15: Failure("the client process died (code 8)", died=True),
        16: Failure("no reply within 0.3 s", late=True),
    }
    assert sorted(told) == [11, 12, 13, 14, 15, 16]


def test_replies_are_handed_on_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are there, only a few are asked for at once, and those before are gone."""
    for name, value in (("_run_id", 2**63), ("_node_id", 1), ("_task_id", 2**62)):
        monkeypatch.setattr(TaskIdentity, name, value, raising=False)

    class Reply:
        def __init__(self, question: str) -> None:
            made = answer_to(question, text="x")
            self.metadata, self.content = made.metadata, made.content

        def has_error(self) -> bool:
            return False

    class Full:
        def __init__(self) -> None:
            self.sent = 0
            self.given: list[weakref.ref[Reply]] = []
            self.most = 0

        def push_messages(self, messages: Any) -> list[str]:
            self.sent += 1
            return [f"question-{self.sent}"]

        def pull_messages(self, ids: list[str]) -> list[Reply]:
            made = [Reply(question) for question in ids]
            self.given += [weakref.ref(reply) for reply in made]
            self.most = max(self.most, sum(r() is not None for r in self.given))
            return made

    grid, told = Full(), []
    messages = dict.fromkeys(range(1, 101), seal(Hello()))
    FlowerTransport(grid, 0.01).exchange(  # type: ignore[arg-type]
        messages, 1, 30.0, lambda node, reply: told.append((node, type(reply)))
    )
    assert sorted(told) == [(node, Envelope) for node in messages]
    assert len(grid.given) == 100 and grid.most <= 5


# ---------------------------------------------------------------- the server's side


def in_process(flat: dict[str, Any], rows: dict[str, Path], folder: Path) -> None:
    """The same run without Flower's processes: same names, same rows, so the same bits."""
    folder.mkdir()
    caches = {name: ProcessCache() for name in rows}

    def answer(name: str, envelope: Any) -> Any:
        node = {"name": name, "data-path": str(rows[name]), "cache-dir": str(folder / name)}
        client = client_for(node, flat)
        client.cache = caches[name]
        return client.handle(envelope)

    clients = {i + 1: partial(answer, name) for i, name in enumerate(sorted(rows))}
    events = EventLog(folder / "events.jsonl")
    server_run(config.from_flat(flat | {"run.dir": str(folder)}), LocalTransport(clients), events)
    events.close()


@slow
def test_killed_server_and_killed_superlink_resume_to_the_same_bits(tmp_path: Path) -> None:
    conf, run = deployed(
        tmp_path / "job", **{"rounds": 4, "clients": 2, "clients-per-round": 2, "min-clients": 2}
    )
    names = ("node-a", "node-b")
    (tmp_path / "flower").mkdir()
    rows = {name: node_rows(tmp_path / "flower", name) for name in names}
    in_process(config.to_flat(config.from_flat(config.read_file(conf))), rows, tmp_path / "alone")
    with flower.deployment(tmp_path / "flower") as d:
        for name in names:
            join(d, name)
        cli = d.run(run, conf)
        flower.wait_for(run, "round_started", 200, cli, round=2)
        d.server_process().kill()
        assert finished(d, cli, 200) == 1, d.logs()
        assert d.last_run()["status"] == "finished:failed"
        told = (d.folder / "cli.log").read_text()
        assert f"Continue with: fedpft run --resume {run} --superlink test" in told

        # The SuperLink alone, away for some seconds: the run goes on where it was. (Should Flower
        # give it up after all, it is taken up again like any other.)
        cli = d.resume(run)
        flower.wait_for(run, "run_started", 200, cli, resumed_from=1)
        flower.wait_for(run, "round_started", 300, cli, round=3)
        assert d.superlink is not None
        flower.kill(d.superlink)
        d.superlink.wait(10)
        time.sleep(5)
        d.start_superlink()
        while cli.poll() is None and not of(run, "round_started", round=4):
            time.sleep(0.2)
        if cli.poll() is not None:
            print("the run did not outlive the SuperLink")
            cli = d.resume(run)
            flower.wait_for(run, "round_started", 300, cli, round=4)

        # The whole machine of the server.
        time.sleep(4)
        d.crash_server()
        time.sleep(2)
        d.start_superlink()
        assert finished(d, cli, 300) == 1, d.logs()
        cli = d.resume(run)
        assert finished(d, cli, 300) == 0, d.logs()
        assert d.last_run()["status"] == "finished:completed"
    log = flower.events(run)
    assert [e["round"] for e in log if e["event"] == "round_finished"] == [1, 2, 3, 4]
    assert {e["status"] for e in log if e["event"] == "reply"} == {"ok"}
    assert [e["resumed_from"] for e in log if e["event"] == "run_started"][-1] == 3
    last = sorted((run / "checkpoints").glob("round-*"))[-1].name
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/{last}/frozen.safetensors"):
        assert (run / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
    alone = [e for _, e in read_events(tmp_path / "alone" / "events.jsonl")]
    scores = [
        [(e["round"], e["model"], e["value"]) for e in events if e["event"] == "evaluation"]
        for events in (log, alone)
    ]
    assert scores[0] == scores[1]


# ---------------------------------------------------------------- TLS, node keys, traffic

# What Flower's own count of a run's traffic adds to the app's ledger, in bytes of each direction
# for each message and part; docs/protocol.md. The least is what an empty message costs.
LEAST_PER_MESSAGE, PER_MESSAGE, PER_PART = 650, 1150, 800


def check_traffic(run: Path, flower_says: dict[str, Any]) -> dict[str, float]:
    """The app's ledger against Flower's count; the frame as a share of the bound."""
    shares = {}
    for direction, field in (("down", "outbound-bytes"), ("up", "inbound-bytes")):
        ledger = of(run, "bytes", direction=direction)
        messages = sum(e["kind"] == "control" for e in ledger)
        bound = messages * PER_MESSAGE + (len(ledger) - messages) * PER_PART
        frame = flower_says["network-traffic"][field] - sum(e["bytes"] for e in ledger)
        assert messages * LEAST_PER_MESSAGE < frame <= bound, (direction, frame, bound, messages)
        shares[direction] = frame / bound
    return shares


@slow
def test_tls_and_node_keys(tmp_path: Path) -> None:
    """A run over TLS with registered nodes; strangers and bad certificates are refused."""
    conf, run = deployed(
        tmp_path / "job", **{"rounds": 2, "clients": 2, "clients-per-round": 2, "min-clients": 2}
    )
    certificates = flower.certificates(tmp_path / "certificates")
    other = flower.certificates(tmp_path / "other")
    keys = {n: flower.node_key(tmp_path / n) for n in ("node-a", "node-b", "stranger")}

    def options(name: str) -> tuple[str, ...]:
        return ("--auth-supernode-private-key", str(keys[name]), "--max-retries", "1")

    def refused(d: flower.Deployment, name: str, said: str) -> None:
        status = d.nodes[name].wait(120)
        log = (d.folder / f"{name}.log").read_text()
        assert status == 1 and "Exit Code: 305" in log and said in log, (status, log)

    with flower.deployment(tmp_path / "flower", certificates) as d:
        for name in ("node-a", "node-b"):
            d.flwr("supernode", "register", str(keys[name].with_suffix(".pub")), "test")
            join(d, name, *options(name))
        rows = node_rows(tmp_path, "node-x")
        d.start_node("stranger", rows, *options("stranger"))
        d.start_node("wrong-ca", rows, *options("node-a"), ca=other / "ca.pem")
        refused(d, "stranger", "code: ")
        refused(d, "wrong-ca", "CERTIFICATE_VERIFY_FAILED")
        cli = d.run(run, conf)
        assert finished(d, cli, 300) == 0, d.logs()
        flower_says = d.last_run()
        assert flower_says["status"] == "finished:completed"
    assert {e["client"] for e in of(run, "reply")} == {"node-a", "node-b"}
    assert {e["status"] for e in of(run, "reply")} == {"ok"}
    print("frame as a share of its bound:", check_traffic(run, flower_says))

    expired = flower.certificates(tmp_path / "expired", days=-1)
    with flower.deployment(tmp_path / "flower-expired", expired) as d:
        d.start_node("node-a", rows, *options("node-a"))
        refused(d, "node-a", "certificate has expired")
        # The person who submits a run is kept out in the same way.
        cli = d.run(tmp_path / "never", conf)
        assert finished(d, cli, 120) == 1
