"""Choices of a key: each file of a folder here is one, and so is each installed plugin.

`saliency/weight_norm.py` is the choice `weight-norm`. The first line of its docstring says what it
does, in the list of keys too. Nothing is imported until a choice is used.

Another distribution adds a choice by an entry point of the group `fedpft.saliencies`,
`fedpft.alignments`, `fedpft.selections` or `fedpft.aggregations` that names a module with the same
functions; one of the group `fedpft.families` names a module with `FAMILY`, one of `fedpft.tasks` a
module with `TASK`. Where a plugin has the name of a part here, the part here is meant.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from fedpft_core.errors import UserError

_ROOT = Path(__file__).parent
_ROOMS = {
    "saliency": "proxy/saliency",
    "alignment": "align/method",
    "selection": "align/selection",
    "aggregation": "aggregation",
}

GROUPS = {
    "saliency": "fedpft.saliencies",
    "alignment": "fedpft.alignments",
    "selection": "fedpft.selections",
    "aggregation": "fedpft.aggregations",
    "family": "fedpft.families",
    "task": "fedpft.tasks",
}
"""Group of entry points by what they add. Families and tasks here are no files of a folder."""

_HOLDS = {"family": "FAMILY", "task": "TASK"}


@dataclass(frozen=True)
class Plugin:
    """A choice that another distribution adds.

    Attributes:
        folder: what it is a choice of.
        name: as it stands in the configuration.
        origin: name and version of the distribution.
        hidden: whether a file here has the same name, and is meant in its place.
    """

    folder: str
    name: str
    origin: str
    hidden: bool


def plugins(folder: str, others: Iterable[str] = ()) -> list[Plugin]:
    """The choices that other distributions add, by name. None of them is imported.

    Args:
        folder: one of `GROUPS`.
        others: names of parts here that are no files of a folder.

    Returns:
        Each name once; of two distributions with the same name, the first by theirs.
    """
    own = {_named(p) for p in _files(folder)}.union(others)
    return [
        Plugin(folder, name, _origin(point), name in own) for name, point in _points(folder).items()
    ]


def names(folder: str) -> tuple[str, ...]:
    """The choices of a folder, sorted, and then those of plugins.

    Args:
        folder: one of `GROUPS`; of families and tasks there are those of plugins alone.

    Returns:
        Names as they stand in the configuration, with dashes.
    """
    own = tuple(_named(p) for p in _files(folder))
    return own + tuple(name for name in _points(folder) if name not in own)


def describe(folder: str) -> str:
    """`name` (what it does), for every choice that is a file here, from the files' docstrings.

    Args:
        folder: one that :func:`names` knows.

    Returns:
        One line, the choices with semicolons between them.
    """
    parts = []
    for path in _files(folder):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = text.partition("\n")[0].rstrip(".")
        parts.append(f"`{_named(path)}` ({first[:1].lower()}{first[1:]})")
    return "; ".join(parts)


def load(folder: str, name: str) -> ModuleType:
    """The module of a choice, imported now if it has not been before.

    Args:
        folder: one that :func:`names` knows.
        name: one of its choices, with dashes.

    Returns:
        The module, whose functions the folder's `__init__` describes.

    Raises:
        KeyError: there is no such choice.
        UserError: it is a plugin, which cannot be imported or is no module.
    """
    if name not in names(folder):
        raise KeyError(f"{folder} has no {name!r}")
    if name not in {_named(p) for p in _files(folder)}:
        return _imported(_points(folder)[name])
    return importlib.import_module(
        f"fedpft_core.{_ROOMS[folder].replace('/', '.')}.{name.replace('-', '_')}"
    )


def held(folder: str, name: str) -> Any:
    """What the module of a plugin holds: a family, or the class of a task.

    Args:
        folder: `family` or `task`.
        name: of a plugin.

    Returns:
        The module's `FAMILY` or `TASK`, whatever that is.

    Raises:
        KeyError: there is no such plugin.
        UserError: it cannot be imported, or its module holds nothing of the kind.
    """
    module = load(folder, name)
    found = getattr(module, _HOLDS[folder], None)
    if found is None:
        raise UserError(
            f"the plugin {name} of {_origin(_points(folder)[name])} names {module.__name__}, which "
            f"has no {_HOLDS[folder]}."
        )
    return found


def _files(folder: str) -> list[Path]:
    if folder not in _ROOMS:
        return []
    return sorted(p for p in (_ROOT / _ROOMS[folder]).glob("*.py") if not p.stem.startswith("_"))


def _named(path: Path) -> str:
    return path.stem.replace("_", "-")


@cache
def _points(folder: str) -> dict[str, EntryPoint]:
    """Entry points by name; with a dash in a name for each underscore."""
    found = sorted(entry_points(group=GROUPS[folder]), key=lambda p: (p.name, _origin(p)))
    out: dict[str, EntryPoint] = {}
    for point in found:
        out.setdefault(point.name.replace("_", "-"), point)
    return out


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "?"


def _imported(point: EntryPoint) -> ModuleType:
    try:
        module = point.load()
    except Exception as error:  # whatever a plugin's import may raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the plugin {point.name} of {_origin(point)} cannot be imported: "
            f"{type(error).__name__}: {said}."
        ) from error
    if not isinstance(module, ModuleType):
        raise UserError(
            f"the plugin {point.name} of {_origin(point)} names {point.value}, which is no module."
        )
    return module
