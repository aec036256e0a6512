"""docs/plugin, the template of a package with parts of one's own: built, installed and used."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import csv, json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1] + "/tests"]
import tiny
from fedpft_console import cli
from fedpft_console.trackers import Trackers
from fedpft_core.model.families import family_of
from server_app.run.events import entry_of

assert family_of("camembert").model_type == "camembert"
folder = Path("out")
flat = tiny.write_task("roberta", folder, rows=60)
path = Path(flat["model.name"]) / "config.json"
settings = json.loads(path.read_text())
settings |= {"model_type": "camembert", "architectures": ["CamembertForSequenceClassification"]}
path.write_text(json.dumps(settings))
for split in ("train", "test"):
    rows = list(csv.DictReader(open(flat[f"data.{split}"])))
    with open(flat[f"data.{split}"], "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["text", "label"])
        lines.writerows([r["text"], len(r["text"])] for r in rows)
flat |= {"distill.steps": 3, "align.steps": 2, "align.interval": 1, "federation.rounds": 2}
flat |= {"train.local-epochs": 1, "run.gradient-rows": 0, "data.task": "absolute"}
flat |= {"plan.saliency": "first-ones", "align.selection": "largest-ones"}
flat |= {"distill.method": "means-only+sgd", "federation.aggregate": "midrange"}
events = tiny.run(flat, folder / "run")
plan = json.loads((folder / "run" / "plan.json").read_text())
assert plan["model_type"] == "camembert", plan
(task,) = [e for e in events if e["event"] == "task"]
assert task["kind"] == "text-absolute", task
with Trackers(["csv"], folder / "run", flat) as run:
    for line in events:
        entry = entry_of(line)
        run.show(entry)
lines = (folder / "run" / "figures.csv").read_text().splitlines()
assert any("Pearson" in line for line in lines) and len(lines) > 10
sys.exit(cli.main(["plugins"]))
"""


@pytest.mark.slow
def test_the_template_is_built_installed_and_used(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "plugin", tmp_path / "mine")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    for command in (
        [*pip, "wheel", *offline, "-w", "wheels", "./mine"],
        [*pip, "install", "--no-deps", "--no-index", "--find-links", "wheels", "--target", "site",
         "my-fedpft-parts"],
    ):  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT)], cwd=tmp_path, capture_output=True, text=True,
        timeout=500, env=os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    out = " ".join(done.stdout.split())
    assert out.count("my-fedpft-parts 1.0") == 7, done.stdout


def test_every_group_has_its_part_in_the_template() -> None:
    import tomllib

    from fedpft_console.trackers import GROUP
    from fedpft_core.registry import GROUPS

    project = tomllib.loads((ROOT / "docs" / "plugin" / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]
    assert points.keys() == {*GROUPS.values(), GROUP}
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    names = {"fedpft.families": "FAMILY", "fedpft.tasks": "TASK", GROUP: "start"}
    for group, parts in points.items():
        assert f"`{group}`" in page
        for module in parts.values():
            path = ROOT / "docs" / "plugin" / f"{module.replace('.', '/')}.py"
            found = runpy.run_path(str(path))
            assert group not in names or names[group] in found
