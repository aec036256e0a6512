"""Every public function says what it takes, what it gives and what it refuses.

ruff checks the style of docstrings and that a section, where there is one, is complete. It lets a
one-line docstring pass whatever the function takes, so that part is checked here:
`python tests/whole/test_docstrings.py [FOLDER]` lists what is missing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedpft_core", "server_app", "client_app", "fedpft_console")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def trees(under: str = "") -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if str(path.relative_to(ROOT)).startswith(under):
                yield path.relative_to(ROOT), ast.parse(path.read_text())


def methods_by_class() -> dict[str, set[str]]:
    """The documented methods of each class, by which an overriding method is exempt."""
    found: dict[str, set[str]] = {}
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(
                    f.name
                    for f in node.body
                    if isinstance(f, Function) and "\n" in (ast.get_docstring(f) or "")
                )
    return found


def marked(function: Function, *words: str) -> bool:
    """Whether a decorator holds one of the words (`property`, a command of the console)."""
    return any(word in ast.dump(d) for d in function.decorator_list for word in words)


def missing(function: Function, method: bool) -> list[str]:
    """The sections that the function's docstring lacks."""
    text = ast.get_docstring(function) or ""
    if not text:
        return ["docstring"]
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    names += [a.arg for a in function.args.kwonlyargs]
    if method and not marked(function, "staticmethod"):
        names = names[1:]
    gone = []
    if names and "Args:" not in text:
        gone.append("Args")
    elif names:
        section = text.split("Args:", 1)[1]
        gone += [f"Args.{name}" for name in names if f"{name}:" not in section]
    returns = function.returns
    nothing = (
        returns is None
        or (isinstance(returns, ast.Constant) and returns.value is None)
        or (isinstance(returns, ast.Name) and returns.id == "NoReturn")
    )
    if not nothing and "Returns:" not in text and "Yields:" not in text:
        gone.append("Returns")
    raised = [n for n in ast.walk(function) if isinstance(n, ast.Raise) and n.exc is not None]
    if raised and "Raises:" not in text:
        gone.append("Raises")
    return gone


def lacks(under: str = "") -> tuple[list[str], int]:
    """What is missing under a folder, a line each, and how many functions and classes there are."""
    known = methods_by_class()
    lines: list[str] = []
    count = 0

    def visit(path: Path, body: list[ast.stmt], bases: list[str], method: bool) -> None:
        nonlocal count
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                count += 1
                if not ast.get_docstring(node):
                    lines.append(f"{path}:{node.lineno} {node.name}: docstring")
                names = [b.id for b in node.bases if isinstance(b, ast.Name)]
                visit(path, node.body, names, True)
            elif isinstance(node, Function) and not node.name.startswith("_"):
                if marked(node, "property", "overload", "'command'", "'group'"):
                    continue
                if any(node.name in known.get(base, ()) for base in bases):
                    continue
                count += 1
                if gone := missing(node, method):
                    lines.append(f"{path}:{node.lineno} {node.name}: {', '.join(gone)}")

    for path, tree in trees(under):
        visit(path, tree.body, [], False)
    return lines, count


def test_public_functions_say_what_they_take_give_and_refuse() -> None:
    lines, count = lacks()
    assert count > 700
    assert not lines, "\n".join(lines)


def test_the_check_finds_what_is_missing() -> None:
    source = (
        'def f(a, b) -> int:\n    """Adds.\n\n    Args:\n        a: One.\n    """\n    raise E()\n'
    )
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert missing(function, False) == ["Args.b", "Returns", "Raises"]


if __name__ == "__main__":
    found, total = lacks(sys.argv[1] if len(sys.argv) > 1 else "")
    print("\n".join(found))
    print(f"{len(found)} of {total}")
