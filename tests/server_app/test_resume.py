"""Resuming another run than the one that began: refused by the name of what is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from fedpft_core.config import FREE_ON_RESUME, from_flat, keys, to_flat, write_yaml
from fedpft_core.errors import UserError
from server_app.run import identity as identities
from server_app.run.folder import RunFolder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run that stopped after round 1 of 2."""
    folder = tmp_path_factory.mktemp("resume")
    flat = tiny.write_task("bert", folder, rows=60) | {
        "federation.rounds": 2, "run.dir": str(folder / "run"), "distill.steps": 2,
        "train.local-epochs": 1, "run.gradient-rows": 0, "align.interval": 0,
    }  # fmt: skip
    with pytest.raises(Exception, match="stopped after round 1"):
        tiny.run(flat | {"run.stop-after": 1}, folder / "run")
    write_yaml(folder / "run" / "config.yaml", to_flat(from_flat(flat)))
    return flat, folder / "run"


def opened(flat: dict[str, Any], **changes: Any) -> None:
    flat = flat | {"run.resume": True} | changes
    config = from_flat(flat)
    with RunFolder.open(config):
        pass


@pytest.mark.parametrize(("key", "value"), [
    ("train.lr", 0.5), ("run.seed", 7), ("federation.partition", "iid"), ("wire.adapter", "fp32"),
    ("federation.aggregate", "median"), ("lora.rank", 3), ("federation.rounds", 1),
])  # fmt: skip
def test_another_configuration_is_refused_by_its_key(
    stopped: tuple[dict[str, Any], Path], key: str, value: Any
) -> None:
    flat, folder = stopped
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        opened(flat, **{key: value})
    assert (folder / "config.yaml").read_bytes() == before
    # The checkpoint knows it too, whatever becomes of config.yaml.
    saved = identities.identity(from_flat(flat))
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        identities.refuse_another(saved, identities.identity(from_flat(flat | {key: value})))


def test_what_may_change_is_a_key(stopped: tuple[dict[str, Any], Path]) -> None:
    assert set(FREE_ON_RESUME) <= set(keys())
    flat, _ = stopped
    saved, patient, other = (
        identities.identity(from_flat(flat | change))
        for change in ({}, {"federation.round-timeout": 5.0}, {"run.seed": 8})
    )
    identities.refuse_another(saved, patient)
    identities.refuse_another({}, other)  # of before identities


def test_another_file_or_program_is_refused(
    stopped: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flat, folder = stopped
    train = Path(flat["data.train"])
    content = train.read_bytes()
    run = flat | {"run.resume": True}
    try:
        train.write_bytes(content + b"the cat,animal\n")
        with pytest.raises(UserError, match=r"data\.train: the file is not the one"):
            tiny.run(run, folder)
    finally:
        train.write_bytes(content)
    weights = next(Path(flat["model.name"]).glob("*.safetensors"))
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=r"model\.name"):
            tiny.run(run, folder)
    finally:
        weights.write_bytes(content)
    monkeypatch.setattr(identities, "__version__", "99.0")
    with pytest.raises(UserError, match=r"version .* 99\.0"):
        tiny.run(run, folder)


def test_a_damaged_log_is_warned_of(stopped: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    import shutil

    flat, folder = stopped
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    log = copy / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:2] + lines[5:]))
    events = tiny.run(flat | {"run.resume": True}, copy)
    texts = [e["text"] for e in events if e["event"] == "warning"]
    assert any("events.jsonl is not as the last checkpoint knows it" in t for t in texts)
    copy = tmp_path / "whole"
    shutil.copytree(folder, copy)
    events = tiny.run(flat | {"run.resume": True}, copy)
    assert not any("events.jsonl" in e.get("text", "") for e in events)
    assert events[-1]["event"] == "run_finished"
