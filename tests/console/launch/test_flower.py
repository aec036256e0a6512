"""What Flower's commands say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedpft_console.launch import flower as commands
from fedpft_console.launch import last_error
from fedpft_core.errors import RunError


def test_last_error_finds_the_telling_line() -> None:
    log = "INFO : fine\nTraceback (most recent call last):\nValueError: bad thing\nINFO : bye\n"
    assert last_error(log) == "ValueError: bad thing"
    assert last_error("ERROR :   it broke\nmore") == "it broke"
    assert last_error("only this\n\n") == "only this"
    assert last_error("") == ""
    box = "Using x\n╭─ Error ────╮\n│ No such      │\n│ connection.  │\n╰──────────────╯\n"
    assert last_error(box) == "No such connection."


def test_a_missing_program_is_one_sentence(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="flower-superlink is not installed"):
        commands.program("flower-superlink")


def test_status_survives_an_answer_that_is_no_json(monkeypatch, tmp_path: Path) -> None:
    flower = commands.Flower("x", {}, tmp_path / "log")
    monkeypatch.setattr(flower, "_ask", lambda *a: "connection refused")
    assert flower.status("1") == ("", "")
    answer = {"runs": [{"status": "finished:failed", "status-details": "N/A"}]}
    monkeypatch.setattr(flower, "_ask", lambda *a: json.dumps(answer))
    assert flower.status("1") == ("finished:failed", "")
