"""Choices from other distributions, as installed ones look on the disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from fedpft_console import cli
from fedpft_core import registry
from fedpft_core.errors import UserError
from fedpft_core.model.families import family_of
from fedpft_core.proxy.saliency import Probe, scores
from fedpft_core.task import make

SALIENCY = '''"""The first neurons."""

import torch


def score(probe):
    return [-torch.arange(len(f.ins[0].weight), dtype=torch.float32) for f in probe.ffns]
'''


def install(folder: Path, name: str, group: str, points: dict[str, str]) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{k} = {v}\n" for k, v in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "my_saliency.py").write_text(SALIENCY)
    (folder / "broken_one.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(str(folder))
    registry._points.cache_clear()
    yield folder
    registry._points.cache_clear()
    for name in ("my_saliency", "broken_one"):
        sys.modules.pop(name, None)


def test_a_plugin_is_a_choice_and_is_used(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "my-parts", "fedpft.saliencies", {"first_ones": "my_saliency"})
    assert registry.names("saliency")[-1] == "first-ones"
    assert "first-ones" not in registry.describe("saliency"), "the docs are of this repository"
    found = scores("first-ones", Probe(tiny.model("bert"), 0))
    assert float(found[0][3]) == -3.0
    assert cli.main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "my-parts 1.0" in out and "weight-norm" in out and "median" in out


def test_one_that_cannot_be_imported_is_named_and_the_others_live(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "bad-parts", "fedpft.saliencies", {"broken": "broken_one", "odd": "os:sep"})
    install(site, "my-parts", "fedpft.saliencies", {"first-ones": "my_saliency"})
    with pytest.raises(UserError, match=r"the plugin broken of bad-parts 1\.0 cannot be imported"):
        registry.load("saliency", "broken")
    with pytest.raises(UserError, match="is no module"):
        registry.load("saliency", "odd")
    assert registry.load("saliency", "first-ones").score
    assert registry.load("saliency", "weight-norm").score
    assert cli.main(["plugins"]) == 1
    assert "broken of bad-parts" in " ".join(capsys.readouterr().out.split())


def test_families_and_tasks_of_plugins_that_cannot_be_used_are_named_and_ours_live(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "badfamily", "fedpft.families", {"albert": "broken_one", "odd": "my_saliency"})
    install(site, "badtask", "fedpft.tasks", {"ordinal": "broken_one"})
    assert family_of("bert").name == "bert"
    with pytest.raises(UserError, match=r"'albert' is not supported.*plugin albert of badfamily"):
        family_of("albert")
    assert make("text-regression").name == "text-regression"
    with pytest.raises(UserError, match="the plugin ordinal of badtask"):
        make("pair-ordinal")
    with pytest.raises(UserError, match="is no kind of task"):
        make("pair-cardinal")
    assert cli.main(["plugins"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "has no FAMILY" in out and "tracker tensorboard fedpft" in out
    assert "family roberta fedpft" in out and "task regress fedpft" in out


def test_a_plugin_does_not_take_the_place_of_a_part_of_ours(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "my-parts", "fedpft.saliencies", {"weight_norm": "broken_one"})
    assert registry.names("saliency").count("weight-norm") == 1
    assert registry.load("saliency", "weight-norm").__name__.startswith("fedpft_core.")
    assert cli.main(["plugins"]) == 1
    assert "hidden" in capsys.readouterr().out
