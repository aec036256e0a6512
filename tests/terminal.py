"""Run a command as a user does: its refusals, and a pretended Flower."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpft_console import cli, launch


def fake_flower(
    monkeypatch: pytest.MonkeyPatch,
    *,
    events: tuple[dict[str, Any], ...] = ({"event": "run_finished", "seconds": 1.0},),
    status: str = launch.COMPLETED,
    log: str = "",
    error: BaseException | None = None,
) -> list[dict[str, Any]]:
    """Put a pretended simulation in the place of Flower; returns the run configs it was given."""
    calls: list[dict[str, Any]] = []

    def run(run_dir: Path, flat: dict[str, Any], *, tick: Callable[[], None], **rest: Any) -> Any:
        calls.append({**flat, "federation options": rest.get("federation")})
        folder = run_dir / "flower"
        folder.mkdir(exist_ok=True)
        (folder / "run.log").write_text(log)
        with open(run_dir / "events.jsonl", "a") as file:
            for event in events:
                file.write(json.dumps({"t": time.time()} | event) + "\n")
        tick()
        if error is not None:
            raise error
        return launch.Result(status, "", "17", folder / "run.log")

    monkeypatch.setattr(launch, "run_simulation", run)
    return calls


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which bad input is refused."""
    assert cli.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") == 1, err
    assert err.startswith("fedpft: error: ")
    return err.removeprefix("fedpft: error: ").strip()
