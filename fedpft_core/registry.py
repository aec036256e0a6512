"""Choices of a key that are found by looking into a folder: each file there is one choice.

`saliency/weight_norm.py` is the choice `weight-norm`. The first line of its docstring says what it
does, in the list of keys too. Nothing is imported until a choice is used.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parent
_ROOMS = {
    "saliency": "proxy/saliency",
    "alignment": "align/method",
    "selection": "align/selection",
    "aggregation": "aggregation",
}


def names(folder: str) -> tuple[str, ...]:
    """The choices of a folder, sorted.

    Args:
        folder: `saliency`, `alignment`, `selection` or `aggregation`.

    Returns:
        Names as they stand in the configuration, with dashes.
    """
    return tuple(p.stem.replace("_", "-") for p in _files(folder))


def describe(folder: str) -> str:
    """`name` (what it does), for every choice, from the files' docstrings.

    Args:
        folder: one that :func:`names` knows.

    Returns:
        One line, the choices with semicolons between them.
    """
    parts = []
    for path in _files(folder):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = text.partition("\n")[0].rstrip(".")
        parts.append(f"`{path.stem.replace('_', '-')}` ({first[:1].lower()}{first[1:]})")
    return "; ".join(parts)


def load(folder: str, name: str) -> ModuleType:
    """The module of a choice, imported now if it has not been before.

    Args:
        folder: one that :func:`names` knows.
        name: one of its choices, with dashes.

    Returns:
        The module, whose functions the folder's `__init__` describes.

    Raises:
        KeyError: the folder has no such choice.
    """
    if name not in names(folder):
        raise KeyError(f"{folder} has no {name!r}")
    return importlib.import_module(
        f"fedpft_core.{_ROOMS[folder].replace('/', '.')}.{name.replace('-', '_')}"
    )


def _files(folder: str) -> list[Path]:
    return sorted(p for p in (_ROOT / _ROOMS[folder]).glob("*.py") if not p.stem.startswith("_"))
