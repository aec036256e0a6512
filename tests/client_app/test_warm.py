"""The process that stays between messages: equal bits, and nothing depends on it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

from client_app import answer as here
from client_app.process import PROCESS_CACHE
from client_app.store import Store
from client_app.warm import ask as asking
from client_app.warm import frames, place
from client_app.warm.ask import ask
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.form import Envelope
from fedpft_core.wire.messages import Hello, HelloReply, NeedReply, RefusalReply, TrainReply

Node = dict[str, Any]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    data = tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12, 0))
    yield {"name": "n", "data-path": str(data), "cache-dir": str(tmp_path / "warm")}
    for process in workers(tmp_path):
        process.kill()


def workers(folder: Path) -> list[psutil.Process]:
    """Workers of nodes below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "client_app.warm.worker" in words and str(folder) in words[words.index("-m") + 2]:
            found.append(process)
    return found


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def cold(node: Node, envelope: Envelope) -> Envelope:
    """The same without a worker, in a process and on a disk that know nothing."""
    PROCESS_CACHE.models.clear()
    PROCESS_CACHE.rows.clear()
    alone = node | {"cache-dir": node["cache-dir"] + "-cold"}
    return here.answer(alone, {}, lambda: envelope)


def same(a: Envelope | None, b: Envelope) -> bool:
    """Equal but for what time took."""
    assert a is not None
    one, two = json.loads(a.head), json.loads(b.head)
    for head in (one, two):
        for key in ("seconds", "timings"):
            head.pop(key, None)
    return a.kind == b.kind and one == two and a.parts == b.parts


def test_equal_bits_and_the_same_record(node: Node, request_for: Any, tmp_path: Path) -> None:
    first = request_for(count_rule="nonpositive")
    messages = [
        Hello(), first, replace(first, package=b"", round=2),
        replace(first, package=b"", round=3, digest="0" * 64),
        replace(first, settings=replace(first.settings, threads=0)),
        replace(first, package=b"", round=4),
    ]  # fmt: skip
    kinds = [HelloReply, TrainReply, TrainReply, NeedReply, RefusalReply, TrainReply]
    seen = set()
    for message, kind in zip(messages, kinds, strict=True):
        envelope = seal(message)
        reply = ask(node, {}, envelope)
        assert same(reply, cold(node, envelope)) and reply
        assert isinstance(open_envelope(reply), kind)
        seen |= {p.pid for p in workers(tmp_path)}
    assert len(seen) == 1, "one process for all"

    folder = tmp_path / "warm" / "worker"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o600
    lines = [(tmp_path / d / "audit.jsonl").read_text().splitlines() for d in ("warm", "warm-cold")]
    for one, two in zip(*map(lambda x: map(json.loads, x), lines), strict=True):
        for entry in (one, two):
            for key in ("time", "before"):
                entry.pop(key)
            entry.get("bytes", {}).pop("control", None)  # seconds have more or fewer digits
        assert one == two

    # A damaged message, and other rows under the same name, are seen as they would be without.
    envelope = seal(messages[2])
    damaged = replace(envelope, check="00000000")
    assert same(ask(node, {}, damaged), cold(node, damaged))
    before = ask(node, {}, envelope)
    tiny.write_csv(Path(node["data-path"]), tiny.sentences(12, 5))
    assert same(ask(node, {}, envelope), cold(node, envelope))
    assert before and not same(before, cold(node, envelope))


def test_what_the_worker_logs_is_said_where_the_message_came(
    node: Node, request_for: Any, caplog: pytest.LogCaptureFixture
) -> None:
    Path(node["data-path"]).write_text("text,label\nthe cat,no such label\n")
    with caplog.at_level(logging.WARNING, "fedpft"):
        reply = ask(node, {}, seal(request_for()))
    assert reply and isinstance(open_envelope(reply), RefusalReply)
    assert "no such label" in caplog.text and "no such label" not in reply.head


def test_off_absent_and_simulated_nodes_have_none(node: Node, tmp_path: Path) -> None:
    hello = seal(Hello())
    assert ask(node | {"worker-idle": 0}, {}, hello) is None
    assert ask(node | {"worker-idle": "x"}, {}, hello) is None
    assert ask({"partition-id": 0, "num-partitions": 2}, {}, hello) is None
    assert not (tmp_path / "warm").exists()


def test_somebody_elses_folder_is_not_used(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "worker").symlink_to(tmp_path / "elsewhere")
    assert ask(node, {}, seal(Hello())) is None
    assert not list((tmp_path / "elsewhere").iterdir()) and not workers(tmp_path)


def test_a_long_path_and_what_listens_to_no_one(tmp_path: Path) -> None:
    found = place.Place(tmp_path / ("x" * 90))
    found.make()
    with found.listen() as listener:
        link = found.connect(1.0)
        assert link is not None
        link.close()
        listener.accept()[0].close()
    assert found.socket.exists() and found.connect(1.0) is None, "left behind by a kill -9"
    found.listen().close()


def test_frames_that_are_none(tmp_path: Path) -> None:
    for data in (
        b"",
        b"\xff" * 8,
        b"\0" * 7 + b"\x02{}",
        b"\0" * 7 + b"\x02[]",
        b"\0" * 7 + b"\x09{",
    ):
        a, b = frames.socket.socketpair()
        with a, b:
            a.sendall(data)
            a.close()
            with pytest.raises(frames.BrokenLink):
                frames.receive(b)


def test_the_key_tells_codes_and_configurations_apart(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = place.key_of(node)
    assert place.key_of(dict(reversed(node.items()))) == key
    assert place.key_of(node | {"max-threads": 1}) != key
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert place.key_of(node) != key


def test_asking_needs_no_library_that_takes_seconds() -> None:
    text = "import sys, client_app.app; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.slow
def test_killed_replaced_and_told_to_end(node: Node, request_for: Any, tmp_path: Path) -> None:
    long = request_for(settings=replace(request_for().settings, steps=200_000, epochs=0))
    short = seal(request_for())

    def only() -> psutil.Process:
        until(lambda: len(workers(tmp_path)) == 1)
        return workers(tmp_path)[0]

    # Killed over a message: who asked does it without. While it works, others do without too.
    answers: list[Envelope | None] = [short]
    thread = threading.Thread(target=lambda: answers.append(ask(node, {}, seal(long))))
    thread.start()
    until(Store(tmp_path / "warm" / "store").path(long.digest).exists)
    first = only()
    assert ask(node, {}, short) is None, "busy"
    assert ask(node | {"max-threads": 1}, {}, short) is None, "busy, and of another configuration"
    first.kill()
    thread.join(60)
    assert answers[1:] == [None]
    # The next message has a new one, and the same bits.
    assert same(ask(node, {}, short), cold(node, short))
    second = only()

    # Who asked is killed over a message: the work ends at once, and is done again.
    link = asking._worker(place.Place(tmp_path / "warm"), place.key_of(node), 600, 4096)
    assert link is not None
    sealed = seal(long)
    said = {
        "node": node,
        "run": {},
        "kind": sealed.kind,
        "head": sealed.head,
        "check": sealed.check,
    }
    frames.send(link, said, sealed.parts)
    time.sleep(1.0)
    assert second.is_running()
    link.close()
    until(lambda: not workers(tmp_path), 10)
    assert same(ask(node, {}, short), cold(node, short))

    # Of another configuration: it ends and is replaced.
    third = only()
    other = node | {"max-threads": 1}
    assert same(ask(other, {}, short), cold(other, short))
    until(lambda: [p.pid for p in workers(tmp_path)] != [third.pid] and len(workers(tmp_path)) == 1)

    # The folder was wiped: nobody finds that worker, so it ends, and another one begins.
    fourth = only()
    shutil.rmtree(tmp_path / "warm")
    until(lambda: not psutil.pid_exists(fourth.pid) or fourth.status() == psutil.STATUS_ZOMBIE, 10)
    assert same(ask(node, {}, short), cold(node, short))


@pytest.mark.slow
def test_it_ends_when_it_is_not_needed(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = seal(Hello())
    assert ask(node | {"worker-memory": 1}, {}, hello)
    until(lambda: not workers(tmp_path), 10)
    assert ask(node | {"worker-idle": 1}, {}, hello)
    until(lambda: not workers(tmp_path), 10)
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    monkeypatch.setattr(os, "getppid", lambda: parent.pid)
    assert ask(node, {}, hello)
    assert len(workers(tmp_path)) == 1
    parent.kill()
    parent.wait()
    until(lambda: not workers(tmp_path), 10)
