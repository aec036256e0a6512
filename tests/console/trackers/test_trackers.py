"""Trackers over the events of a run: what they are told, and that a broken one ends nothing."""

from __future__ import annotations

import math
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


def test_unknown_and_unusable_ones_are_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tracker nothing: there is tensorboard"):
        Trackers(["nothing"], tmp_path, {})
    (tmp_path / "tensorboard").write_text("a file in the way")
    with pytest.raises(UserError, match="--tracker tensorboard: it cannot start"):
        Trackers(["tensorboard"], tmp_path, {})


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
