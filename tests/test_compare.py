"""The grid runner: cells are reused, chosen on validation, and failures are recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny

from fedpft_core import compare
from fedpft_core.cli import main
from fedpft_core.errors import UserError


def experiment(folder: Path, **change: object) -> Path:
    import yaml

    tiny.folder("bert", folder / "fm")
    tiny.write_csv(folder / "train.csv", tiny.sentences(60, 0))
    tiny.write_csv(folder / "test.csv", tiny.sentences(20, 1))
    (folder / "public.txt").write_text("\n".join(t for t, _ in tiny.sentences(40, 2)))
    tree = {
        "base": {
            "model": {"name": str(folder / "fm")},
            "data": {
                "train": str(folder / "train.csv"),
                "test": str(folder / "test.csv"),
                "public": str(folder / "public.txt"),
                "max-length": 16,
            },
            "distill": {"steps": 2, "length": 16, "batch-size": 4},
            "align": {"interval": 1, "steps": 1},
            "lora": {"rank": 2},
            "federation": {"rounds": 2, "clients": 2, "clients-per-round": 2},
            "train": {"local-steps": 2},
            "run": {"undistilled": False, "baselines": False, "evaluate-every": 10},
        },
        "methods": {"fedpft": None, "fedpetuning": {"plan": {"proxy": "full"}}},
        "datasets": {"words": None},
        "seeds": [0, 1],
        "learning-rates": [0.001, 0.01],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree | change, sort_keys=False), encoding="utf-8")
    return path


def test_grid_runs_once_and_is_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = experiment(tmp_path)
    assert main(["compare", str(path)]) == 0
    cells = (tmp_path / "grid" / "cells.jsonl").read_text()
    rows = [json.loads(line) for line in cells.splitlines()]
    # Two rates at the first seed, the better one at the second, for each method.
    assert [(r["method"], r["seed"]) for r in rows] == [
        (m, s) for m in ("fedpft", "fedpetuning") for s in (0, 0, 1)
    ]
    for method in ("fedpft", "fedpetuning"):
        first, second, third = (r for r in rows if r["method"] == method)
        assert third["lr"] == compare.best_rate([first, second])
        assert {"fm_test", "proxy_test", "fm_validation", "bytes"} <= third.keys()
    full = [r for r in rows if r["method"] == "fedpetuning"]
    assert all(r["fm_test"] == r["proxy_test"] for r in full)  # clients held the FM itself
    table = capsys.readouterr().out
    assert main(["compare", str(path), "--table"]) == 0
    assert capsys.readouterr().out == table[table.index("| dataset") :]
    assert main(["compare", str(path)]) == 0
    assert (tmp_path / "grid" / "cells.jsonl").read_text() == cells


def test_a_changed_setting_is_another_cell(tmp_path: Path) -> None:
    read = compare.Experiment.read(experiment(tmp_path))
    cell = read.cell("fedpft", "words", 0, 0.001)
    assert cell.digest() == read.cell("fedpft", "words", 0, 0.001).digest()
    assert cell.digest() != read.cell("fedpft", "words", 0, 0.01).digest()
    assert cell.digest() != read.cell("fedpft", "words", 1, 0.001).digest()


def test_cells_are_found_by_configuration_across_new_keys(tmp_path: Path) -> None:
    cell = compare.Experiment.read(experiment(tmp_path)).cell("fedpft", "words", 0, 0.001)
    row = {"config": dict(cell.resolved)}
    assert cell.find([row]) is row
    # Written before `align.selection` existed: it counts as having the default, and no other.
    del row["config"]["align.selection"]
    assert cell.find([row]) is row
    other = compare.Cell("fedpft", "words", 0, 0.001, cell.flat | {"align.selection": "random"})
    assert other.find([row]) is None
    # Written when a key existed that is gone now, or with another value, or by a failed run.
    for change in ({"config": row["config"] | {"align.gone": 1}}, {"failed": "no"}):
        assert cell.find([row | change]) is None
    assert cell.find([{"config": row["config"] | {"lora.rank": 3}}]) is None


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = experiment(
        tmp_path,
        methods={"bad": {"plan": {"keep-neurons": 10_000}}, "fedpft": None},
        seeds=[0],
        **{"learning-rates": [0.001]},
    )
    assert main(["compare", str(path)]) == 1
    rows = list(compare.results(tmp_path / "grid"))
    assert "plan.keep-neurons" in rows[0]["failed"]
    assert "fm_test" in rows[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {a: }", "needs `methods` and `datasets`"),
        ("methods: {a: }\ndatasets: {b: }\nseed: 1", "no such key 'seed'"),
        ("methods: [", "not valid YAML"),
    ],
)
def test_bad_experiment_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        compare.Experiment.read(path)
    with pytest.raises(UserError, match="no such experiment file"):
        compare.Experiment.read(tmp_path / "none.yaml")


def test_paired_difference_is_the_t_interval() -> None:
    mean, half = compare.paired([3.0, 5.0, 7.0], [1.0, 4.0, 4.0])
    assert mean == 2.0
    # Differences 2, 1, 3: standard deviation 1, t(0.975, 2) = 4.302652729911275.
    assert math.isclose(half, 4.302652729911275 / math.sqrt(3))
    assert math.isnan(compare.paired([1.0], [0.0])[1])
