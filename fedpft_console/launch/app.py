"""The folder with the Flower app that is submitted, and TOML texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedpft_core.config import Scalar, keys
from fedpft_core.errors import RunError

PACKAGES = ("fedpft_core", "server_app", "client_app")


def assemble_app(folder: Path) -> Path:
    """Write the Flower app into `folder`: pyproject.toml and the Python files of the packages.

    Works from a checkout and from an installed wheel alike, never bundles anything else that
    lies around in a checkout, and leaves in the run folder the code that ran.

    Args:
        folder: where the app is written; what is there is removed first.

    Returns:
        The same folder, ready to be submitted.

    Raises:
        RunError: a package of the app is not beside this one.
    """
    root = Path(__file__).resolve().parents[2]
    missing = [p for p in PACKAGES if not (root / p / "__init__.py").is_file()
               and not (root / p).is_dir()]  # fmt: skip
    if missing:
        raise RunError(f"{root}: package {missing[0]} is missing; install fedpft again.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for package in PACKAGES:
        for source in sorted((root / package).rglob("*.py")):
            target = folder / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    own = root / "pyproject.toml"
    if own.is_file() and "[tool.flwr.app.components]" in own.read_text(encoding="utf-8"):
        shutil.copyfile(own, folder / "pyproject.toml")
    else:
        (folder / "pyproject.toml").write_text(_pyproject(), encoding="utf-8")
    return folder


def _pyproject() -> str:
    """The app's pyproject.toml, from the metadata of the installed distribution."""
    from importlib import metadata

    from fedpft_core import __version__

    try:
        requires = [r for r in metadata.requires("fedpft") or [] if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        requires = []
    include = ", ".join(f'"{p}/**/*.py"' for p in PACKAGES)
    return (
        "[project]\n"
        'name = "fedpft"\n'
        f'version = "{__version__}"\n'
        'description = "Federated fine-tuning through a compressed proxy"\n'
        'license = "Apache-2.0"\n'
        f"dependencies = {json.dumps(requires)}\n\n"
        "[tool.flwr.app]\n"
        'publisher = "fedpft"\n'
        f"fab-include = [{include}]\n\n"
        "[tool.flwr.app.components]\n"
        'serverapp = "server_app.app:app"\n'
        'clientapp = "client_app.app:app"\n\n'
        "[tool.flwr.app.config]\n" + toml({k: info.default for k, info in keys().items()})
    )


def toml(flat: Mapping[str, Scalar]) -> str:
    """Dotted keys as TOML lines, the form Flower takes as run config.

    Args:
        flat: values by dotted key.

    Returns:
        A line `key = value` for each, in the given order.
    """
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in flat.items())


def toml_value(value: Scalar) -> str:
    """One scalar in TOML; JSON's text escapes are valid TOML once DEL is escaped too.

    Args:
        value: a text, number or truth value.

    Returns:
        A quoted text, `true` or `false`, or the number's digits.
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
