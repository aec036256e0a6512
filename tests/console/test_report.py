"""Reports made from fabricated events."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from runlog import event, made, put, scored, whole_run

from fedpft_console import report
from fedpft_console.lines import lines_for
from fedpft_core.errors import UserError
from server_app.run.record import Record, fold


def sheet(summary: Record, title: str) -> dict[str, list[str]]:
    """Rows of a table by their first cell."""
    found = next(t for t in report.sheets(summary) if t.title == title)
    return {row[0].strip(): row[1:] for row in found.rows}


def test_accuracy_table_has_baselines_rounds_gap_and_standard_error() -> None:
    rows = sheet(fold(whole_run()), "Accuracy")
    assert list(rows) == [
        "linear probe on the FM", "TF-IDF", "undistilled sub-FM, plugged in",
        "FedPFT after round 1 *", "FedPFT after round 2",
    ]  # fmt: skip
    # sqrt(0.6 * 0.4 / 400) = 0.0245; the gap is sub-FM minus plugged-in FM
    assert rows["FedPFT after round 1 *"] == ["60.0 ± 2.4 %", "50.0 ± 2.5 %", "+10.0", "1"]
    assert rows["FedPFT after round 2"][2] == "+20.0"
    assert rows["TF-IDF"] == ["", "50.0 ± 2.5 %", "", ""]


def with_more(*further: dict[str, Any], **more: float) -> list[dict[str, Any]]:
    """The run with further metrics, each a share of the value; `_` in a name stands for `-`."""
    events = whole_run()
    for e in events:
        if e["event"] == "task" and further:
            e["further"] = list(further)
        if e["event"] == "evaluation" or (e["event"] == "baseline" and e["name"] == "tf-idf"):
            e["more"] = {name.replace("_", "-"): share * e["value"] for name, share in more.items()}
    return events


MACRO_F1 = {"name": "macro-F1", "higher_is_better": True, "share": True}
RMSE = {"name": "rmse", "higher_is_better": False, "share": False}


def test_a_further_metric_is_shown_in_its_own_unit_wherever_scores_are() -> None:
    s = fold(with_more(RMSE, MACRO_F1, macro_F1=0.5, rmse=20))
    titles = [t.title for t in report.sheets(s)]
    assert titles[1:4] == ["Accuracy", "Rmse", "Macro-F1"], "in the order of the task"
    # No error and no training loss; reference points that have no value of it are left out.
    (table,) = [t for t in report.sheets(s) if t.title == "Macro-F1"]
    assert table.columns == ["", "sub-FM", "plugged-in FM", "gap"] and not table.notes
    rows = sheet(s, "Macro-F1")
    assert list(rows) == ["TF-IDF", "FedPFT after round 1 *", "FedPFT after round 2"]
    assert rows["TF-IDF"] == ["", "25.0 %", ""]
    assert rows["FedPFT after round 2"] == ["35.0 %", "25.0 %", "+10.0"]
    assert sheet(s, "Rmse")["FedPFT after round 2"] == ["14", "10", "+4"]
    assert [t.notes for t in report.sheets(s) if t.title == "Rmse"] == [["Lower rmse is better."]]
    assert "## Macro-F1" in report.markdown(s)
    lines = list(csv.DictReader(io.StringIO(report.rounds_csv(s))))
    assert [x["proxy_macro_f1"] for x in lines] == ["", "0.3", "0.35"]
    assert [x["fm_rmse"] for x in lines] == ["", "10.0", "10.0"]
    made = json.loads(report.as_json(s))
    assert made["task"]["further"] == [RMSE, MACRO_F1]
    assert made["rounds"][-1]["scores"]["fm"]["more"] == {"macro-F1": 0.25, "rmse": 10.0}
    assert made["rounds"][-1]["proxy_macro_f1"] == 0.35
    e = s.rounds[-1].fm
    assert e and lines_for(e, s) == [
        "round 2: plugged-in FM accuracy 50.0 %, rmse 10, macro-F1 25.0 % (test)"
    ]


def test_a_further_metric_that_the_task_does_not_name_is_shown_as_it_is() -> None:
    """As in a log between two versions."""
    s = fold(with_more(macro_F1=0.5))
    assert sheet(s, "Macro-F1")["FedPFT after round 2"] == ["0.35", "0.25", "+0.1"]
    assert "proxy_macro_f1" in report.rounds_csv(s).splitlines()[0]


def test_a_log_without_further_metrics_has_nothing_of_them() -> None:
    s = fold(whole_run())
    assert [t.title for t in report.sheets(s)][:3] == [
        "Model",
        "Accuracy",
        "Re-alignments, before → after",
    ]
    assert "macro" not in report.rounds_csv(s) + report.as_json(s)


def test_the_head_of_the_csv_is_known_before_the_first_round() -> None:
    events = with_more(MACRO_F1, macro_F1=0.5)
    (task,) = [i for i, e in enumerate(events) if e["event"] == "task"]
    first, *rest = report.rounds_csv(fold(events[: task + 1])).splitlines()
    whole = report.rounds_csv(fold(events)).splitlines()[0]
    assert not rest and whole.startswith(first) and "fm_as_trained_macro_f1" in first


def test_traffic_is_summed_by_kind_and_direction_without_side_runs() -> None:
    rows = sheet(fold(whole_run()), "Traffic")
    assert rows["package"] == ["45.4 MB", "0 B", "45.4 MB"]
    assert rows["adapter"] == ["4.0 kB", "3.0 kB", "7.0 kB"]
    assert rows["all"] == ["45.4 MB", "3.0 kB", "45.4 MB"]


def test_time_memory_and_files_are_listed() -> None:
    s = fold(whole_run())
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
    first = fold(whole_run()).rounds[1]
    assert first.number == 1 and first.alignment and first.alignment.neurons == 384
    assert first.alignment_errors() == pytest.approx((0.4, 0.2))
    assert first.latest("cosine") == 0.7, "after the alignment, not before"


def test_bad_replies_are_named() -> None:
    s = fold(whole_run())
    assert report.show.bad_replies(s) == ["round 2, client 2: refused, shape | of head"]
    assert "shape \\| of head" in report.markdown(s)


ACTIVE = (
    "<img src=x onerror=alert(1)> [x](javascript:alert) ![p](https://evil.example/p.png) `c` *b* "
    "_e_ | # &lt; www.evil.example\n\n## Fake"
)


def test_clients_words_are_shown_in_a_report_and_never_obeyed() -> None:
    from fedpft_console.report.show import _md

    shown = _md(ACTIVE)
    assert "\n" not in shown
    for active in ("<img", " [x](", "![", "https://", "www.", " `c`", " *b*", " _e_", " | "):
        assert active not in shown, active
    assert _md("client_1 took 3 steps, (lr = 0.1)") == "client_1 took 3 steps, (lr = 0.1)"
    record = fold(whole_run())
    record.warnings.append(ACTIVE)
    assert "<img" not in report.markdown(record) and "\n## Fake" not in report.markdown(record)


@pytest.mark.parametrize("cut", range(len(whole_run()) + 1))
def test_any_beginning_of_a_run_can_be_reported(cut: int) -> None:
    s = fold(whole_run()[:cut])
    assert s.state == ("finished" if cut == len(whole_run()) else "running")
    assert report.markdown(s).startswith("# Run report")
    report.rounds_csv(s), report.as_json(s), report.render(s)


def test_a_failed_run_tells_its_reason_and_keeps_its_rounds() -> None:
    events = [*whole_run()[:-1], event(140, "run_failed", reason="round 3: 1 good reply.")]
    s = fold(events)
    assert report.headline(s).startswith("Run failed after 2 of 2 rounds: round 3: 1 good reply.")
    assert len(s.rounds) == 3


def test_a_resumed_run_adds_up_its_parts() -> None:
    events = whole_run()
    second = next(
        i for i, e in enumerate(events) if e["event"] == "round_started" and e["round"] == 2
    )
    late = [e | {"t": e["t"] + 1000} for e in events[second:]]
    again = event(1118, "run_started", run_dir="/r", rounds=2, resumed_from=1, seed=7)
    s = fold([*events[:second], again, *late])
    whole = fold(events)
    assert s.state == "finished" and s.run and s.run.resumed_from == 1
    assert report.rounds_csv(s) == report.rounds_csv(whole)
    first_part = events[second - 1]["t"] - 100
    assert s.seconds == pytest.approx(first_part + (1130 - 1118)), "the pause does not count"


def test_work_beside_the_next_round_is_listed_once() -> None:
    events = whole_run()
    for e in events:
        if e["event"] == "round_finished" and e["round"] == 2:
            e["meanwhile_seconds"] = 2.5
    rows = sheet(fold(events), "Time and memory")
    assert rows["of which scores and re-alignment meanwhile"] == ["2.5 s"]
    assert "of which re-alignment" not in rows


def test_csv_has_numbers_and_empty_cells() -> None:
    rows = list(csv.DictReader(io.StringIO(report.rounds_csv(fold(whole_run())))))
    assert [r["round"] for r in rows] == ["0", "1", "2"]
    assert float(rows[1]["proxy_value"]) == 0.6
    assert float(rows[1]["proxy_standard_error"]) == pytest.approx(math.sqrt(0.6 * 0.4 / 400))
    assert rows[0]["fm_value"] == "" and rows[2]["aligned_neurons"] == ""
    assert rows[1]["down_package_bytes"] == "45400000" and rows[2]["down_package_bytes"] == "0"


def test_json_is_strict_even_with_nan() -> None:
    events = whole_run()
    for e in events:
        if e["event"] == "round_finished":
            e["loss"] = math.nan

    def refuse(name: str) -> None:
        raise AssertionError(name)

    made = json.loads(report.as_json(fold(events)), parse_constant=refuse)
    assert made["rounds"][1]["loss"] is None
    assert made["rounds"][1]["gap"] == pytest.approx(0.1)
    assert made["bytes"]["up"]["adapter"] == 3000


def test_write_makes_all_files_whole_and_none_else(tmp_path: Path) -> None:
    put(tmp_path, whole_run())
    s = report.write(tmp_path)
    names = {
        "events.jsonl", "report.md", "rounds.csv", "summary.json", "plot.png", "report.html",
    }  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == names
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert s.files["plot"] == str(tmp_path / "plot.png")
    before = (tmp_path / "rounds.csv").read_bytes()
    report.write(tmp_path)
    assert (tmp_path / "rounds.csv").read_bytes() == before


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
    found = report.read(tmp_path)
    assert found.run and found.seconds == 1.0, "the two lines before it"


def test_a_folder_without_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no events\.jsonl"):
        report.write(tmp_path)


def test_what_clients_found_on_rows_of_their_own_is_shown() -> None:
    found = event(118, "client_validation", round=0, **scored(0.25, 20), clients=2)
    s = fold([*whole_run(), found])
    before = next(r for r in s.rounds if r.number == 0)
    assert before.clients and (before.clients.value, before.clients.rows) == (0.25, 20)
    (shown,) = [t for t in report.sheets(s) if t.title == "Accuracy"]
    assert shown.columns[-1] == "sub-FM at clients"
    rows = {row[0]: row[-1] for row in shown.rows}
    assert rows["FedPFT before round 1"] == "25.0 ± 9.7 %"
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    first = next(csv.DictReader(io.StringIO(report.rounds_csv(s))))
    assert first["clients_rows"] == "20"
    # Where nobody keeps rows, there is no such column.
    (plain,) = [t for t in report.sheets(fold(whole_run())) if t.title == "Accuracy"]
    assert plain.columns[-1] == "training loss"
    (line,) = lines_for(made("client_validation", **found), Record())
    assert line == "round 0: sub-FM accuracy 25.0 % on 20 rows that 2 clients keep from training"


def test_what_an_alignment_changed_is_shown_before_and_after() -> None:
    s = fold(whole_run())
    (shown,) = [t for t in report.sheets(s) if t.title.startswith("Re-alignments")]
    (row,) = shown.rows
    assert row[0] == "after round 1" and row[1] == "384 (50%)"
    assert row[2] == "0.400 → 0.200"  # means over the two blocks
    assert row[3].endswith("→ 0.700")
    # The sub-FM's own score, since the FM's head is another here than in the table of scores.
    assert row[5] == "60.0 % → 52.5 %"
    first = next(r for r in csv.DictReader(io.StringIO(report.rounds_csv(s))) if r["round"] == "1")
    assert (first["gap_before_alignment"], first["gap_after_alignment"]) == ("0.05", "-0.025")
    assert first["aligned_share"] == "0.5"


# ---------------------------------------------------------------- a metric that is no accuracy


def perplexity() -> list[dict[str, Any]]:
    """The same run, of a task whose scores are no shares and the lower the better."""
    out = []
    for line in whole_run():
        if line["event"] == "task":
            line |= {"metric": "perplexity", "higher_is_better": False, "share": False}
        if "value" in line:
            line |= {"metric": "perplexity", "value": 10 * line["value"], "error": 0.25}
        out.append(line)
    return out


def test_a_metric_that_is_no_share_is_shown_by_its_own_name_and_unit() -> None:
    s = fold(perplexity())
    rows = sheet(s, "Perplexity")
    assert rows["FedPFT after round 1 *"] == ["6 ± 0.25", "5 ± 0.25", "+1", "1"]
    (table,) = [t for t in report.sheets(s) if t.title == "Perplexity"]
    assert "Lower perplexity is better." in table.notes
    assert "Plug-in gap: sub-FM minus plugged-in FM." in table.notes
    text = report.markdown(s)
    assert "plugged-in FM perplexity 5 after round 2" in text
    assert "ccuracy" not in text and "ccuracy" not in report.rounds_csv(s) + report.as_json(s)


def test_an_error_that_is_not_known_is_not_made_up() -> None:
    lines = [{k: v for k, v in line.items() if k != "error"} for line in whole_run()]
    rows = sheet(fold(lines), "Accuracy")
    assert rows["FedPFT after round 1 *"] == ["60.0 %", "50.0 %", "+10.0", "1"]
    assert "standard error" not in report.markdown(fold(lines))


def test_a_run_of_before_metrics_had_names_reads_the_same() -> None:
    old = []
    for line in whole_run():
        gone = ("metric", "value", "error", "higher_is_better", "share")
        older = {k: v for k, v in line.items() if k not in gone or line["event"] == "alignment"}
        old.append(older | ({"accuracy": line["value"]} if "value" in line else {}))
    assert any("accuracy" in line for line in old)
    for make in (report.markdown, report.rounds_csv, report.as_json):
        assert make(fold(old)) == make(fold(whole_run()))


def test_what_models_wrote_is_shown_side_by_side_and_as_it_is() -> None:
    """Control characters, markup and tables in a response come through as text alone."""
    odd = "\x1b[31m<script>alert(1)</script> | [x](http://y) `a` ![z](w)\n# big *loud*\u202e"
    events = whole_run()
    wrote = {
        "proxy": ["a long answer " * 40, "same"],
        "fm": [odd, "same"],
    }
    for model, responses in wrote.items():
        for round_, first in ((1, "old"), (2, None)):
            samples = [
                {"prompt": f"p {i}", "reference": "r", "response": first or text}
                for i, text in enumerate(responses)
            ]
            events.insert(
                -1, event(90.0, "samples", round=round_, model=model, samples=samples, seconds=1.0)
            )
    record = fold(events)
    (table,) = [t for t in report.sheets(record) if t.title == "Samples"]
    assert table.columns == ["prompt", "reference", "sub-FM", "plugged-in FM"]
    assert table.rows[1] == ["p 1", "r", "same", "same"]
    assert table.notes == ["Written after round 2."]
    long, shown = table.rows[0][2:]
    assert len(long) == 240 and long.endswith("\u2026")
    assert shown.isprintable() and "\n" not in shown and shown.startswith("?[31m<script>")
    text = report.markdown(record)
    assert all(c.isprintable() or c == "\n" for c in text)
    line = next(x for x in text.splitlines() if "alert" in x)
    assert "<" not in line and "&lt;script&gt;" in line
    assert "\\|" in line and line.count("|") - line.count("\\|") == 5
    for markup in ("[x](", "`a`", "![z]", "*loud*"):
        assert markup not in line
    for console in report.render(record):
        assert console.title is not None


def test_a_run_that_wrote_nothing_has_no_samples() -> None:
    assert not [t for t in report.sheets(fold(whole_run())) if t.title == "Samples"]
