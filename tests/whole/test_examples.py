"""The examples: their files can be used, and the notebook runs from its first cell to its last."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedpft_console.commands import preflight, settings
from fedpft_core import config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*/*.yaml")), ids=str)
def test_what_the_examples_name_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flat = settings.absolute_files(config.read_file(file))
    preflight.check(config.from_flat(flat))


def cells() -> list[str]:
    notebook = json.loads((ROOT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads((ROOT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))
    assert all(not c.get("outputs") for c in notebook["cells"])
    assert cells()[0].strip() == "!pip install -q ..", "the test below leaves it out"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    code = ["import os"]
    for cell in cells()[1:]:
        if cell.startswith("!"):
            code.append(f"assert os.system({cell[1:].strip()!r}) == 0")
        else:
            code.append(cell)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path / "examples", check=False,
        capture_output=True, text=True, timeout=900,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == "delivery"
    assert (tmp_path / "examples" / "run" / "scores.png").stat().st_size > 0
