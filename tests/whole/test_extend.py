"""docs/extend.md, tried as written: its files put into a copy of the source, and used."""

from __future__ import annotations

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
print("ran")
"""


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
    assert len(files) == 3
    for path, code in files:
        assert not (tmp_path / path).exists()
        (tmp_path / path).write_text(code, encoding="utf-8")
    keys = re.findall(r'fedpft run -c "([^"]+)"', page)
    assert len(keys) == 3
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
    for name in ("out-norm", "largest", "bias-only"):
        assert f"`{name}` (" in listed
