"""Early stopping: rounds end when validation rows say so, with the adapter of the best round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file

from fedpft_core.config import from_flat
from fedpft_core.errors import UserError
from fedpft_core.task import classify
from server_app.schedule import early


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny.write_task("bert", folder, rows=60) | {
        "federation.rounds": 6, "federation.early-stopping": 2, "distill.steps": 2,
        "train.local-epochs": 1, "run.gradient-rows": 0, "align.interval": 0,
        "run.undistilled": False, "run.baselines": False, "run.evaluate-every": 100,
        "plan.proxy": "full", "distill.method": "none", "head.start": "zero",
        "head.end": "trained", "plug.refit": "none", "plug.method": "refit",
    } | changes  # fmt: skip


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == name]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the checks find, in their order, in place of what the model comes to."""
    values: list[float] = []
    real = early.evaluate

    def scripted(*args: Any) -> Any:
        return replace(real(*args), value=values.pop(0))

    monkeypatch.setattr(early, "evaluate", scripted)
    return values


def test_rounds_end_and_the_best_adapter_is_the_product(
    tmp_path: Path, scores: list[float]
) -> None:
    scores += [0.5, 0.7, 0.7, 0.6]
    events = tiny.run(settings(tmp_path), tmp_path / "a")
    assert [e["best"] for e in of(events, "check")] == [1, 2, 2, 2]
    (stopped,) = of(events, "stopped")
    assert (stopped["round"], stopped["rounds"], stopped["best"]) == (4, 6, 2)
    assert [e["round"] for e in of(events, "round_finished")] == [1, 2, 3, 4]
    # What a run of two rounds makes whose rates are those of six.
    scores += [0.5, 0.7]
    with pytest.raises(Exception, match="stopped after round 2"):
        tiny.run(settings(tmp_path) | {"run.stop-after": 2}, tmp_path / "b")
    second = load_file(tmp_path / "b" / "checkpoints" / "round-0002" / "adapter.safetensors")
    kept = load_file(tmp_path / "a" / "checkpoints" / "round-0004" / "best.safetensors")
    last = load_file(tmp_path / "a" / "checkpoints" / "round-0004" / "adapter.safetensors")
    assert tiny.same_bits(second, kept)
    assert not tiny.same_bits(second, last)
    # The score at the end is of the adapter that was kept.
    final = [e for e in of(events, "evaluation") if e["round"] == 4]
    assert {e["model"] for e in final} >= {"proxy", "fm"}


def test_a_resumed_run_ends_where_the_first_would(tmp_path: Path, scores: list[float]) -> None:
    flat = settings(tmp_path)
    scores += [0.5, 0.4, 0.3]
    whole = tiny.run(flat, tmp_path / "whole")
    scores += [0.5, 0.4, 0.3]
    with pytest.raises(Exception, match="stopped after round 2"):
        tiny.run(flat | {"run.stop-after": 2}, tmp_path / "part")
    parts = tiny.run(flat | {"run.resume": True}, tmp_path / "part")
    assert not scores
    ends = [[e["value"] for e in of(x, "evaluation")] for x in (whole, parts)]
    assert ends[0][-2:] == ends[1][-2:]
    assert of(parts, "stopped")[-1]["best"] == 1
    # One that has ended asks nobody again.
    again = tiny.run(flat | {"run.resume": True}, tmp_path / "part")
    assert len(of(again, "round_started")) == len(of(parts, "round_started"))


def test_all_rounds_are_run_where_scores_keep_rising(tmp_path: Path, scores: list[float]) -> None:
    scores += [0.1, 0.2, 0.3]
    events = tiny.run(
        settings(tmp_path) | {"federation.check-every": 2, "federation.rounds": 5}, tmp_path / "a"
    )
    assert [e["round"] for e in of(events, "check")] == [2, 4, 5]
    assert of(events, "stopped")[0]["best"] == 5


def test_of_equal_and_undefined_scores_the_earlier_is_kept(
    tmp_path: Path, scores: list[float]
) -> None:
    scores += [float("nan"), 0.2, float("nan"), 0.2]
    events = tiny.run(settings(tmp_path), tmp_path / "a")
    assert [e["best"] for e in of(events, "check")] == [1, 2, 2, 2]


def test_a_metric_knows_its_direction() -> None:
    assert classify.ACCURACY.better(0.6, 0.5)
    assert not classify.ACCURACY.better(0.5, 0.5)


@pytest.mark.parametrize(("changes", "named"), [
    ({"federation.aggregate": "none"}, r"federation\.early-stopping .* federation\.aggregate"),
    ({"federation.schedule": "async"}, r"federation\.early-stopping .* federation\.schedule"),
    ({"federation.check-every": 3}, r"federation\.check-every = 3"),
])  # fmt: skip
def test_contradictions_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        from_flat({"federation.early-stopping": 2} | changes)


def test_without_validation_rows_it_is_refused(tmp_path: Path) -> None:
    flat = settings(tmp_path) | {"data.validation-share": 0.0, "data.validation": ""}
    with pytest.raises(UserError, match=r"federation\.early-stopping .* data\.validation"):
        tiny.run(flat, tmp_path / "a")
