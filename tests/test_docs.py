"""What the documentation says of the code is true of the code."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedpft_core", "server_app", "client_app")


def test_readme_names_every_file() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            if path.name != "__init__.py":
                assert path.name in text, f"README.md does not mention {path.relative_to(ROOT)}"


def map_rows() -> list[tuple[str, str]]:
    """(functions, tests) cells of the paper map's table."""
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [(r[-2], r[-1]) for r in rows if len(r) == 4 and "`" in r[-2]]


def test_paper_map_is_not_empty() -> None:
    assert len(map_rows()) >= 15


@pytest.mark.parametrize("functions", [f for f, _ in map_rows()])
def test_paper_map_functions_exist(functions: str) -> None:
    for name in re.findall(r"`([\w.]+)", functions):
        if name == "plan.proxy":
            continue
        module, _, rest = name.partition(".")
        where = {"strategy": "server_app", "local": "server_app", "Bench": "server_app.bench"}.get(
            module, "fedpft_core"
        )
        if module == "Bench":
            target = importlib.import_module(where)
            rest = name
        else:
            target = importlib.import_module(f"{where}.{module}")
        for part in rest.split("."):
            if not hasattr(target, part):
                importlib.import_module(f"{target.__name__}.{part}")
            target = getattr(target, part)


@pytest.mark.parametrize("tests", [t for _, t in map_rows()])
def test_paper_map_tests_exist(tests: str) -> None:
    files = re.findall(r"`(test_\w+\.py)`", tests)
    assert files
    for name in files:
        assert (ROOT / "tests" / name).is_file(), name


def test_links_between_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_no_data_weights_or_pickles_are_committed() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    bad = [f for f in files if re.search(r"\.(safetensors|pkl|pt|bin|parquet|npy|npz)$", f)]
    assert not bad
