"""Trackers over the events of a run: what they are told, and that a broken one ends nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from runlog import event, whole_run

from fedpft_console import trackers
from fedpft_console.trackers import Trackers
from fedpft_core.errors import UserError
from server_app.run.events import entry_of


def told(run: Trackers, events: list[dict[str, Any]]) -> None:
    for line in events:
        entry = entry_of(line)
        assert entry is not None
        run.show(entry)


def test_tensorboard_gets_every_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(["tensorboard"], tmp_path, {"run.seed": 7}) as run:
        told(run, whole_run())
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scores = [(e.step, e.value) for e in found.Scalars("proxy/accuracy")]
    assert [step for step, _ in scores] == [1, 2]
    assert [value for _, value in scores] == pytest.approx([0.6, 0.7])
    assert [e.wall_time for e in found.Scalars("fm/accuracy")] == [115, 125]
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx([1.0, 0.5])
    assert found.Scalars("reference/tf-idf/accuracy")[0].value == pytest.approx(0.5)
    assert "configuration" in found.Tags()["tensors"]
    assert all(e.value != pytest.approx(0.01) for e in found.Scalars("fm/accuracy")), "a side run"


class Down:
    """A tracker whose other side has gone."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, figures: Mapping[str, float], step: int, now: float) -> None:
        self.calls += 1
        raise ConnectionError("no route\nto host")

    def finish(self, state: str) -> None:
        raise AssertionError("it was left out before")


def test_one_that_is_down_is_left_out_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    down = Down()
    with Trackers(["tensorboard"], tmp_path, {}) as run:
        run.running = {"down": down, **run.running}
        told(run, whole_run())
        assert list(run.running) == ["tensorboard"] and run.state == "finished"
    assert down.calls == 1
    assert capsys.readouterr().err == (
        "fedpft: warning: tracker down is left out from here on: no route\n"
    )


def test_an_unknown_one_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tracker nothing: there is mlflow, tensorboard, wandb"):
        Trackers(["nothing"], tmp_path, {})


def test_one_that_cannot_start_is_left_out_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    with Trackers(["tensorboard"], tmp_path, {}) as run:
        told(run, whole_run())
        assert not run.running
    assert "tracker tensorboard is left out from here on: " in capsys.readouterr().err


def test_mlflow_gets_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "first"
    folder.mkdir()
    with Trackers(["mlflow"], folder, {"run.seed": 7, "data.validation": ""}) as run:
        told(run, whole_run())
        assert "mlflow" in run.running
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fedpft")
    assert experiment
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params["run.seed"] == "7"
    scores = client.get_metric_history(found.info.run_id, "proxy/accuracy")
    assert [(m.step, m.value) for m in scores] == [(1, 0.6), (2, 0.7)]
    assert [m.timestamp for m in client.get_metric_history(found.info.run_id, "fm/accuracy")] == [
        115000, 125000,
    ]  # fmt: skip


def test_a_server_of_mlflow_that_is_down_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with Trackers(["mlflow", "tensorboard"], tmp_path, {}) as run:
        told(run, whole_run())
        assert list(run.running) == ["tensorboard"]
    err = capsys.readouterr().err
    assert err.startswith("fedpft: warning: tracker mlflow is left out from here on: ")


def test_weights_and_biases_writes_files_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Trackers(["wandb"], tmp_path, {"run.seed": 7}) as run:
        told(run, whole_run())
        assert "wandb" in run.running
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(200):  # a process of its own writes it
        data = path.read_bytes()
        if data.count(b"proxy/accuracy") >= 2:
            break
        time.sleep(0.1)
    assert data.count(b"proxy/accuracy") >= 2 and b"run.seed" in data and b"0.7" in data


@pytest.mark.parametrize("line", whole_run())
def test_every_event_gives_numbers_or_nothing(line: dict[str, Any]) -> None:
    entry = entry_of(line)
    assert entry is not None
    found, step = trackers.figures(entry.event)
    assert all(isinstance(v, int | float) for v in found.values()) and step >= 0


def test_a_loss_that_is_no_number_is_no_reason_to_stop(tmp_path: Path) -> None:
    bad = event(1, "round_finished", round=1, loss=math.nan, seconds=1.0)
    with Trackers(["tensorboard"], tmp_path, {}) as run:
        told(run, [bad])
        assert run.running
