"""Events as lines and back, and the record they fold into."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from runlog import event, made, whole_run

from server_app.run import schema as ev
from server_app.run.events import EventLog, entry_of, event_of, line_of, read_events
from server_app.run.record import fold


def test_every_field_of_every_event_is_documented() -> None:
    """A comment beside it, or above it where it is long."""
    assert len(ev.KINDS) > 15
    for cls in (*ev.KINDS.values(), ev.Scored):
        assert (cls.__doc__ or "").rstrip().endswith("."), cls
        lines = inspect.getsource(cls).splitlines()
        for name in cls.__annotations__:
            (i,) = [i for i, line in enumerate(lines) if line.startswith(f"    {name}: ")]
            assert "  # " in lines[i] or lines[i - 1].startswith("    # "), (cls, name)


@pytest.mark.parametrize("kind", ev.KINDS)
def test_an_event_is_read_back_from_its_line(kind: str) -> None:
    blank = event_of({"event": kind, "metric": ""})
    assert blank is not None
    for f in fields(blank):
        value = getattr(blank, f.name)
        assert value in (0, "", None, {}, [], f.default) or math.isnan(value), f.name
    known = [e for e in whole_run() if e["event"] == kind]
    for line in [e | {"of_a_later_version": 1} for e in known]:
        found = event_of(line)
        assert found is not None
        again = event_of(json.loads(json.dumps(line_of(found))))
        assert _same(found) == _same(again)


def _same(found: ev.Event | None) -> dict[str, Any]:
    assert found is not None
    values = {f.name: getattr(found, f.name) for f in fields(found)}
    return {k: "nan" if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def test_what_this_version_does_not_know_is_passed_over() -> None:
    assert event_of({"event": "of_a_later_version", "round": 1}) is None
    assert event_of({"round": 1}) is None
    strange = made("round_started", clients="not a list", rounds="three", lr=None)
    assert isinstance(strange, ev.RoundStarted)
    assert strange.clients == [] and strange.rounds == 0 and math.isnan(strange.lr)
    plain = fold(whole_run())
    assert fold([event(1, "unheard_of"), *whole_run()]).rounds == plain.rounds


def test_a_field_at_its_default_is_left_out_of_the_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.emit(made("progress", phase="distil", done=1, total=2, unit="steps"))
    log.tagged("side").emit(made("progress", phase="distil", done=1, loss=math.inf))
    log.emit(made("run_started", seed=3))
    log.close()
    first, second, third = (line for _, line in read_events(tmp_path / "events.jsonl"))
    assert set(first) == {"t", "event", "phase", "done", "total", "unit"}
    assert second["loss"] is None and second["arm"] == "side"
    assert third["resumed_from"] is None, "what has no default is always said"
    entry = entry_of(second)
    assert entry and entry.arm == "side" and entry.t == second["t"]


def test_accuracy_of_an_older_version_becomes_a_value_with_its_error() -> None:
    old = event_of({"event": "evaluation", "accuracy": 0.6, "rows": 400, "loss": 1.5})
    assert isinstance(old, ev.Evaluation)
    assert (old.metric, old.value, old.loss, old.rows) == ("accuracy", 0.6, 1.5, 400)
    assert old.error == pytest.approx(math.sqrt(0.6 * 0.4 / 400))
    none = event_of({"event": "baseline", "accuracy": 0.6})
    assert isinstance(none, ev.Baseline) and none.error is None
    task = event_of({"event": "task", "name": "x"})
    assert isinstance(task, ev.Task)
    assert (task.metric, task.higher_is_better, task.share) == ("accuracy", True, True)
    assert task.further == [] and old.more == {}


def test_the_record_leaves_side_runs_out() -> None:
    record = fold(whole_run())
    assert record.bytes("down", "package") == 45_400_000
    assert record.round(1).fm and record.round(1).fm.value == 0.5


def test_rounds_after_the_checkpoint_are_forgotten_when_a_run_resumes() -> None:
    """Whoever follows a run over its resumption sees what a reader of the cut file sees."""
    events = whole_run()
    ends = [i for i, e in enumerate(events) if e["event"] == "phase_finished"]
    second = next(i for i, e in enumerate(events) if e.get("round") == 2)
    assert second < ends[-1]
    again = event(200, "run_started", run_dir="/r", rounds=2, resumed_from=1)
    late = [e | {"t": e["t"] + 100} for e in events[second:]]
    live = fold([*events[:-3], again, *late])
    cut = fold([*events[:second], again, *late])
    assert live.rounds == cut.rounds and len(live.round(2).replies) == 3
    assert live.state == "finished"


def test_a_repeated_round_counts_the_replies_of_its_last_attempt() -> None:
    lines = [
        event(1, "round_started", round=1, rounds=2, attempt=1, clients=["a", "b"]),
        event(2, "reply", round=1, client="a", status="ok"),
        event(3, "round_started", round=1, rounds=2, attempt=2, clients=["b"]),
        event(4, "reply", round=1, client="b", status="ok"),
    ]
    at = fold(lines).round(1)
    assert at.got == 1 and len(at.replies) == 2 and at.started and at.started.attempt == 2
