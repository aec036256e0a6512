"""The node's own record: who asked what, what left, and damage that shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from client_app import audit
from client_app.node import client_for
from client_app.process import ProcessCache
from fedpft_core.errors import UserError
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.messages import Hello, RefusalReply, TrainReply


def edge(tmp_path: Path, **more: Any) -> Any:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(12))
    node = {"name": "n", "data-path": str(tmp_path / "rows.csv"), "cache-dir": str(tmp_path / "c")}
    made = client_for(node | more, {})
    made.cache = ProcessCache()
    return made


def test_every_message_is_noted_with_what_left(tmp_path: Path, request_for: Any) -> None:
    node = edge(tmp_path, **{"policy-max-steps": 10})
    request = request_for()
    for message in (Hello(), request):
        node.handle(seal(message))
    strict = edge(tmp_path, **{"policy-max-steps": 1})
    answer = open_envelope(strict.handle(seal(request)))
    assert isinstance(answer, RefusalReply)
    path = tmp_path / "c" / "audit.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["n"], e["asked"], e["answered"]) for e in lines] == [
        (0, "Hello", "HelloReply"), (1, "TrainRequest", "TrainReply"),
        (2, "TrainRequest", "RefusalReply"),
    ]  # fmt: skip
    work = lines[1]
    assert (work["digest"], work["run"], work["round"]) == (request.digest, request.run, 1)
    assert work["settings"]["steps"] == 3 and work["bytes"]["adapter"] > 0 and work["rows"] == 12
    assert lines[2]["reason"] == answer.reason
    assert lines[1]["policy"] == node.policy.digest() != strict.policy.digest()
    assert path.stat().st_mode & 0o077 == 0
    assert audit.verify(path)[0] == 3
    text = path.read_text()
    assert not any(row in text for row, _ in tiny.sentences(12)) and str(tmp_path) not in text


@pytest.mark.parametrize("how", ["changed", "taken out", "put in", "moved"])
def test_a_line_that_is_not_as_it_was_shows(tmp_path: Path, how: str) -> None:
    path = tmp_path / "audit.jsonl"
    for i in range(5):
        audit.append(path, {"asked": f"{i}"})
    lines = path.read_text().splitlines(keepends=True)
    if how == "changed":
        lines[2] = lines[2].replace('"2"', '"9"')
    elif how == "taken out":
        del lines[2]
    elif how == "put in":
        lines.insert(2, lines[2])
    else:
        lines[2], lines[3] = lines[3], lines[2]
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=r"line \d"):
        audit.verify(path)


def test_what_cannot_be_noted_does_not_happen(
    tmp_path: Path, request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    node = edge(tmp_path)
    monkeypatch.setattr(audit, "append", full)
    answer = open_envelope(node.handle(seal(request_for())))
    assert isinstance(answer, RefusalReply) and "audit log" in answer.reason


def test_encoded_rows_lie_on_the_disk_only_where_asked_for(
    tmp_path: Path, request_for: Any
) -> None:
    """They are readable text to whoever has the tokenizer, which lies beside them."""
    node = edge(tmp_path, **{"keep-rows": 1})
    assert isinstance(open_envelope(node.handle(seal(request_for()))), TrainReply)
    assert list((tmp_path / "c" / "rows").glob("*.safetensors"))
    node = edge(tmp_path)  # and they go when they are not wanted any more
    assert isinstance(open_envelope(node.handle(seal(request_for()))), TrainReply)
    assert not (tmp_path / "c" / "rows").exists()
