"""The app folder that is submitted, and TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path

from fedpft_console.launch import app as apps
from fedpft_core import config

ROOT = Path(__file__).resolve().parents[3]


def test_toml_carries_every_scalar() -> None:
    flat = {
        "a.b": True, "a.c": 3, "a.d": 1e-05, "a.e": 1.0,
        "a.f": 'quote " backslash \\ new\nline tab\t del \x7f é 漢 C:\\x',
    }  # fmt: skip
    assert config.flatten(tomllib.loads(apps.toml(flat))) == flat


def test_the_app_folder_holds_the_three_packages_and_takes_every_key(tmp_path: Path) -> None:
    app = apps.assemble_app(tmp_path / "app")
    project = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert config.flatten(project["config"]) == config.to_flat(config.Config())
    assert (app / "fedpft_core" / "model" / "plan.py").is_file()
    assert {p.suffix for p in app.rglob("*") if p.is_file()} <= {".py", ".toml"}
    apps.assemble_app(tmp_path / "app")  # again, as a resumed run does


def test_the_app_folder_of_an_installed_package_is_complete(monkeypatch) -> None:
    made = tomllib.loads(apps._pyproject())
    real = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for part in ("components", "publisher", "fab-include", "config"):
        assert made["tool"]["flwr"]["app"][part] == real["tool"]["flwr"]["app"][part]
    assert made["project"]["name"] == real["project"]["name"]
