"""What the documentation says of the code is true of the code."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


def cells_of(table: str) -> list[list[str]]:
    """Markdown table rows as stripped cells, head and rule left out."""
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[c.strip() for c in row.strip("|").split(" | ")] for row in rows[2:]]


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def results() -> str:
    return (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def made() -> dict[str, str]:
    """The tables that `fedpft compare --check` holds against the cells, by experiment."""
    return {p.parent.name: p.read_text("utf-8") for p in (ROOT / "experiments").glob("*/table.md")}


def test_every_spread_quoted_was_measured() -> None:
    quoted = set(re.findall(r"[-+]?\d+\.\d ± \d+\.\d", results()))
    assert len(quoted) > 20
    tables = "\n".join(made().values())
    assert not {q for q in quoted if q not in tables}


@pytest.mark.parametrize(("title", "name"), [("Main table", "main"), ("Longer", "longer")])
def test_quoted_tables_say_what_the_cells_say(title: str, name: str) -> None:
    """Each line of a table by data set, with the head as trained in brackets."""
    by_method: dict[str, list[str]] = {}
    for method, head, *accuracies in cells_of(section(made()[name], "Methods by data set")):
        method = method.removesuffix(" on the FM").lower()
        if head:
            pairs = zip(by_method[method], accuracies, strict=True)
            # The brackets have the mean alone.
            accuracies = [f"{a} ({b.split(' ± ')[0]})" if b else a for a, b in pairs]
        by_method[method] = accuracies
    found = {
        row[0].replace("_", "-").lower(): row[1:]
        for row in cells_of(section(results(), title))
        if len(row) > 6
    }
    assert len(found) >= 3
    for method, accuracies in found.items():
        assert accuracies == by_method[method], method
