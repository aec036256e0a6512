"""`fedpft watch`: what is no run folder is refused, and not watched for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpft_console.cli import main


def test_what_is_no_run_folder_is_refused(elsewhere: Path, capsys: Any) -> None:
    (elsewhere / "empty").mkdir()
    assert main(["watch", "empty"]) == 2
    assert "neither config.yaml nor events.jsonl" in capsys.readouterr().err
    assert main(["watch", "nowhere"]) == 2
    assert "no such run folder" in capsys.readouterr().err
