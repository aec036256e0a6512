"""What the documentation says of the code is true of the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedpft_core.model.families import FAMILIES

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedpft_core", "server_app", "client_app", "fedpft_console")


def script(name: str) -> ModuleType:
    """A script of .ci as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


def test_the_code_page_describes_every_room() -> None:
    """Every file and folder directly in a package, in the words of its own docstring."""
    page, code_page = (ROOT / "docs" / "code.md").read_text("utf-8"), script("code_page")
    for package in PACKAGES:
        rooms = code_page.rows(ROOT / package)
        assert rooms
        for name, text in rooms:
            assert text, f"{name} has no docstring"
            assert f"| `{name}` | {text} |" in page, "run python .ci/code_page.py --write"
    assert code_page.made(page) == page  # nothing is described that is gone


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: str(p.name))
def test_code_is_fenced_as_the_site_reads_it(page: Path) -> None:
    """One word says the language; with a second the site takes the rest of the page for code."""
    fences = re.findall(r"^ *```(.*)$", page.read_text("utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert [f for f in fences if not re.fullmatch(r"\w*", f.strip())] == []


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        if path.name not in ("index.md",):
            assert f"(docs/{path.name})" in text, f"README.md does not link to {path.name}"


@pytest.mark.parametrize("page", ["own_data.md", "library.md"])
def test_lists_of_families_are_whole(page: str) -> None:
    """Every family of the table, however its name is spelt."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    words = {re.sub(r"[^a-z0-9]", "", word) for word in text.lower().split()}
    names = {row.model_type for row in FAMILIES.values()}
    missing = [name for name in names if re.sub(r"[^a-z0-9]", "", name) not in words]
    assert not missing, f"docs/{page} does not name {', '.join(missing)}"


def test_the_page_of_families_is_whole() -> None:
    """Every family with every invariant shown, each by tests that are there for every family."""
    made = script("families_page")
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == made.whole(), (
        "run python .ci/families_page.py --write"
    )
    for tests in made.INVARIANTS.values():
        for test in tests:
            path, name = test.split("::")
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            (found,) = (n for n in tree.body if getattr(n, "name", None) == name)
            assert isinstance(found, ast.FunctionDef)
            over = " ".join(ast.unparse(d) for d in found.decorator_list)
            assert "families" in over or "FAMILIES" in over, f"{test} runs over no families"


def test_a_page_with_a_family_or_an_invariant_less_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = script("families_page")
    whole = made.whole()
    assert made.page(lambda _, family: family != "gpt2") != whole
    monkeypatch.delitem(FAMILIES, "gpt2")
    assert made.whole() != whole


def test_the_readmes_first_screen_has_the_ten_words() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    words = ["FM", "proxy", "adapter", "head", "plan", "package", "patch", "alignment", "round"]
    for word in [*words, "plug-in"]:
        assert any(line.startswith(f"| **{word}**") for line in lines[:30]), word


def map_rows() -> list[tuple[str, str]]:
    """(functions, tests) cells of the paper map's table."""
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [(r[-2], r[-1]) for r in rows if len(r) == 4 and "`" in r[-2]]


def test_paper_map_is_not_empty() -> None:
    assert len(map_rows()) >= 15


def find(name: str) -> object:
    """What a full dotted name stands for. Raises ImportError or AttributeError."""
    module, *rest = name.split(".")
    target: Any = importlib.import_module(module)
    for part in rest:
        # A module first: the name of a function may be that of its file.
        try:
            target = importlib.import_module(f"{target.__name__}.{part}")
        except (ModuleNotFoundError, AttributeError):
            target = getattr(target, part)
    return target


@pytest.mark.parametrize("functions", [f for f, _ in map_rows()])
def test_paper_map_functions_exist(functions: str) -> None:
    names = [n for n in re.findall(r"`([\w.]+)", functions) if n != "plan.proxy"]
    for name in names:
        assert name.partition(".")[0] in PACKAGES, f"{name} is no full name"
        assert callable(find(name)), name


def test_a_name_that_is_gone_is_found_out() -> None:
    for name in ("fedpft_core.align.nothing", "fedpft_core.sub_fm.build", "fedpft_core.Plan.no"):
        with pytest.raises((ImportError, AttributeError)):
            find(name)


@pytest.mark.parametrize("tests", [t for _, t in map_rows()])
def test_paper_map_tests_exist(tests: str) -> None:
    files = re.findall(r"`([\w/]*test_\w+\.py)`", tests)
    assert files
    for name in files:
        assert (ROOT / "tests" / name).is_file(), name


def test_links_between_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_a_site_with_a_bad_link_is_found_out(tmp_path: Path) -> None:
    """`.ci/links.py` sees what it is there for."""
    links = script("links")
    good = '<h1 id="top">x</h1><a href="b/c.html#there">c</a><img src="p.png"><a href="#top">t</a>'
    (tmp_path / "b").mkdir()
    (tmp_path / "p.png").touch()
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b" / "c.html").write_text('<p id="there"><a href="https://x.org">x</a></p>')
    assert links.problems(tmp_path) == []
    for bad, why in (
        ('<a href="gone.html">', "leads nowhere"),
        ('<a href="../outside.html">', "leads nowhere"),
        ('<a href="b/c.html#not">', "no anchor"),
        ('<a href="#not">', "no anchor"),
        ('<img src="gone.png">', "leads nowhere"),
        ('<script src="https://cdn.org/x.js"></script>', "fetches https"),
        ('<link rel="stylesheet" href="//cdn.org/x.css">', "fetches //"),
        ('<a href="/a.html">', "is absolute"),
    ):
        (tmp_path / "a.html").write_text(good + bad)
        (found,) = links.problems(tmp_path)
        assert why in found
    assert links.problems(tmp_path / "b" / "nothing")


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
