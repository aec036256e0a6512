"""A run on a SuperLink that is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpft_console.launch import deployed


def test_a_superlink_that_stays_silent_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The log stream broke off; the first answers are good, then there are none."""
    answers = [("running", ""), ("", ""), ("running", "")]
    monkeypatch.setattr(deployed.Flower, "submit", lambda *args: None)
    monkeypatch.setattr(deployed.Flower, "run_id", lambda self: "7")
    monkeypatch.setattr(deployed.Flower, "streaming", lambda self: False)
    monkeypatch.setattr(
        deployed.Flower, "status", lambda *args: answers.pop(0) if answers else ("", "")
    )
    monkeypatch.setattr(deployed.Flower, "stop", lambda *args: pytest.fail("it cannot be asked"))
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        assert now < 1000, "it waits for ever"

    monkeypatch.setattr(deployed.time, "sleep", sleep)
    monkeypatch.setattr(deployed.time, "monotonic", lambda: now)
    with pytest.raises(deployed.RunError, match=r"lab has not answered for 120 s.* run 7 "):
        deployed.run_deployed("lab", {}, tmp_path, app=tmp_path)
    assert not answers and 140 < now < 170
