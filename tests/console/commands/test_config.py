"""`fedpft config`: the list of keys and what is made of it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from terminal import refused

from fedpft_console import cli
from fedpft_console.commands import config as listing
from fedpft_core import config

ROOT = Path(__file__).resolve().parents[3]


def test_pyproject_holds_every_key_with_its_default() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    made = config.flatten(project["tool"]["flwr"]["app"]["config"])
    wanted = {name: info.default for name, info in config.keys().items()}
    assert made == wanted, "run `fedpft config --write`"
    assert {k: type(v) for k, v in made.items()} == {k: type(v) for k, v in wanted.items()}


def test_docs_list_every_key() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == listing.config_markdown(), "run `fedpft config --write`"


@pytest.mark.parametrize("form", ["table", "markdown", "toml", "yaml"])
def test_config_lists_every_key(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--format", form]) == 0
    out = capsys.readouterr().out
    for name in list(config.keys()):
        assert (name if form != "yaml" else name.partition(".")[2]) in out


def test_toml_and_yaml_listings_read_back_as_the_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = config.to_flat(config.Config())
    cli.main(["config", "--format", "toml"])
    assert config.flatten(tomllib.loads(capsys.readouterr().out)) == defaults
    cli.main(["config", "--format", "yaml"])
    assert config.flatten(yaml.safe_load(capsys.readouterr().out)) == defaults


def test_write_replaces_the_run_config_and_nothing_else(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "fedpft_core").mkdir()
    project = elsewhere / "pyproject.toml"
    before = "[project]\nname = 'x'\n\n[tool.flwr.app.config]\n"
    after = "[tool.ruff]\nline-length = 100\n\n[tool.x]\ny = 1\n"
    project.write_text(before + "old.key = 3\n\n" + after)
    assert cli.main(["config", "--write"]) == 0
    once = project.read_text()
    assert once == before + listing.config_toml() + "\n" + after
    assert cli.main(["config", "--write"]) == 0
    assert project.read_text() == once
    assert (elsewhere / "docs" / "config.md").read_text() == listing.config_markdown()


def test_write_outside_a_checkout_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "root of a checkout" in refused(capsys, "config", "--write")
