"""The folder of a run: made, checked and held."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import pytest
from terminal import refused

from fedpft_console.commands.folder import locked
from fedpft_core.errors import UserError


def test_an_unwritable_folder_is_refused(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "file").touch()
    said = refused(capsys, "run", "--run-dir", "file/below")
    assert said == f"cannot write to the run folder {elsewhere / 'file/below'}: Not a directory."


def test_a_folder_that_holds_something_is_refused_and_kept(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "old").mkdir()
    (elsewhere / "old" / "thesis.txt").write_text("precious")
    assert "is not empty; name a new one" in refused(capsys, "run", "--run-dir", "old")
    (elsewhere / "old" / "config.yaml").touch()
    assert "--resume continues it" in refused(capsys, "run", "--run-dir", "old")
    assert (elsewhere / "old" / "thesis.txt").read_text() == "precious"


def test_a_disk_without_room_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = types.SimpleNamespace(total=10**9, used=10**9 - 5_000_000, free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has 5 MB of room; a run needs at least 200 MB." in refused(capsys, "run")


def test_contradicting_folders_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "contradicts run.dir" in refused(capsys, "run", "--run-dir", "a", "-c", "run.dir=b")
    assert "exclude each other" in refused(capsys, "run", "--run-dir", "a", "--resume", "b")


def test_a_folder_in_use_is_refused(elsewhere: Path) -> None:
    with (
        locked(elsewhere),
        pytest.raises(UserError, match="in use by another run"),
        locked(elsewhere),
    ):
        pass
    with locked(elsewhere):
        pass  # free again
