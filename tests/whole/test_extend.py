"""docs/extend.md, tried as written: its files put into a copy of the source, and used."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [".", "tests"]
import tiny
import fedpft_core
from fedpft_core import config

assert Path(fedpft_core.__file__).parents[1] == Path.cwd(), "the copy is not what runs"
folder = Path("out")
flat = tiny.write_task("bert", folder, rows=60)
flat |= {"distill.steps": 3, "align.steps": 2, "align.interval": 1, "federation.rounds": 2}
flat |= {"train.local-epochs": 1, "run.gradient-rows": 0}
for text in sys.argv[1:]:
    flat |= config.parse_overrides(text)
events = tiny.run(flat, folder / "run")
(distilled,) = [e for e in events if e["event"] == "distilled"]
assert sum(distilled["output_error"].values()) < sum(distilled["error_before"].values())
(alignment,) = [e for e in events if e["event"] == "alignment"]
assert alignment["neurons"] == 12
assert "fedpft_core.aggregation.trimmed" in sys.modules
print("ran")
"""


def _hold_against_the_rules(root: Path, paths: list[str]) -> None:
    """Style and docstrings of the page's files, in a copy of the source; ruff where it is."""
    checks = [["tests/whole/test_docstrings.py"]]
    if importlib.util.find_spec("ruff"):
        checks += [["-m", "ruff", "check", *paths], ["-m", "ruff", "format", "--check", *paths]]
    for check in checks:
        done = subprocess.run(
            [sys.executable, *check], cwd=root, capture_output=True, text=True, timeout=60
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0 and not any(path in said for path in paths), said


def test_the_page_names_every_file_that_runs_over_the_families() -> None:
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    family = page.split("\n## A family", 1)[1].split("\n## ", 1)[0]
    (command,) = re.findall(r"```\npytest (.*?)```", family, re.S)
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if f != Path(__file__)]
    found = {
        f.relative_to(ROOT).as_posix()
        for f in files
        if re.search(r"tiny\.(FAMILIES|BUILDS)", f.read_text("utf-8"))
    }
    assert set(command.replace("\\", "").split()) == found


def test_the_page_works_as_written(tmp_path: Path) -> None:
    for name in ("fedpft_core", "server_app", "client_app", "fedpft_console", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "docs").mkdir()
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    files = re.findall(
        r"^## [^\n]*`(fedpft_core/[\w/]+\.py)`\n.*?```python\n(.*?)```", page, re.M | re.S
    )
    assert len(files) == 4
    for path, code in files:
        assert not (tmp_path / path).exists()
        (tmp_path / path).write_text(code, encoding="utf-8")
    _hold_against_the_rules(tmp_path, [path for path, _ in files])
    keys = re.findall(r'fedpft run -c "([^"]+)"', page)
    assert len(keys) == 4
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *keys],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.strip().endswith("ran"), done.stderr[-3000:]
    wrote = subprocess.run(
        [sys.executable, "-m", "fedpft_console.cli", "config", "--write"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert wrote.returncode == 0, wrote.stderr[-3000:]
    listed = (tmp_path / "docs" / "config.md").read_text(encoding="utf-8")
    for name in ("out-norm", "largest", "bias-only", "trimmed"):
        assert f"`{name}` (" in listed
