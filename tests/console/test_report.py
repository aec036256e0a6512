"""Reports made from fabricated events."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedpft_console import report
from fedpft_console.progress import (
    Follower,
    View,
    human_bytes,
    human_count,
    human_seconds,
    lines_for,
    percent,
)
from fedpft_core.errors import UserError
from server_app.run.events import EventLog, event_of
from server_app.run.schema import Event


def event(t: float, kind_: str, **fields: Any) -> dict[str, Any]:
    return {"t": t, "event": kind_} | fields


def made(kind_: str, **fields: Any) -> Event:
    """An event of which only some fields matter."""
    found = event_of({"event": kind_} | fields)
    assert found is not None
    return found


def whole_run() -> list[dict[str, Any]]:
    """Two rounds with every kind of event, an alignment, a refused reply and a side run."""
    e = [
        event(100, "run_started", run_dir="/r", version="1", seed=7, method="fedpft", rounds=2,
              clients_per_round=2, resumed_from=None),
        event(101, "phase_started", phase="load"),
        event(103, "phase_finished", phase="load", seconds=2.0),
        event(103, "task", name="builtin:x", kind="text", train=10, validation=2, test=400,
              labels=["a", "b"], public=5),
        event(103, "model", fm_parameters=22_700_000, fm_bytes=90_800_000,
              proxy_parameters=11_350_000, proxy_bytes=45_400_000,
              fm_block_parameters=10_000_000, proxy_block_parameters=5_000_000, blocks=[]),
        event(103, "nodes", count=4, names=["0", "1", "2", "3"]),
        event(104, "baseline", name="tf-idf", value=0.5, rows=400),
        event(104, "baseline", name="linear-probe", value=0.6, rows=400),
        event(104, "baseline", name="undistilled", value=0.4, rows=400),
        # The side run's bytes and evaluations must not be mixed up with the run's.
        event(104, "bytes", arm="undistilled", round=1, client="0", direction="down",
              kind="package", bytes=999_999_999),
        event(104, "evaluation", arm="undistilled", round=1, model="fm", split="test",
              value=0.01, loss=9.0, rows=400, seconds=1.0),
        event(105, "progress", phase="distil", done=10, total=20, unit="steps", loss=0.5),
        event(106, "distilled", steps=20, seconds=3.0, loss_first=1.0, loss_last=0.25,
              output_error=[0.1]),
        event(106, "agreement", round=0, when="start", cosine=0.5, relative_l2=0.9,
              head_cosine=1.0, blocks=[]),
    ]  # fmt: skip
    for n in (1, 2):
        t = 100 + 10 * n
        e += [
            event(t, "round_started", round=n, rounds=2, attempt=1, clients=["0", "1", "2"], lr=1),
            event(t, "bytes", round=n, client="0", direction="down", kind="adapter", bytes=1000),
            event(t, "bytes", round=n, client="1", direction="down", kind="adapter", bytes=1000),
            event(t, "bytes", round=n, client="0", direction="up", kind="adapter", bytes=1500),
            event(t + 1, "reply", round=n, client="0", status="ok", seconds=1.0, examples=5,
                  loss=1.0),
            event(t + 1, "reply", round=n, client="1", status="ok", seconds=1.0, examples=5,
                  loss=math.nan),
            event(t + 4, "evaluation", round=n, model="proxy", split="test", value=0.5 + 0.1 * n,
                  loss=1.0, rows=400, seconds=1.0),
            event(t + 5, "evaluation", round=n, model="fm", split="test", value=0.5, loss=1.0,
                  rows=400, seconds=1.0),
            event(t + 6, "round_finished", round=n, seconds=6.0, train_seconds=4.0,
                  exchange_seconds=3.0, evaluate_seconds=2.0, loss=1.0 / n, examples=10, good=2,
                  bad=n - 1),
        ]  # fmt: skip
        if n == 1:
            e += [
                event(t, "bytes", round=1, client="0", direction="down", kind="package",
                      bytes=45_400_000),
                event(t + 6, "agreement", round=1, when="before-align", cosine=0.6,
                      relative_l2=0.8, head_cosine=1.0, blocks=[]),
                event(t + 7, "alignment", round=1, neurons=384, share=0.5, loss_before=0.3,
                      loss_after=0.2, digest_from="aaaaaaaabbbb", digest_to="ccccccccdddd",
                      gap_before=0.05, gap_after=-0.025,
                      seconds=1.0, blocks=[{"block": 1, "error_before": 0.3, "error_after": 0.1},
                                           {"block": 2, "error_before": 0.5, "error_after": 0.3}]),
                event(t + 7, "agreement", round=1, when="after-align", cosine=0.7,
                      relative_l2=0.7, head_cosine=1.0, blocks=[]),
                event(t + 8, "phase_finished", phase="align", seconds=1.0),
            ]  # fmt: skip
        else:
            e.append(event(t + 2, "reply", round=2, client="2", status="refused", seconds=1.0,
                           examples=0, loss=None, reason="shape | of head"))  # fmt: skip
        e.append(event(t + 9, "phase_finished", phase="round", seconds=9.0))
    return [
        *e,
        event(129, "memory", process="server", peak_rss_bytes=1_500_000_000),
        event(130, "files", paths={"adapter": "/r/adapter"}),
        event(130, "run_finished", seconds=30.0),
    ]


def put(folder: Path, events: list[dict[str, Any]]) -> None:
    lines = [json.dumps(e) + "\n" for e in events]
    (folder / report.EVENTS).write_text("".join(lines), encoding="utf-8")


def sheet(summary: report.Summary, title: str) -> dict[str, list[str]]:
    """Rows of a table by their first cell."""
    found = next(t for t in report.tables(summary) if t.title == title)
    return {row[0].strip(): row[1:] for row in found.rows}


def test_accuracy_table_has_baselines_rounds_gap_and_standard_error() -> None:
    rows = sheet(report.summarise(whole_run()), "Accuracy")
    assert list(rows) == [
        "linear probe on the FM", "TF-IDF", "undistilled sub-FM, plugged in",
        "FedPFT after round 1 *", "FedPFT after round 2",
    ]  # fmt: skip
    # sqrt(0.6 * 0.4 / 400) = 0.0245; the gap is sub-FM minus plugged-in FM
    assert rows["FedPFT after round 1 *"] == ["60.0 ± 2.4 %", "50.0 ± 2.5 %", "+10.0", "1"]
    assert rows["FedPFT after round 2"][2] == "+20.0"
    assert rows["TF-IDF"] == ["", "50.0 ± 2.5 %", "", ""]


def test_traffic_is_summed_by_kind_and_direction_without_side_runs() -> None:
    rows = sheet(report.summarise(whole_run()), "Traffic")
    assert rows["package"] == ["45.4 MB", "0 B", "45.4 MB"]
    assert rows["adapter"] == ["4.0 kB", "3.0 kB", "7.0 kB"]
    assert rows["all"] == ["45.4 MB", "3.0 kB", "45.4 MB"]


def test_time_memory_and_files_are_listed() -> None:
    s = report.summarise(whole_run())
    rows = sheet(s, "Time and memory")
    assert rows["loading"] == ["2.0 s"]
    assert rows["rounds"] == ["18 s"]
    assert rows["of which re-alignment"] == ["1.0 s"], "not counted beside the rounds it is in"
    assert rows["of which evaluation"] == ["4.0 s"]
    assert rows["whole run, without starting Flower"] == ["30 s"]
    assert rows["peak memory, server"] == ["1.50 GB"]
    assert sheet(s, "Files") == {"adapter": ["/r/adapter"]}
    assert sheet(s, "Model")["bytes"] == ["90.8 MB", "45.4 MB", "50.0 %"]


def test_alignment_and_agreement_reach_the_round() -> None:
    first = report.summarise(whole_run()).rounds[1]
    assert first.number == 1 and first.aligned_neurons == 384
    assert first.align_error_before == pytest.approx(0.4)
    assert first.align_error_after == pytest.approx(0.2)
    assert first.latest(first.cosine) == 0.7, "after the alignment, not before"


def test_bad_replies_are_named() -> None:
    s = report.summarise(whole_run())
    assert s.bad_replies == ["round 2, client 2: refused, shape | of head"]
    assert "shape \\| of head" in report.markdown(s)


@pytest.mark.parametrize("cut", range(len(whole_run()) + 1))
def test_any_beginning_of_a_run_can_be_reported(cut: int) -> None:
    s = report.summarise(whole_run()[:cut])
    assert s.state == ("finished" if cut == len(whole_run()) else "running")
    assert report.markdown(s).startswith("# Run report")
    report.rounds_csv(s), report.as_json(s), report.render(s)


def test_a_failed_run_tells_its_reason_and_keeps_its_rounds() -> None:
    events = [*whole_run()[:-1], event(140, "run_failed", reason="round 3: 1 good reply.")]
    s = report.summarise(events)
    assert report.headline(s).startswith("Run failed after 2 of 2 rounds: round 3: 1 good reply.")
    assert len(s.rounds) == 3


def test_a_resumed_run_adds_up_its_parts() -> None:
    events = whole_run()
    second = next(
        i for i, e in enumerate(events) if e["event"] == "round_started" and e["round"] == 2
    )
    late = [e | {"t": e["t"] + 1000} for e in events[second:]]
    again = event(1118, "run_started", run_dir="/r", rounds=2, resumed_from=1, seed=7)
    s = report.summarise([*events[:second], again, *late])
    whole = report.summarise(events)
    assert s.state == "finished" and s.run["resumed_from"] == 1
    assert report.rounds_csv(s) == report.rounds_csv(whole)
    first_part = events[second - 1]["t"] - 100
    assert s.seconds == pytest.approx(first_part + (1130 - 1118)), "the pause does not count"


def test_csv_has_numbers_and_empty_cells() -> None:
    rows = list(csv.DictReader(io.StringIO(report.rounds_csv(report.summarise(whole_run())))))
    assert [r["round"] for r in rows] == ["0", "1", "2"]
    assert float(rows[1]["proxy_accuracy"]) == 0.6
    assert float(rows[1]["proxy_standard_error"]) == pytest.approx(math.sqrt(0.6 * 0.4 / 400))
    assert rows[0]["fm_accuracy"] == "" and rows[2]["aligned_neurons"] == ""
    assert rows[1]["down_package_bytes"] == "45400000" and rows[2]["down_package_bytes"] == "0"


def test_json_is_strict_even_with_nan() -> None:
    events = whole_run()
    for e in events:
        if e["event"] == "round_finished":
            e["loss"] = math.nan

    def refuse(name: str) -> None:
        raise AssertionError(name)

    made = json.loads(report.as_json(report.summarise(events)), parse_constant=refuse)
    assert made["rounds"][1]["loss"] is None
    assert made["rounds"][1]["gap"] == pytest.approx(0.1)
    assert made["bytes"]["up"]["adapter"] == 3000


def test_write_makes_all_files_whole_and_none_else(tmp_path: Path) -> None:
    put(tmp_path, whole_run())
    s = report.write(tmp_path)
    names = {"events.jsonl", "report.md", "rounds.csv", "summary.json", "plot.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert s.files["plot"] == str(tmp_path / "plot.png")
    before = (tmp_path / "rounds.csv").read_bytes()
    report.write(tmp_path)
    assert (tmp_path / "rounds.csv").read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "report.md"
    target.write_text("old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        report._put(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
    assert target.read_text() == "old"


def test_no_plot_before_a_round_was_scored(tmp_path: Path) -> None:
    put(tmp_path, whole_run()[:6])
    report.write(tmp_path)
    assert not (tmp_path / "plot.png").exists()
    assert "plot.png" not in (tmp_path / "report.md").read_text()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    put(tmp_path, whole_run()[:2])
    with open(tmp_path / report.EVENTS, "a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match="line 3 is damaged"):
        report.read(tmp_path)


def test_a_half_written_last_line_is_not_an_error(tmp_path: Path) -> None:
    put(tmp_path, whole_run()[:2])
    with open(tmp_path / report.EVENTS, "a") as file:
        file.write('{"t": 1, "ev')
    assert len(report.read(tmp_path)) == 2


def test_a_folder_without_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no events\.jsonl"):
        report.write(tmp_path)


# ---------------------------------------------------------------- progress


def shown(events: list[dict[str, Any]], terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with View(console) as view:
        view.note("starting Flower")
        for e in events:
            view.show(e)
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
        assert all("\n" not in line for line in lines_for(e, {}))


def test_follower_reads_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert follower.new() == []
    log = EventLog(path)
    log.emit(made("run_started", rounds=1))
    assert [e["event"] for e in follower.new()] == ["run_started"]
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
    assert [e["event"] for e in follower.new()] == ["run_started", "round_started"]
    log.emit(made("run_failed", reason="why"))
    follower.new()
    assert follower.failure == "why" and not follower.finished


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (human_bytes(999), "999 B"), (human_bytes(1000), "1.0 kB"),
        (human_bytes(999_990), "1.0 MB"), (human_bytes(2.5e9), "2.50 GB"),
        (human_count(950), "950"), (human_count(22_713_216), "22.7M"), (human_count(3e9), "3.00G"),
        (human_seconds(0.04), "0.0 s"), (human_seconds(59.7), "1 min 00 s"),
        (human_seconds(3600), "1 h 00 min"), (human_seconds(math.inf), "?"),
        (percent(0.5713), "57.1 %"), (percent(None), "-"), (percent(math.nan), "-"),
    ],
)  # fmt: skip
def test_numbers_are_legible(made: str, wanted: str) -> None:
    assert made == wanted


def test_what_clients_found_on_rows_of_their_own_is_shown() -> None:
    found = event(118, "client_validation", round=0, value=0.25, rows=20, clients=2)
    s = report.summarise([*whole_run(), found])
    before = next(r for r in s.rounds if r.number == 0)
    assert before.clients == report.Score(0.25, 20)
    (shown,) = [t for t in report.tables(s) if t.title == "Accuracy"]
    assert shown.columns[-1] == "sub-FM at clients"
    rows = {row[0]: row[-1] for row in shown.rows}
    assert rows["FedPFT before round 1"] == "25.0 ± 9.7 %"
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    first = next(csv.DictReader(io.StringIO(report.rounds_csv(s))))
    assert first["clients_rows"] == "20"
    # Where nobody keeps rows, there is no such column.
    (plain,) = [t for t in report.tables(report.summarise(whole_run())) if t.title == "Accuracy"]
    assert plain.columns[-1] == "training loss"
    (line,) = lines_for(found, {})
    assert line == "round 0: sub-FM accuracy 25.0 % on 20 rows that 2 clients keep from training"


def test_what_an_alignment_changed_is_shown_before_and_after() -> None:
    s = report.summarise(whole_run())
    (shown,) = [t for t in report.tables(s) if t.title.startswith("Re-alignments")]
    (row,) = shown.rows
    assert row[0] == "after round 1" and row[1] == "384 (50%)"
    assert row[2] == "0.400 → 0.200"  # means over the two blocks
    assert row[3].endswith("→ 0.700") and row[5] == "+5.0 → -2.5"
    first = next(r for r in csv.DictReader(io.StringIO(report.rounds_csv(s))) if r["round"] == "1")
    assert (first["gap_before_alignment"], first["gap_after_alignment"]) == ("0.05", "-0.025")
    assert first["aligned_share"] == "0.5"
