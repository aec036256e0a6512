"""The command itself: cheap to start, quiet when its reader goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_importing_the_command_is_cheap() -> None:
    code = (
        "import sys, fedpft_console.cli; "
        "heavy = {'torch', 'transformers', 'flwr', 'ray', 'numpy', 'matplotlib', 'yaml', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m fedpft_console.cli config | head -1", shell=True, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
