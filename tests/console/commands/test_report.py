"""`fedpft report`."""

from __future__ import annotations

from pathlib import Path

import pytest
from terminal import refused

from fedpft_console import cli


def test_report_is_made_again(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "old"]) == 0
    assert "Run finished" in (old_run / "report.md").read_text()
    assert str(old_run / "report.md") in capsys.readouterr().out


def test_report_refuses_what_is_no_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run folder" in refused(capsys, "report", ".")
