"""Refusals of a node with rows of its own: nothing from a cell and no path leaves it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import query, train
from client_app.client import Client
from client_app.disclosure import reason
from client_app.node import client_for
from client_app.process import ProcessCache
from client_app.store import Store
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.wire import flower as wire
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import Hello, HelloReply, RefusalReply, TrainReply
from fedpft_core.wire.messages import Message as Any_

SECRET = "HIV-positive: Mrs Miller"


def files(folder: Path) -> dict[str, Path]:
    """Data files, each of which cannot be used, and whose fault quotes a cell or a path."""
    made = {
        "label.csv": f'text,label\na cat,"{SECRET}"\na dog,{tiny.LABELS[0]}\n',
        "column.csv": f"text,{SECRET}\na,b\n",
        "cells.csv": f"text,label\n{SECRET}\n",
        "json.jsonl": '{"text": "' + SECRET + '", "label": \n',
        "empty.csv": f'text,label\n,"{SECRET}"\n',
        "type.jsonl": json.dumps({"text": {"of": SECRET}, "label": "a"}) + "\n",
    }
    for name, text in made.items():
        (folder / name).write_text(text)
    (folder / "latin.csv").write_bytes(b"text,label\n" + SECRET.encode() + b"\xff,a\n")
    return {n: folder / n for n in (*made, "latin.csv", "missing.csv")}


def said(client: Client, *messages: Any_) -> str:
    answers = [open_envelope(client.handle(seal(m))) for m in messages]
    refusals = [a.reason for a in answers if isinstance(a, RefusalReply)]
    return "\n".join(refusals)


@pytest.mark.parametrize("which", [
    "label.csv", "column.csv", "cells.csv", "json.jsonl", "empty.csv", "type.jsonl", "latin.csv",
    "missing.csv",
])  # fmt: skip
def test_no_cell_and_no_path_leaves_a_node(
    tmp_path: Path, request_for: Any, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "clinic-of-dr-who"
    folder.mkdir()
    path = files(folder)[which]
    node = {"name": "n", "data-path": str(path), "cache-dir": str(tmp_path / "cache")}
    client = client_for(node, {})
    client.cache = ProcessCache()
    with caplog.at_level(logging.WARNING, "fedpft"):
        text = said(client, Hello(), request_for())
    assert text, "the file should not be usable"
    for secret in ("HIV", "Miller", "clinic", which, str(tmp_path)):
        assert secret not in text, text
    assert str(path) in caplog.text  # the owner is told


def test_how_many_rows_a_node_left_out_stays_there(
    tmp_path: Path, request_for: Any, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    good = [(text, label) for text, label in tiny.sentences(60)]
    path = tiny.write_csv(tmp_path / "rows.csv", [*good[:30], (" ", SECRET), *good[30:]])
    node = {"name": "n", "data-path": str(path), "cache-dir": str(tmp_path / "cache")}
    client = client_for(node | {"max-bad-rows": 0.05}, {})
    hello = open_envelope(client.handle(seal(Hello())))
    assert isinstance(hello, HelloReply) and hello.examples == 60
    client.cache = ProcessCache()
    with caplog.at_level(logging.WARNING, "fedpft"):
        reply = open_envelope(client.handle(seal(request_for())))
    assert isinstance(reply, TrainReply) and reply.examples == 60
    assert "1 of 61 rows cannot be used and is left out (1 without text)" in caplog.text
    assert SECRET not in caplog.text
    # Above the limit its owner set, the server is told the numbers and the key.
    strict = client_for(node, {})
    strict.cache = ProcessCache()
    text = said(strict, Hello())
    assert "1 of 61 rows cannot be used" in text and "max-bad-rows" in text
    assert "rows.csv" not in text and SECRET not in text


def test_the_labels_of_a_node_cannot_be_read_out_by_requests(
    tmp_path: Path, request_for: Any,
) -> None:  # fmt: skip
    path = tmp_path / "rows.csv"
    names = ["oncology", "psychiatry", "HIV"]
    tiny.write_csv(path, [("the cat", names[i % 3]) for i in range(9)])
    client = client_for(
        {"name": "n", "data-path": str(path), "cache-dir": str(tmp_path / "cache")}, {}
    )
    client.cache = ProcessCache()
    text = said(client, *(request_for(round=r) for r in (1, 2, 3)))
    assert text.count("none of the run's") == 3
    assert not any(name in text for name in names)


def test_a_fault_nobody_foresaw_says_its_kind_alone(
    tmp_path: Path, request_for: Any, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    def broken(task: Any) -> Any:
        raise RuntimeError(f"cannot tokenise {SECRET!r} of /srv/rows.csv")

    client = Client("n", lambda: (3, 0), broken, Store(tmp_path), cache=ProcessCache())
    with caplog.at_level(logging.WARNING, "fedpft"):
        assert said(client, request_for()).startswith("internal error (RuntimeError)")
    assert SECRET in caplog.text
    client.own_rows = False  # a simulation's rows are the run's, and Flower shows the traceback
    with pytest.raises(RuntimeError):
        client.handle(seal(request_for()))


@pytest.mark.parametrize("path", [
    "/srv/clinic/rows.csv", "~/rows.csv", "../rows.csv", "C:\\clinic\\rows.csv", "\\\\host\\share",
])  # fmt: skip
def test_paths_are_cut_out_of_what_is_said_of_a_message(path: str) -> None:
    text = reason(ReplyError(f"the package is malformed (no module at {path}: gone)"), "n")
    assert text == "the package is malformed (no module at …: gone)"
    assert path not in reason(OSError(28, "No space left on device", path), "n")
    assert "No space left" in reason(OSError(28, "No space left on device", path), "n")
    assert reason(UserError(f"{path}: row 3"), "n").startswith("this node's settings or data")
    assert len(reason(UserError("x", public="y" * 5000), "n")) == 1000


def test_ratios_and_formats_are_no_paths() -> None:
    text = "the adapter moved by 3/4 of alpha/rank, fp16/bf16"
    assert reason(ReplyError(text), "n") == text


def test_a_wrong_node_config_is_not_sent_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 2**62, raising=False)
    context = SimpleNamespace(
        node_config={
            "name": "n", "data-path": str(tmp_path / "a.csv"), "secret-key": SECRET,
            "worker-idle": 0,
        },
        run_config={},
    )  # fmt: skip
    message = Message(wire.to_record(seal(Hello())), dst_node_id=1, message_type="query")
    for ask in (query, train):
        back = ask(message, context)  # type: ignore[arg-type]
        assert isinstance(back.content, RecordDict)
        answer = open_envelope(wire.from_record(back.content))
        assert isinstance(answer, RefusalReply)
        assert "secret" not in answer.reason and str(tmp_path) not in answer.reason
