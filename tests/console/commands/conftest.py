"""Every command is tried in an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedpft_console import launch
from fedpft_console.commands.folder import save_config
from fedpft_core import config


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that the default run folder lands there."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # A bad setting that slips through must not start a real run.
    monkeypatch.setattr(launch, "run_simulation", lambda *a, **k: pytest.fail("a run was started"))
    return folder


@pytest.fixture
def old_run(elsewhere: Path) -> Path:
    """A run folder as an earlier command left it."""
    folder = elsewhere / "old"
    folder.mkdir()
    given = {"lora.rank": 4, "run.stop-after": 2, "run.dir": str(folder)}
    save_config(folder, config.to_flat(config.from_flat(given)))
    old = [{"t": 1.0, "event": "run_started", "rounds": 6}, {"t": 2.0, "event": "run_finished"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in old))
    return folder
