"""Makes the tables of docs/code.md from the first lines of the modules' docstrings.

`python .ci/code_page.py --write` writes them; without it, exit status 1 says that they are stale.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "code.md"
_TABLE = re.compile(r"(<!-- made from (\S+) -->\n).*?(<!-- end -->)", re.S)


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|")


def rows(folder: Path) -> list[tuple[str, str]]:
    """(path from the root, what it is) of the modules and packages directly in a package."""
    out = []
    for path in sorted(folder.iterdir()):
        name = path.relative_to(ROOT).as_posix()
        if (path / "__init__.py").is_file():
            out.append((f"{name}/", first_line(path / "__init__.py")))
        elif path.suffix == ".py" and path.name != "__init__.py":
            out.append((name, first_line(path)))
    return out


def made(page: str) -> str:
    """The page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        lines = [f"| `{name}` | {text} |" for name, text in rows(ROOT / match[2])]
        return "\n".join([f"{match[1]}", "| | |", "|---|---|", *lines, "", match[3]])

    return _TABLE.sub(table, page)


def main() -> int:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    old = PAGE.read_text(encoding="utf-8")
    new = made(old)
    if write:
        PAGE.write_text(new, encoding="utf-8")
    elif old != new:
        print(f"{PAGE.relative_to(ROOT)} is stale: python .ci/code_page.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
