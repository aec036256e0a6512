"""Tables, plots and the report, from made-up cells whose figures are known."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpft_console import compare
from fedpft_console.compare import gap, lines, page, plots, table_csv, tables
from fedpft_console.web import drawing

FULL = {"plan": {"proxy": "full"}, "align": {"interval": 0}, "distill": {"method": "none"}}
FM = {  # plugged-in accuracy by method, dataset and seed
    ("fedpft", "easy"): {0: 0.80, 1: 0.84, 2: 0.82},
    ("fedpft", "hard"): {0: 0.50, 1: 0.52, 2: 0.54},
    ("fedpetuning", "easy"): {0: 0.81, 1: 0.86, 2: 0.83},
    ("fedpetuning", "hard"): {0: 0.56, 1: 0.56, 2: 0.56},
}


def grid(folder: Path, **change: Any) -> compare.Experiment:
    tree = {
        "methods": {"fedpft": {}, "fedpetuning": FULL},
        "datasets": {"easy": {}, "hard": {"data": {"max-length": 32}}},
        "seeds": [0, 1, 2],
        "learning-rates": [0.001, 0.01],
        "targets": {"easy": 0.6},
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree | change, sort_keys=False))
    return compare.read(path)


def row(cell: compare.Cell, fm: float, **more: Any) -> dict[str, Any]:
    gap = 0.0 if cell.method == "fedpetuning" else 0.01 * (cell.seed + 1)
    return {
        "digest": cell.digest(), "method": cell.method, "dataset": cell.dataset,
        "seed": cell.seed, "lr": cell.lr, "config": cell.resolved, "seconds": 100.0,
        "fm_test": fm, "proxy_test": fm + gap, "fm_validation": 0.5 + cell.lr,
        "baselines": {"linear-probe": 0.4}, "bytes": {"adapter": 2_000_000, "package": 8_000_000},
    } | more  # fmt: skip


def cells(experiment: compare.Experiment, **more: Any) -> list[dict[str, Any]]:
    """All cells; those at the worse rate would spoil every figure if they were taken."""
    out = []
    for point in experiment.points():
        for seed, fm in FM[point.method, point.dataset].items():
            out.append(row(experiment.cell(point, seed, 0.01), fm, **more))
        out.append(row(experiment.cell(point, 0, 0.001), 0.01, **more))
    return out


def read_table(text: str, title: str) -> list[dict[str, str]]:
    """A table of table.md as one mapping per line."""
    body = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    head, _, *lines = [[c.strip() for c in line.strip("|").split("|")] for line in body]
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_paired_difference_is_the_t_interval() -> None:
    mean, half = lines.paired([3.0, 5.0, 7.0], [1.0, 4.0, 4.0])
    assert mean == 2.0
    # Differences 2, 1, 3: standard deviation 1, t(0.975, 2) = 4.302652729911275.
    assert math.isclose(half, 4.302652729911275 / math.sqrt(3))
    assert math.isnan(lines.paired([1.0], [0.0])[1])


def test_accuracy_table(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    text = tables.markdown(experiment, cells(experiment))
    found = {(r["dataset"], r["method"]): r for r in read_table(text, "Accuracy")}
    assert list(found) == [
        ("easy", "fedpft"), ("easy", "fedpetuning"), ("easy", "linear probe on the FM"),
        ("hard", "fedpft"), ("hard", "fedpetuning"), ("hard", "linear probe on the FM"),
    ]  # fmt: skip
    line = found["easy", "fedpft"]
    assert line["plugged-in FM"] == "82.0 ± 2.0 (80.0, 84.0, 82.0)"
    assert line["worst seed"] == "80.0" and line["n"] == "3" and line["gap"] == "+2.0"
    assert line["sub-FM"] == "84.0 ± 2.6 (81.0, 86.0, 85.0)"
    # Differences -1, -2, -1.
    half = 4.302652729911275 * statistics.stdev([1, 2, 1]) / math.sqrt(3)
    assert line["difference to fedpetuning (95% interval)"] == f"-1.3 ± {half:.1f}"
    assert line["worst difference"] == "-2.0"
    assert line["lr"] == "0.01\\*" and "a better one may lie outside" in text
    average = {r["method"]: r for r in read_table(text, "Average over data sets")}
    # By seed: -3.5, -3, -1.5.
    half = 4.302652729911275 * statistics.stdev([3.5, 3, 1.5]) / math.sqrt(3)
    assert average["fedpft"]["difference to fedpetuning (95% interval)"] == f"-2.7 ± {half:.1f}"
    assert average["fedpft"]["worst difference"] == "-6.0"


def test_methods_by_data_set(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    text = tables.markdown(experiment, cells(experiment))
    found = {r["method"]: r for r in read_table(text, "Methods by data set")}
    assert list(found) == ["fedpft", "fedpetuning", "linear probe on the FM"]
    assert found["fedpft"]["easy"] == "82.0 ± 2.0"
    assert found["linear probe on the FM"]["hard"] == "40.0 ± 0.0"
    # A second row for what was measured before the head was refitted.
    both = [
        r | ({"fm-as-trained_test": 0.5} if r["method"] == "fedpft" else {})
        for r in cells(experiment)
    ]
    found = read_table(tables.markdown(experiment, both), "Methods by data set")
    assert [(r["method"], r[""]) for r in found][:2] == [
        ("fedpft", ""),
        ("fedpft", "head as trained"),
    ]
    assert found[1]["hard"] == "50.0 ± 0.0"
    one = grid(tmp_path, datasets={"easy": {}}, targets={})
    assert "Methods by" not in tables.markdown(one, cells(experiment))


def test_rates_are_shown_with_the_one_chosen(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    line = read_table(tables.markdown(experiment, cells(experiment)), "Choice of the learning rate")
    assert [(r["lr 0.001"], r["lr 0.01"]) for r in line] == [("50.1", "51.0 ✓")] * 4


def test_each_partition_has_its_own_rates(tmp_path: Path) -> None:
    experiment = grid(
        tmp_path,
        datasets={"easy": {}},
        partitions={"iid": {"federation.partition": "iid"}, "skewed": {}},
        **{"learning-rates": {"iid": [0.01, 0.02], "skewed": [0.001, 0.01]}},
    )
    made = [
        row(cell, 0.5) | {"partition": cell.partition}
        for point in experiment.points()
        for cell in experiment.first(point)
    ]
    text = tables.markdown(experiment, made)
    names = ("partition", "lr 0.001", "lr 0.01", "lr 0.02")
    line = [tuple(r[k] for k in names) for r in read_table(text, "Choice of the learning rate")]
    assert line == [("iid", "", "51.0", "52.0 ✓")] * 2 + [("skewed", "50.1", "51.0 ✓", "")] * 2
    assert "not run" in text  # the other seeds
    # 0.01 is the highest of one grid and the lowest of the other, which did not choose it.
    assert {r["lr"] for r in read_table(text, "Accuracy") if r["lr"]} == {"0.02\\*", "0.01\\*"}


def test_each_dataset_has_its_own_rates(tmp_path: Path) -> None:
    experiment = grid(tmp_path, **{"learning-rates": {"easy": [0.01, 0.02], "hard": [0.001]}})
    tried = {p.dataset: [c.lr for c in experiment.first(p)] for p in experiment.points()}
    assert tried == {"easy": [0.01, 0.02], "hard": [0.001]}


def test_rows_of_older_versions_and_partial_grids_are_coped_with(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    old = [
        {k: v for k, v in r.items() if k not in ("bytes", "seconds", "baselines")}
        for r in cells(experiment)
    ]
    text = tables.markdown(experiment, old)
    assert "## Cost" not in text and "## Agreement" not in text and "linear probe" not in text
    assert not plots.panels(experiment, old)
    assert "<svg" not in page.html(experiment, old)
    part = [r for r in cells(experiment) if r["method"] == "fedpft" and r["seed"] != 2]
    text = tables.markdown(experiment, part)
    assert "difference" not in text.split("\n\n")[4]
    missing = read_table(text, "Cells without a result")
    assert {r["why"] for r in missing} == {"not run"}
    # One seed of each fedpft line, and of fedpetuning both rates, on two data sets.
    assert len(missing) == 2 * (1 + 2)
    assert tables.markdown(experiment, []) and page.html(experiment, [])


def test_a_failed_cell_is_listed_with_its_reason(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    rows = cells(experiment)
    bad = {k: rows[2][k] for k in ("digest", "method", "dataset", "seed", "lr", "config")}
    rows[2] = bad | {"failed": "it\ndiverged | lower distill.lr"}
    (line,) = tables.sheets(experiment, rows)[-1].rows
    assert line == ["easy fedpft seed 2 lr 0.01", "it diverged | lower distill.lr"]
    assert "diverged \\| lower" in tables.markdown(experiment, rows)


def test_rounds_to_the_target() -> None:
    curve = {"curve": [[0, 0.1, 0.1], [1, 0.9, 0.5], [2, 0.9, None], [3, 0.9, 0.7], [4, 0, 0.6]]}
    assert lines.rounds_to(curve, 0.6) == 3
    assert lines.rounds_to(curve, 0.71) == math.inf
    assert lines.rounds_to(curve, None) is None and lines.rounds_to({}, 0.5) is None


def test_targets_count_runs_that_reached_them(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    rows = cells(experiment, curve=[[0, 0.2, 0.2], [2, 0.7, 0.7]])
    found = read_table(tables.markdown(experiment, rows), "Cost")
    by = {(r["dataset"], r["method"]): r["rounds to target"] for r in found}
    assert by["easy", "fedpft"] == "2.0" and by["hard", "fedpft"] == ""
    rows[0] = rows[0] | {"curve": [[2, 0.5, 0.5]]}
    found = read_table(tables.markdown(experiment, rows), "Cost")
    assert found[0]["rounds to target"] == "2 of 3 runs"


def test_validation_rows_are_said_to_be_that(tmp_path: Path) -> None:
    experiment = grid(tmp_path, base={"run": {"eval-split": "validation"}})
    rows = []
    for r in cells(experiment):
        value = {"proxy_validation": r["proxy_test"], "fm_validation": r["fm_test"]}
        rows.append({k: v for k, v in r.items() if not k.endswith("_test")} | value)
    text = tables.markdown(experiment, rows)
    assert "Accuracy on validation rows" in text and "82.0 ± 2.0" in text


def test_grid_points_are_compared_with_the_reference_at_their_point(tmp_path: Path) -> None:
    experiment = grid(tmp_path, grid={"lora.rank": [4, 8]}, targets={})
    value = {("fedpft", 4): 0.6, ("fedpft", 8): 0.7, ("fedpetuning", 4): 0.8, ("fedpetuning", 8): 1}
    rows = [
        row(experiment.cell(p, s, lr), value[p.method, p.grid[0][1]])
        for p in experiment.points() for s in (0, 1, 2) for lr in (0.001, 0.01)
    ]  # fmt: skip
    found = read_table(tables.markdown(experiment, rows), "Accuracy")
    diffs = {
        (r["method"], r["lora.rank"]): r["difference to fedpetuning (95% interval)"] for r in found
    }
    assert diffs["fedpft", "4"] == "-20.0 ± 0.0" and diffs["fedpft", "8"] == "-30.0 ± 0.0"


def test_csv_has_the_same_figures(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    rows = cells(experiment)
    found = list(csv.DictReader(io.StringIO(table_csv.text(experiment, rows))))
    first = found[0]
    assert (first["dataset"], first["method"], first["seeds"]) == ("easy", "fedpft", "0 1 2")
    assert [float(first[k]) for k in ("fm", "fm_std", "fm_min")] == pytest.approx([82, 2, 80])
    assert float(first["difference"]) == pytest.approx(-4 / 3, rel=1e-5)
    assert float(first["mb"]) == 10 and float(first["mb_package"]) == 8
    assert first["cosine_end"] == ""


def test_how_far_backdoors_got_is_a_table_where_there_are_any(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    rows = cells(experiment)
    assert "## Backdoor" not in tables.markdown(experiment, rows)
    assert "backdoor" not in table_csv.text(experiment, rows).splitlines()[0]
    some = [
        r | {"backdoor": 0.25 * (r["seed"] + 1), "backdoor_before": 0.125}
        if (r["method"], r["dataset"]) == ("fedpft", "hard")
        else r
        for r in rows
    ]
    (line,) = read_table(tables.markdown(experiment, some), "Backdoor")
    assert line["with the trigger %"] == "50.0" and line["without %"] == "12.5"
    found = list(csv.DictReader(io.StringIO(table_csv.text(experiment, some))))
    shares = {(r["method"], r["dataset"]): r["backdoor"] for r in found if r["backdoor"]}
    assert shares == {("fedpft", "hard"): "50"}


def test_what_goes_with_the_gap_is_a_table(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    # cells() makes the gap grow with the seed: 1, 2, 3 points. Let the norm do so, too.
    made = [r | {"adapter_norm": 5.0 + r["seed"]} for r in cells(experiment)]
    found = read_table(tables.markdown(experiment, made), "What goes with the plug-in gap")
    # On each data set three seeds of fedpft and the worse rate; fedpetuning has no gap to predict.
    assert [(r["where"], r["n"], r["ρ"]) for r in found] == [
        ("all", "8", "+1.00"), ("easy", "4", "+1.00"), ("hard", "4", "+1.00")
    ]  # fmt: skip
    assert {r["figure"] for r in found} == {"adapter norm (L2, at the end)"}
    # The gap is that of the head as trained where the head was refitted.
    turned = [r | {"fm-as-trained_test": r["proxy_test"] + 0.1 * r["seed"]} for r in made]
    found = read_table(tables.markdown(experiment, turned), "What goes with the plug-in gap")
    assert {r["ρ"] for r in found} == {"-1.00"}
    assert "What goes" not in tables.markdown(experiment, cells(experiment))


def test_correlation_is_spearmans() -> None:
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: rho = 1 - 6 * 4 / (5 * 24).
    found = gap.correlation([1, 2, 3, 4, 5], [20, 10, 40, 30, 1e9])
    assert found is not None and found[0] == pytest.approx(0.8)
    assert gap.correlation([1, 2, 3], [1, 2, 3]) is None
    assert gap.correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_gap_plot_takes_every_run_with_a_sub_fm(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    rows = cells(experiment, cosine_end=0.5)
    for i, r in enumerate(rows):
        r["cosine_end"] = 0.9 - r["proxy_test"] + r["fm_test"] + i * 1e-9
    (panel,) = (p for p in plots.panels(experiment, rows) if "predict" in p.group)
    # Three seeds and the other rate, on two data sets; the FM at the clients has no gap.
    assert "all (n = 8)" in panel.caption and "easy (n = 4)" in panel.caption
    assert panel.labels == ("fedpft",)


class Links(HTMLParser):
    """Collects tags and everything that could lead outside."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action") and value:
                self.outside += [] if value.startswith("#") else [value]


def test_the_report_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two marks are no scatter plot: three methods make one of traffic.
    methods = {"fedpft": {}, "fedpft-b": {"align.interval": 0}, "fedpetuning": FULL}
    experiment = grid(tmp_path, methods=methods)
    for dataset in ("easy", "hard"):
        monkeypatch.setitem(FM, ("fedpft-b", dataset), FM["fedpft", dataset])
    rows = cells(experiment, cosine_end=0.5, curve=[[0, 0.2, 0.2], [2, 0.7, 0.7]])
    text = page.html(experiment, rows)
    seen = Links()
    seen.feed(text)
    assert not seen.outside
    assert {"script", "link", "iframe", "img"}.isdisjoint(seen.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert seen.tags.count("svg") == len(plots.panels(experiment, rows)) >= 4
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    # The plots' own colours are gone: they would not be legible on dark.
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S)).lower()
    assert not any(c.lower() in drawn for c in (*drawing.COLOURS, drawing.INK))
    assert "var(--c0)" in drawn and "currentcolor" in drawn
    assert len(drawing.DARK) == len(drawing.COLOURS)
    assert text == page.html(experiment, rows)  # equal cells, equal bytes


def test_names_are_escaped(tmp_path: Path) -> None:
    experiment = grid(tmp_path, datasets={"<b>&": {}}, targets={})
    rows = [
        row(experiment.cell(p, s, lr), 0.5)
        for p in experiment.points() for s in (0, 1, 2) for lr in (0.001, 0.01)
    ]  # fmt: skip
    text = page.html(experiment, rows)
    assert "<b>" not in text and "&lt;b&gt;&amp;" in text


# ---------------------------------------------------------------- a metric that is no accuracy

RMSE = {"name": "rmse", "higher_is_better": False, "share": False}


def turned(experiment: compare.Experiment, **more: Any) -> list[dict[str, Any]]:
    """The same cells with errors instead of accuracies."""
    out = []
    for r in cells(experiment, **more):
        values = {k: 1 - r[k] for k in ("fm_test", "proxy_test", "fm_validation")}
        out.append(r | values | {"metric": RMSE, "baselines": {"mean": 0.6}})
    return out


def test_lower_is_better_decides_rates_worst_seeds_and_findings(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    made = turned(experiment)
    text = tables.markdown(experiment, made)
    found = {(r["dataset"], r["method"]): r for r in read_table(text, "Rmse")}
    line = found["easy", "fedpft"]
    assert line["lr"] == "0.01\\*", "the rate with the lower error"
    assert line["plugged-in FM"] == "0.18 ± 0.02 (0.2, 0.16, 0.18)"
    assert line["worst seed"] == "0.2" and line["gap"] == "-0.02"
    assert line["worst difference"] == "+0.02"
    assert found["easy", "mean"]["plugged-in FM"].startswith("0.6 ± 0")
    assert "Rmse on test rows (lower is better): mean" in text and "points" not in text
    page_text = page.html(grid(tmp_path, datasets={"easy": {}}), made)
    assert "behind fedpetuning" in page_text and "ahead" not in page_text
    assert "ccuracy" not in text + page_text


def test_the_target_of_an_error_is_reached_from_above() -> None:
    curve = {"metric": RMSE, "curve": [[1, 0.9, 0.9], [2, 0.9, 0.6], [3, 0.9, 0.4]]}
    assert lines.rounds_to(curve, 0.6) == 2 and lines.rounds_to(curve, 0.3) == math.inf


def test_values_of_different_metrics_are_not_averaged(tmp_path: Path) -> None:
    experiment = grid(tmp_path)
    mixed = [r for r in cells(experiment) if r["dataset"] == "easy"]
    mixed += [r for r in turned(experiment) if r["dataset"] == "hard"]
    text = tables.markdown(experiment, mixed)
    assert "## Scores" in text and "Average over" not in text
    assert "accuracy in points (easy), rmse (hard)" in text
    assert page.html(experiment, mixed)


def test_cells_of_before_metrics_had_names_are_read(tmp_path: Path) -> None:
    import json

    experiment = grid(tmp_path)
    old = [
        {k: v for k, v in r.items() if k != "baselines"} | {"linear-probe": 0.4}
        for r in cells(experiment)
    ]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    assert compare.Results(tmp_path).rows == cells(experiment)
