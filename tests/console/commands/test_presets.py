"""Every preset of configs/: resolved, shrunken, and trained for two rounds on fabricated rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from fedpft_console import launch
from fedpft_console.cli import main
from fedpft_console.commands import dry_run
from fedpft_console.launch import run_simulation
from fedpft_core import config
from fedpft_core.data import hub
from fedpft_core.errors import UserError
from fedpft_core.model.families import FAMILIES, family_of
from fedpft_core.model.load import load
from fedpft_core.task import load_task

FOLDER = Path(__file__).parents[3] / "configs"
PRESETS = sorted(p.stem for p in FOLDER.glob("*.yaml"))
FEW = ("roberta-qqp", "vit-cifar10", "qwen2.5-0.5b-dolly")
PAPER = [p for p in PRESETS if p.startswith(("bert-", "roberta-", "vit-"))]


def resolved(name: str) -> config.Config:
    return config.from_flat(config.read_file(FOLDER / f"{name}.yaml"))


def small(name: str, folder: Path) -> dict[str, Any]:
    return dict(dry_run.shrink(resolved(name), folder))


def test_there_is_a_preset_for_each_cell() -> None:
    glue = {f"{m}-{d}" for m in ("bert", "roberta") for d in ("sst2", "qnli", "mnli", "qqp")}
    images = {f"vit-{d}" for d in ("cifar10", "cifar100", "flowers102")}
    decoders = {
        f"{m}-{d}"
        for m in ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b")
        for d in ("alpaca", "dolly", "gsm8k")
    }
    assert set(PRESETS) == glue | images | decoders | {"flowertune-finance-smollm2-135m"}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_hyper_parameters(name: str) -> None:
    c = resolved(name)
    assert (c.federation.clients, c.federation.clients_per_round) == (100, 10)
    assert (c.lora.rank, c.lora.alpha, c.train.lr) == (8, 48.0, 8e-4)
    assert (c.align.interval, c.align.proportion) == (10, 0.5)
    assert (c.plan.keep_neurons, c.plan.retained_layers) == (768, "first,last")
    assert (c.train.local_steps, c.train.local_epochs) == (0, 1)
    assert (c.head.start, c.head.end, c.plug.method) == ("zero", "trained", "as-trained")


def test_the_protocol_of_the_finance_track() -> None:
    c = resolved("flowertune-finance-smollm2-135m")
    assert (c.federation.clients, c.federation.clients_per_round) == (50, 5)
    assert (c.federation.rounds, c.train.local_steps) == (200, 10)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_to_a_small_model_and_rows_of_its_columns(
    name: str, tmp_path: Path
) -> None:
    c = resolved(name)
    for source in (c.data.train, c.data.test, c.data.public):
        assert source.startswith(hub.PREFIX) and hub.parse(source).name.count("/") == 1
    flat = small(name, tmp_path)
    assert flat["federation.rounds"] == 2
    made = config.from_flat(flat)
    assert made.data.label_column == c.data.label_column
    assert made.data.text_column == c.data.text_column
    task = load_task(made.data, 0)
    loaded = load(made.model, task.task.model(), 0)
    assert loaded.family == family_of(c.model.family)
    assert made.model.family == c.model.family
    assert not task.left_out


def trained(name: str, folder: Path) -> None:
    events = tiny.run(small(name, folder / "fabricated"), folder / "run")
    rounds = [e["round"] for e in tiny.main_run(events, "round_finished")]
    assert rounds == [1, 2]
    assert tiny.main_run(events, "evaluation")
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", FEW)
def test_two_rounds_of_a_few(name: str, tmp_path: Path) -> None:
    trained(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [p for p in PRESETS if p not in FEW])
def test_two_rounds_of_the_others(name: str, tmp_path: Path) -> None:
    trained(name, tmp_path)


@pytest.mark.slow
def test_the_command(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(launch, "run_simulation", run_simulation)  # a real run is meant
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["run", "--config", str(FOLDER / "bert-sst2.yaml"), "--dry-run"]) == 0
    assert "2 rounds on a random bert" in capsys.readouterr().out
    assert not list(elsewhere.iterdir())


KINDS: dict[str, dict[str, Any]] = {
    "regress": {"data.task": "regress"},
    "multi-label": {"data.task": "multi-label", "data.labels": "x,y,z"},
    "tokens": {"data.task": "tokens", "data.labels": "O,B-x"},
    "messages": {"data.messages-column": "chat", "model.family": "gpt2"},
    "text": {"data.task": "generate", "data.source-column": "from", "model.family": "opt"},
    "image-regression": {"data.task": "regress", "data.image-column": "i", "model.family": "deit"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fabricated_rows_of_every_kind_can_be_read(kind: str, tmp_path: Path) -> None:
    keys = {"data.train": "hub:a/b", "data.test": "hub:a/b", "model.family": "electra"}
    flat = dry_run.shrink(config.from_flat(keys | KINDS[kind]), tmp_path)
    made = config.from_flat(flat)
    task = load_task(made.data, 0)
    load(made.model, task.task.model(), 0)
    assert len(task.test) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [f for f, row in FAMILIES.items() if row.kind != "captioned image"]
)
def test_a_shrunken_model_of_every_family_loads(family: str, tmp_path: Path) -> None:
    image = {"data.image-column": "i"} if FAMILIES[family].kind == "image" else {}
    keys = {"data.train": "hub:a/b", "data.test": "hub:a/b", "model.family": family}
    made = config.from_flat(dry_run.shrink(config.from_flat(keys | image), tmp_path))
    found = load(made.model, load_task(made.data, 0).task.model(), 0)
    assert found.family.name == family and found.shape.blocks == 4


def test_one_shot_asks_every_client_of_the_small_federation_too(tmp_path: Path) -> None:
    keys = {
        "federation.schedule": "one-shot", "federation.rounds": 1, "model.family": "bert",
        "federation.clients": 20, "federation.clients-per-round": 20,
    }  # fmt: skip
    made = config.from_flat(dry_run.shrink(config.from_flat(keys), tmp_path))
    assert made.federation.clients_per_round == made.federation.clients == 3


def test_what_a_dry_run_cannot_do(tmp_path: Path, capsys: Any) -> None:
    keys = {"data.train": "hub:a/b", "data.test": "hub:a/b"}
    nobody = config.from_flat(keys | {"model.name": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match=r"set model\.family"):
        dry_run.shrink(nobody, tmp_path / "a")
    with pytest.raises(UserError, match="is not supported"):
        dry_run.shrink(config.from_flat(keys | {"model.family": "t5"}), tmp_path / "b")
    chat = config.from_flat(keys | {"data.messages-column": "m", "model.family": "bert"})
    with pytest.raises(UserError, match="writes no text"):
        dry_run.shrink(chat, tmp_path / "c")
    assert main(["run", "--dry-run", "--resume", "x"]) != 0
    assert "exclude each other" in capsys.readouterr().err
