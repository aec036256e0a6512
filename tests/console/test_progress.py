"""What is shown of a run while it goes on, from fabricated events."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from runlog import event, made, put, whole_run

from fedpft_console import report
from fedpft_console.lines import lines_for
from fedpft_console.progress import Follower, View
from server_app.run.events import EventLog, entry_of
from server_app.run.record import Record, fold
from server_app.run.schema import KINDS


def shown(events: list[dict[str, Any]], terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with View(console) as view:
        view.note("starting Flower")
        for e in events:
            entry = entry_of(e)
            assert entry is not None
            view.show(entry)
    return out.getvalue()


def test_plain_lines_tell_the_run_without_control_characters() -> None:
    text = shown(whole_run(), terminal=False)
    assert "\x1b" not in text and "\r" not in text
    for part in (
        "22.7M parameters, 90.8 MB -> sub-FM 11.3M parameters, 45.4 MB (50 %)",
        "distilled 20 steps in 3.0 s: loss 1 -> 0.25",
        "round 1/2: clients 0, 1, 2",
        "round 1: client 0 replied (1/3), 5 rows, loss 1, 1.0 s",
        "round 2: client 2 refused: shape | of head",
        "round 1: plugged-in FM accuracy 50.0 % (test)",
        "round 1: re-aligned 384 neurons in 1.0 s, loss 0.3 -> 0.2, sub-FM aaaaaaaa -> cccccccc",
        "round 1/2 done in 6.0 s: 2 good replies, 0 bad, loss 1; about 6.0 s left",
    ):
        assert part in text, part
    assert "accuracy 1.0 %" not in text, "the side run is not shown as the run"


def test_a_terminal_gets_bars_and_fewer_lines() -> None:
    text = shown(whole_run(), terminal=True)
    assert "\x1b[" in text
    assert "round 1: client 0 replied" not in text
    assert "refused: shape" in text


def test_long_phases_report_rate_and_time_left() -> None:
    steps = [event(100 + i, "progress", phase="distil", done=10 * i, total=400, unit="steps",
                   loss=1 / (i + 1)) for i in range(31)]  # fmt: skip
    lines = [line for line in shown(steps, terminal=False).splitlines() if "distillation" in line]
    assert len(lines) == 3, "every ten seconds"
    assert "distillation: 100/400 steps, loss 0.0909, 10.0/s, 30 s left" in lines[0]


def test_every_event_of_the_schema_has_lines_or_none() -> None:
    for e in whole_run():
        assert all("\n" not in line for line in lines_for(made(e["event"], **e), Record()))
    for kind in KINDS:  # also where nothing is known but the name
        assert all("\n" not in line for line in lines_for(made(kind), Record()))


def test_follower_reads_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert follower.new() == []
    log = EventLog(path)
    log.emit(made("run_started", rounds=1))
    assert [e.event.event for e in follower.new()] == ["run_started"]
    assert follower.new() == []
    log.emit(made("run_finished", seconds=1))
    follower.new()
    assert follower.finished and follower.count == 2


def test_follower_of_a_resumed_run_ignores_the_part_before(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    put(tmp_path, [event(1, "run_started"), event(2, "round_finished", round=1),
                   event(3, "round_started", round=2), event(4, "run_finished")])  # fmt: skip
    keep = path.read_bytes().index(b'{"t": 3')
    follower = Follower(path)
    assert follower.new() == [] and not follower.finished
    log = EventLog(path)
    log.rewind(keep)  # back to the checkpoint after round 1
    assert follower.new() == []
    log.emit(made("run_started", resumed_from=1))
    log.emit(made("round_started", round=2))
    assert [e.event.event for e in follower.new()] == ["run_started", "round_started"]
    log.emit(made("run_failed", reason="why"))
    follower.new()
    assert follower.failure == "why" and not follower.finished


def test_a_metric_is_called_by_its_name() -> None:
    task = {"metric": "rmse", "higher_is_better": False, "share": False}
    found = [event(1, "task", name="x", kind="text", **task),
             event(2, "evaluation", round=1, model="fm", split="test", metric="rmse",
                   value=0.57132)]  # fmt: skip
    assert "round 1: plugged-in FM rmse 0.571 (test)" in shown(found, terminal=False)


def test_what_is_waited_for_is_said_with_the_time_left() -> None:
    waits = [
        event(100 + i, "waiting", what="nodes", done=1, total=2, seconds_left=245.0 - 5 * i)
        for i in range(2)
    ]
    text = shown(waits, terminal=False)
    assert "waiting for nodes, 1 of 2, 245 s left" in text
    assert "waiting for nodes, 1 of 2, 240 s left" in text
    assert "waiting for nodes" in shown(waits, terminal=True)


def test_equal_warnings_are_printed_once_and_counted() -> None:
    warned = [event(100 + i, "warning", text="slow disk") for i in range(8)]
    lines = shown([*warned, event(109, "warning", text="other")], terminal=False).splitlines()
    said = [line for line in lines if "slow disk" in line]
    assert len(said) == 2 and said[1].endswith("warning, 8 times in all: slow disk")
    assert sum("other" in line for line in lines) == 1
    text = report.markdown(fold(warned))
    assert text.count("slow disk") == 1 and "slow disk (8 times)" in text


def test_reference_points_have_a_bar() -> None:
    steps = [event(100 + 11 * i, "progress", phase="baselines", done=10 * i, total=40, unit="rows")
             for i in range(3)]  # fmt: skip
    assert "baselines: 10/40 rows" in shown(steps, terminal=False)


def test_a_choice_on_few_rows_is_called_one() -> None:
    chosen = {"round": 2, "method": "refit", "fitted": 3, "seconds": 1.0, "right": {"refit": 3.0}}
    few = lines_for(made("plugged", rows=3, **chosen), Record())
    assert few[0].startswith("plugged in by refit (rows right of 3 unseen: refit 100")
    assert few[1].startswith("3 rows tell little") and "data.validation-share" in few[1]
    assert len(lines_for(made("plugged", rows=300, **chosen), Record())) == 1
    none = {**chosen, "right": {}}
    assert len(lines_for(made("plugged", rows=0, **none), Record())) == 1


def test_the_heads_line_says_what_slopes_brought() -> None:
    head = {
        "round": 0, "rows": 400, "classes": 4, "shrinkage": 0.1, "scale": 1.0, "loss": 0.5,
        "right_before": None, "right_after": None, "taken": True, "seconds": 2.0,
    }  # fmt: skip
    for more, said in (
        ({}, "400 rows, 4 classes, in 2.0 s"),
        ({"exchanges": 9, "descent": 6}, "classes, tuned by 6 of 9 slopes, in 2.0 s"),
        ({"exchanges": 3}, "classes, which 3 slopes made no better, in 2.0 s"),
    ):
        (line,) = lines_for(made("head", **head, **more), Record())
        assert said in line, line
