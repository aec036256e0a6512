"""One command and one server hold a run folder."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedpft_core.disk import lock
from fedpft_core.errors import UserError


@pytest.mark.parametrize("who", ["command", "server"])
def test_the_second_of_a_kind_is_refused(tmp_path: Path, who: str) -> None:
    with (
        lock.run_folder(tmp_path, who, "first"),  # type: ignore[arg-type]
        pytest.raises(UserError, match="second"),
        lock.run_folder(tmp_path, who, "second"),  # type: ignore[arg-type]
    ):
        pass
    with lock.run_folder(tmp_path, who, "third"):  # type: ignore[arg-type]
        pass  # free again


def test_a_server_may_begin_where_its_command_holds_the_folder(tmp_path: Path) -> None:
    with (
        lock.run_folder(tmp_path, "command", "command"),
        lock.run_folder(tmp_path, "server", "server"),
    ):
        pass


def test_a_command_finds_out_a_server_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
    with (
        lock.run_folder(tmp_path, "server", "server"),
        pytest.raises(UserError, match="command"),
        lock.run_folder(tmp_path, "command", "command"),
    ):
        pass
    with lock.run_folder(tmp_path, "command", "command"):
        pass


def test_a_command_waits_for_a_server_that_is_ending(tmp_path: Path) -> None:
    server = lock.run_folder(tmp_path, "server", "server")
    server.__enter__()
    timer = threading.Timer(0.3, lambda: server.__exit__(None, None, None))
    timer.start()
    with lock.run_folder(tmp_path, "command", "command"):
        assert timer.finished.is_set()
    timer.join()
