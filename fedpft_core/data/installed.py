"""What is installed here: source files and READMEs of packages, found without importing any."""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedpft_core.errors import UserError

# Folders and files that hold no documentation of the library itself.
_SKIPPED_FOLDERS = frozenset(
    {
        *("tests", "test", "testing", "_testing", "__pycache__", "node_modules"),
        *("_vendor", "vendor", "vendored", "_vendored", "thirdparty_files"),
        *("site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"),
    }
)
_SKIPPED_FILE = re.compile(r"^(?:test_.*|.*_tests?|conftest|.*_pb2(?:_grpc)?)\.py$")

# What `builtin:public` takes READMEs from: this project's direct dependencies and, through their
# metadata, everything those need; so that an unrelated package beside them changes no row.
_README_ROOTS: tuple[str, ...] = (
    "flwr",
    "flwr-datasets",
    "datasets",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "ray",
    "PyYAML",
    "numpy",
    "pyarrow",
    "pillow",
    "scikit-learn",
    "matplotlib",
    "rich",
)


@cache
def readme_packages(without: tuple[str, ...]) -> tuple[str, ...]:
    """List the installed packages that this project needs, directly or not.

    Args:
        without: names of packages that are left out.

    Returns:
        Their names in metadata's canonical form, sorted.
    """
    seen: set[str] = set()
    queue = list(_README_ROOTS)
    while queue:
        name = _canonical(queue.pop())
        if name in seen:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        seen.add(name)
        for requirement in requirements:
            # What only an extra needs is not followed: whether it is there is chance.
            if "extra ==" not in requirement and (found := re.match(r"[\w.-]+", requirement)):
                queue.append(found.group())
    return tuple(sorted(seen - {_canonical(name) for name in without}))


def readme(name: str) -> str:
    """Return the long description of an installed package, empty when it has none.

    Args:
        name: the name that the package is distributed under.

    Returns:
        The text, often Markdown or reStructuredText.
    """
    message: Any = metadata.metadata(name)  # its protocol type leaves out get() and the body
    # Old metadata has the text as a field, newer as the body.
    return str(message.get("Description") or "") or str(message.get_payload() or "")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def source_files(root: Path) -> list[str]:
    """List the Python files under a folder in the order of their names' digest.

    Args:
        root: the folder. In it tests, generated files and other people's code are passed over.

    Returns:
        Paths relative to the folder, with "/".
    """
    found: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        inside = Path(folder).relative_to(root)
        found += [
            (inside / name).as_posix()
            for name in names
            if name.endswith(".py") and not _SKIPPED_FILE.match(name)
        ]
    return sorted(found, key=digest_of)


def read(path: Path) -> str:
    """Return a source file's text, empty when it is not UTF-8 or cannot be read.

    Args:
        path: the file.

    Returns:
        The text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""  # a few sources are in other encodings on purpose


def digest_of(text: str) -> str:
    """Return the sha256 of a text, by which files and rows are put in order.

    Args:
        text: hashed as UTF-8.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def folder_of_module(name: str) -> Path:
    """Return where an installed package lies.

    Args:
        name: the name that the package is imported under.

    Returns:
        The folder with its sources; the first where it has several.

    Raises:
        UserError: it is not installed, or is a single file.
    """
    spec = find_spec(name)
    if spec is None:
        raise UserError(f"builtin:docstrings needs the package {name!r}, which is not installed.")
    if not spec.submodule_search_locations:
        raise UserError(
            f"builtin:docstrings needs the package {name!r}, which is here as a single file."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def version_of_module(name: str) -> str:
    """Return an installed package's version.

    Args:
        name: the name that the package is both imported and distributed under.

    Returns:
        The version as its metadata has it.

    Raises:
        UserError: it is not installed, or is a single file.
    """
    folder_of_module(name)
    try:
        # The eight are distributed under the names they are imported by.
        return metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"builtin:docstrings needs the package {name!r}, which is not installed."
        ) from error
