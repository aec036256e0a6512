"""The grid runner: cells are reused, chosen on validation, and failures are recorded."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from fedpft_console import compare
from fedpft_console.cli import main
from fedpft_console.compare import command, page, plots
from fedpft_console.compare import run as runner
from fedpft_core.errors import UserError
from fedpft_core.proxy.build import build

FULL = {"plan": {"proxy": "full"}, "align": {"interval": 0}, "distill": {"method": "none"}}


def experiment(folder: Path, **change: object) -> Path:
    """A grid of tiny runs; keys in `change` replace those of the file, `-` written as `_`."""
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
            "run": {"undistilled": False, "baselines": False, "evaluate-every": 1, "threads": 1},
        },
        "methods": {"fedpft": None, "fedpetuning": FULL},
        "datasets": {"words": None},
        "seeds": [0, 1],
        "learning-rates": [0.001, 0.01],
    }
    path = folder / "grid.yaml"
    merged = tree | {k.replace("_", "-"): v for k, v in change.items()}
    path.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    return path


def read(path: Path) -> compare.Experiment:
    return compare.read(path)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def ran(folder: Path) -> list[tuple[str, int, float]]:
    return [(r["method"], r["seed"], r["lr"]) for r in rows(folder)]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[compare.Cell]:
    """Cells are not run: their accuracy is made up from their seed and rate. Returns those run."""
    done: list[compare.Cell] = []

    def cell(cell: compare.Cell, folder: Path, cache: Path, watch: object) -> dict[str, Any]:
        done.append(cell)
        figures = {"fm_test": 0.5 + cell.lr + cell.seed / 100, "proxy_test": 0.5}
        return figures | {"fm_validation": cell.lr, "bytes": {"adapter": 10}}

    monkeypatch.setattr(runner, "run_cell", cell)
    # Tables are what these tests look at; drawing would take most of their time.
    monkeypatch.setattr(plots, "files", lambda *_: {})
    monkeypatch.setattr(page, "html", lambda *_: "")
    return done


# ---------------------------------------------------------------- whole runs


def test_grid_runs_once_and_is_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = experiment(tmp_path)
    folder = tmp_path / "grid"
    assert main(["compare", str(path)]) == 0
    table = capsys.readouterr().out
    # Two rates at the first seed, the better one at the second, for each method.
    made = rows(folder)
    assert [(r["method"], r["seed"]) for r in made] == [
        ("fedpft", 0), ("fedpft", 0), ("fedpetuning", 0), ("fedpetuning", 0),
        ("fedpft", 1), ("fedpetuning", 1),
    ]  # fmt: skip
    for method in ("fedpft", "fedpetuning"):
        first, second, third = (r for r in made if r["method"] == method)
        assert third["lr"] == compare.best_rate([first, second])
    for row in made:
        check_record(row)
    fedpft = [r for r in made if r["method"] == "fedpft"]
    assert ["distil_cached" in r for r in fedpft] == [False, True, False]
    assert fedpft[0]["output_error"] == fedpft[1]["output_error"]

    text = (folder / "table.md").read_text()
    assert text in table
    cells = (folder / "cells.jsonl").read_bytes()
    files = {"table.md", "table.csv", "report.html", "rounds.png", "rounds.svg"}
    assert files <= {p.name for p in folder.iterdir()}
    assert main(["compare", str(path), "--table"]) == 0
    assert capsys.readouterr().out == text
    assert main(["compare", str(path)]) == 0
    assert (folder / "cells.jsonl").read_bytes() == cells
    assert main(["compare", "--check", str(path)]) == 0


def check_record(row: dict[str, Any]) -> None:
    """Everything a cell has to record, against what else is known of the run."""
    config = row["config"]
    rounds = config["federation.rounds"]
    full = row["method"] == "fedpetuning"
    assert [entry[0] for entry in row["curve"]] == list(range(rounds + 1))
    assert row["curve"][-1][1:] == pytest.approx([row["proxy_test"], row["fm_test"]], rel=1e-4)
    assert [n for n, _ in row["norms"]] == [1, 2]
    assert row["norms"][-1][1] == pytest.approx(row["adapter_norm"], rel=1e-4)
    # Both clients train in both rounds.
    assert row["client_steps"] == rounds * 2 * config["train.local-steps"]
    assert row["step_seconds"] == pytest.approx(row["client_seconds"] / row["client_steps"])
    assert 2 < row["tokens_per_row"] <= 16
    assert row["client_flops"] > 0
    both = {k: row["bytes_down"].get(k, 0) + row["bytes_up"].get(k, 0) for k in row["bytes"]}
    assert both == row["bytes"]
    assert row["peak_bytes"] > 1e7
    assert row["device"] in ("cpu", "cuda") or "NVIDIA" in row["device"]
    assert len(json.dumps(row)) < 8000
    if full:
        assert row["proxy_parameters"] == row["fm_parameters"]
        assert [a for _, a, b in row["curve"]] == [b for _, a, b in row["curve"]]
        assert "agreement" not in row and "distil_seconds" not in row
        return
    assert row["proxy_parameters"] < row["fm_parameters"]
    assert row["output_error"] < row["output_error_before"]
    moments = [(a["round"], a["when"]) for a in row["agreement"]]
    assert moments == [(0, "start"), (1, "before-align"), (1, "after-align"), (2, "end")]
    assert [a["round"] for a in row["alignments"]] == [1]
    assert row["alignments"][0]["seconds"] > 0 and row["alignments"][0]["error_after"] > 0


def test_client_flops_are_those_of_the_steps(tmp_path: Path) -> None:
    """Against a sum over the batches clients trained on, written out."""
    from client_app.process import ProcessCache
    from fedpft_console.compare.record import summary
    from fedpft_core import config as configs
    from fedpft_core.model.families import family_of
    from fedpft_core.proxy.cost import block_cost
    from server_app.run.record import fold

    flat = tiny.write_task("bert", tmp_path)
    flat |= {"train.local-steps": 0, "train.local-epochs": 1, "federation.rounds": 1}
    cache = ProcessCache()
    federation = tiny.Federation(flat)
    federation.caches = dict.fromkeys(range(flat["federation.clients"]), cache)
    events = tiny.run(flat, tmp_path / "run", federation)
    config = configs.from_flat(flat)
    lengths = [n for held in cache.rows.values() for n in held.train.lengths]
    found = summary(fold(events), config.train.batch_size, sum(lengths) / len(lengths))

    proxy = next(iter(cache.models.values())).model.model.get_base_model()
    plain = tiny.pair("bert")[1]  # only to name the family
    family = family_of(plain.config.model_type)
    replies = [e for e in events if e["event"] == "reply"]
    assert sum(r["examples"] for r in replies) == len(lengths)  # one epoch each
    width, rank = proxy.config.hidden_size, config.lora.rank
    mean = sum(lengths) / len(lengths)
    shapes = tiny.model("bert")
    plan = tiny.plan_for(shapes, keep_share=flat["plan.keep-share"])

    blocks = list(family.block_list(build(shapes, plan)))
    step = sum(block_cost(family, b, mean, rank, width).step for b in blocks)  # type: ignore[arg-type]
    assert found["client_flops"] == pytest.approx(step * sum(lengths), rel=1e-6)


def test_client_flops_are_by_the_width_that_each_client_had() -> None:
    from fedpft_console.compare.record import summary
    from server_app.run.record import fold

    def sized(width: str, each: float) -> dict[str, Any]:
        return {"width": width, "share": 0.5, "parameters": 1, "package": 1, "memory": 1,
                "step_flops": [each, 1.0]}  # fmt: skip

    model = {name: 1 for name in ("fm_parameters", "fm_bytes", "proxy_parameters", "proxy_bytes",
                                  "fm_block_parameters", "proxy_block_parameters")}  # fmt: skip
    events = [
        {"event": "run_started", "rounds": 1},
        {"event": "model", **model, "step_flops": {"fm": [9.0, 1.0], "proxy": [4.0, 1.0]}},
        {"event": "widths", "sizes": [sized("0.1", 2.0), sized("0.5", 4.0)], "proxy": "0.5"},
        *({"event": "reply", "round": 1, "client": c, "status": "ok", "seconds": 1.0, "steps": 3,
           "examples": 8, "train_seconds": 1.0, "width": w}
          for c, w in (("a", "0.1"), ("b", "0.5"))),
    ]  # fmt: skip
    found = summary(fold([{"t": 1.0} | e for e in events]), 4, 10.0)
    rows = 3 * 8 / 2  # two batches of four
    assert found["client_flops"] == rows * 10 * (2 + 10) + rows * 10 * (4 + 10)


def test_partitions_and_grid_are_axes(tmp_path: Path, pretend: list[compare.Cell]) -> None:
    path = experiment(
        tmp_path,
        partitions={
            "iid": {"federation": {"partition": "iid"}},
            "skewed": {"federation": {"partition": "dirichlet", "dirichlet-alpha": 0.1}},
        },
        grid={"align.interval": [1, 2]},
        seeds=[0],
        learning_rates=[0.001],
    )
    assert main(["compare", str(path)]) == 0
    # fedpetuning sets the interval itself: one line, not two.
    want = [("fedpft", 1), ("fedpft", 2), ("fedpetuning", 0)]
    for partition, name in (("iid", "iid"), ("dirichlet", "skewed")):
        here = [c for c in pretend if c.partition == name]
        assert [(c.method, c.resolved["align.interval"]) for c in here] == want
        assert {c.resolved["federation.partition"] for c in here} == {partition}
    text = (tmp_path / "grid" / "table.md").read_text()
    assert "| dataset | partition | method | align.interval |" in text
    assert "| words | skewed | fedpft | 2 |" in text
    pretend.clear()
    assert main(["compare", str(path)]) == 0
    assert not pretend


def test_more_seeds_for_some(tmp_path: Path, pretend: list[compare.Cell]) -> None:
    more = [{"seeds": [3, 4], "methods": ["fedpft"], "datasets": ["words"]}]
    path = experiment(tmp_path, more_seeds=more)
    assert main(["compare", str(path)]) == 0
    best = 0.01
    assert ran(tmp_path / "grid")[4:] == [
        ("fedpft", 1, best), ("fedpetuning", 1, best), ("fedpft", 3, best), ("fedpft", 4, best),
    ]  # fmt: skip


def test_only_and_part(tmp_path: Path, pretend: list[compare.Cell]) -> None:
    path = experiment(tmp_path, datasets={"words": None, "more": {"lora": {"alpha": 4.0}}})
    assert main(["compare", str(path), "--only", "fedpft/words"]) == 0
    assert {(c.method, c.dataset) for c in pretend} == {("fedpft", "words")}
    parts = []
    for i in ("1/2", "2/2"):
        pretend.clear()
        assert main(["compare", str(path), "--part", i, "--results", str(tmp_path / i[0])]) == 0
        parts.append({(c.method, c.dataset, c.seed, c.lr) for c in pretend})
        # A part holds whole lines: its rate was chosen from all rates.
        assert all(
            len({c.lr for c in pretend if c.method == m}) == 2 for m in {c.method for c in pretend}
        )
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 2 * 2 * 3
    points = read(path).points()
    for only, part, message in (
        (["nobody"], None, "nothing in the experiment"),
        (None, "3/2", "expected I/N"),
        (None, "x", "expected I/N"),
    ):
        with pytest.raises(UserError, match=message):
            command.selected(points, only, part)


def test_a_part_without_lines_says_that_nothing_is_run(
    tmp_path: Path, pretend: list[compare.Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(tmp_path)
    assert len(read(path).points()) == 2
    for part, said in (("2/9", False), ("5/9", True)):
        pretend.clear()
        assert main(["compare", str(path), "--part", part]) == 0
        assert bool(pretend) != said
        assert ("--part 5/9: there are fewer lines than parts" in capsys.readouterr().err) == said


def test_merged_folders_hold_each_cell_once(tmp_path: Path, pretend: list[compare.Cell]) -> None:
    path = experiment(tmp_path)
    for i in ("1/2", "2/2"):
        assert main(["compare", str(path), "--part", i, "--results", str(tmp_path / i[0])]) == 0
    folders = ["--merge", str(tmp_path / "1"), "--merge", str(tmp_path / "2")]
    for _ in range(2):
        assert main(["compare", str(path), "--table", *folders]) == 0
        assert len(rows(tmp_path / "grid")) == 6
    pretend.clear()
    assert main(["compare", str(path)]) == 0
    assert not pretend
    assert main(["compare", str(path), "--merge", str(tmp_path / "none")]) == 2


# ---------------------------------------------------------------- what goes wrong


def test_a_failed_cell_is_recorded_retried_and_the_rest_goes_on(tmp_path: Path) -> None:
    methods = {"bad": {"plan": {"keep-neurons": 10_000}}, "fedpft": None}
    path = experiment(tmp_path, methods=methods, seeds=[0, 1], learning_rates=[0.001])
    folder = tmp_path / "grid"
    assert main(["compare", str(path), "--only", "*"]) == 1
    first = rows(folder)
    assert "plan.keep-neurons" in first[0]["failed"]
    # Without a rate the bad method's other seed is not run.
    assert [r["method"] for r in first] == ["bad", "fedpft", "fedpft"]
    assert "fm_test" in first[1] and "failed" not in first[1]
    assert "plan.keep-neurons" in (folder / "table.md").read_text()
    assert main(["compare", str(path)]) == 1
    assert [r["method"] for r in rows(folder)] == ["bad", "fedpft", "fedpft", "bad"]


def test_a_success_replaces_a_failure(
    tmp_path: Path, pretend: list[compare.Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiment(tmp_path, methods={"fedpft": None}, seeds=[0], learning_rates=[0.01])
    good = runner.run_cell

    def broken(*_: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(runner, "run_cell", broken)
    assert main(["compare", str(path)]) == 1
    assert rows(tmp_path / "grid")[0]["failed"] == "ZeroDivisionError: deep inside"
    monkeypatch.setattr(runner, "run_cell", good)
    assert main(["compare", str(path)]) == 0
    assert "deep inside" not in (tmp_path / "grid" / "table.md").read_text()


def test_no_rate_can_be_chosen_without_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_cell", lambda *_: {"fm_test": 0.5, "proxy_test": 0.5})
    assert main(["compare", str(experiment(tmp_path))]) == 1  # two rates, nothing to choose by
    single = experiment(tmp_path, learning_rates=[0.001])
    assert main(["compare", str(single), "--results", str(tmp_path / "single")]) == 0


def test_interrupt_loses_only_the_cell_under_way(
    tmp_path: Path, pretend: list[compare.Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiment(tmp_path)
    good = runner.run_cell

    def interrupted(cell: compare.Cell, folder: Path, *more: Any) -> dict[str, Any]:
        if len(pretend) == 2:
            (folder / "clients").mkdir(parents=True)
            raise KeyboardInterrupt
        return good(cell, folder, *more)

    monkeypatch.setattr(runner, "run_cell", interrupted)
    assert main(["compare", str(path)]) == 130
    assert len(rows(tmp_path / "grid")) == 2
    assert not list((tmp_path / "grid").rglob("clients"))
    monkeypatch.setattr(runner, "run_cell", good)
    assert main(["compare", str(path)]) == 0
    assert len(rows(tmp_path / "grid")) == 6 == len(pretend)


def test_two_writers_are_refused(
    tmp_path: Path, pretend: list[compare.Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(tmp_path)
    folder = tmp_path / "grid"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["compare", str(path)]) == 2
        assert "another `fedpft compare` is writing" in capsys.readouterr().err
        assert main(["compare", str(path), "--table"]) == 0  # reading is free
    assert not pretend
    assert main(["compare", str(path)]) == 0


@pytest.mark.parametrize("cut", [1, 20, 400])
def test_a_torn_last_line_is_mended(tmp_path: Path, pretend: list[compare.Cell], cut: int) -> None:
    path = experiment(tmp_path)
    file = tmp_path / "grid" / "cells.jsonl"
    assert main(["compare", str(path)]) == 0
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    assert main(["compare", str(path), "--table"]) == 0
    assert file.read_bytes() == whole[:-cut]  # reading does not write
    pretend.clear()
    assert main(["compare", str(path)]) == 0
    assert len(pretend) == 1
    assert [r["config"] for r in rows(tmp_path / "grid")] == [
        json.loads(line)["config"] for line in whole.splitlines()
    ]


def test_a_damaged_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = experiment(tmp_path)
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "cells.jsonl").write_text('{"config": {}}\n{"torn\n{"config": {}}\n')
    assert main(["compare", str(path), "--table"]) == 2
    assert "line 2 is damaged" in capsys.readouterr().err


def test_check_sees_a_changed_table(
    tmp_path: Path, pretend: list[compare.Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(tmp_path)
    assert main(["compare", "--check", str(path)]) == 0  # no cells yet
    assert main(["compare", str(path)]) == 0
    assert main(["compare", "--check", str(path)]) == 0
    for name in ("table.md", "table.csv"):
        file = tmp_path / "grid" / name
        good = file.read_text()
        file.write_text(good.replace("50", "51", 1))
        # The others are looked at all the same.
        other = experiment(tmp_path / "other")
        assert main(["compare", "--check", str(path), str(other)]) == 1
        told = capsys.readouterr()
        assert f"{name} is not what" in told.err and f"{other}: no cells yet" in told.out
        file.write_text(good)
    # A setting changed since says which: the table would be empty, and nobody would know why.
    tree = yaml.safe_load(path.read_text())
    tree["base"]["lora"]["rank"] = 3
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert main(["compare", "--check", str(path)]) == 1
    assert "fedpft on words was run with lora.rank = 2, now 3" in capsys.readouterr().err


def test_checking_is_quick_and_leaves_torch_alone() -> None:
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    files = sorted(str(p) for p in (root / "experiments").glob("*.yaml"))
    program = (
        "import sys\nfrom fedpft_console.cli import main\n"
        f"code = main(['compare', '--check', *{files!r}])\n"
        "print('torch' in sys.modules, code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "False 0", done.stdout + done.stderr
    assert time.perf_counter() - start < 60


# ---------------------------------------------------------------- experiment files


def test_a_changed_setting_is_another_cell(tmp_path: Path) -> None:
    found = read(experiment(tmp_path))
    point = compare.Point("fedpft", "words")
    cell = found.cell(point, 0, 0.001)
    assert cell.digest() == found.cell(point, 0, 0.001).digest()
    assert cell.digest() != found.cell(point, 0, 0.01).digest()
    assert cell.digest() != found.cell(point, 1, 0.001).digest()


def test_cells_are_found_by_configuration_across_new_keys(tmp_path: Path) -> None:
    cell = read(experiment(tmp_path)).cell(compare.Point("fedpft", "words"), 0, 0.001)
    row = {"config": dict(cell.resolved)}
    assert cell.find([row]) is row
    # Written before `align.selection` existed: it counts as having the default, and no other.
    del row["config"]["align.selection"]
    assert cell.find([row]) is row
    other = compare.Cell("fedpft", "words", 0, 0.001, cell.flat | {"align.selection": "random"})
    assert other.find([row]) is None
    assert other.differs(row) == {"align.selection": ("apoz", "random")}
    # Written when a key existed that is gone now, or with another value, or by a failed run.
    for change in ({"config": row["config"] | {"align.gone": 1}}, {"failed": "no"}):
        assert cell.find([row | change]) is None
    assert cell.find([{"config": row["config"] | {"lora.rank": 3}}]) is None


def test_where_a_cell_runs_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    cell = read(experiment(tmp_path)).cell(compare.Point("fedpft", "words"), 0, 0.001)
    for key, value in (("run.proxy-cache", "x"), ("run.threads", 3), ("run.dir", "y")):
        moved = compare.Cell("fedpft", "words", 0, 0.001, cell.flat | {key: value})
        assert moved.digest() == cell.digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {a: }", "needs `methods` and `datasets`"),
        ("methods: {a: }\ndatasets: {b: }\nseed: 1", "no such key 'seed'"),
        ("methods: [", "not valid YAML"),
        ("methods: [a]\ndatasets: {b: }", "methods: expected names"),
        ("methods: {a: 3}\ndatasets: {b: }", r"methods.a: expected configuration keys"),
        ("methods: {a: {lora: {rnk: 3}}}\ndatasets: {b: }", "a on b: lora.rnk: no such"),
        ("methods: {a: }\ndatasets: {b: }\nseeds: 3", "seeds: expected a list"),
        ("methods: {a: }\ndatasets: {b: }\nseeds: [x]", "seeds: expected a list"),
        ("methods: {a: }\ndatasets: {b: }\nlearning-rates: [x]", "learning-rates: expected num"),
        (
            "methods: {a: }\ndatasets: {b: }\nlearning-rates: {iid: [1.0]}",
            "learning-rates: expected a list of numbers, or one for each of b; got iid",
        ),
        (
            "methods: {a: }\ndatasets: {b: }\npartitions: {p: , q: }\nlearning-rates: {p: [1.0]}",
            "or one for each of b, or for each of p, q; got p",
        ),
        (
            "methods: {a: }\ndatasets: {b: }\npartitions: {p: }\nlearning-rates: {p: [x]}",
            "learning-rates.p: expected numbers",
        ),
        ("methods: {a: }\ndatasets: {b: }\nreference: c", "no such method 'c'"),
        ("methods: {a: {run.seed: 1}}\ndatasets: {b: }", "run.seed, which seeds decides"),
        (
            "methods: {a: {train.lr: 1}}\ndatasets: {b: }\nlearning-rates: [1.0]",
            "train.lr, which learning-rates decides",
        ),
        ("methods: {a: }\ndatasets: {b: }\ngrid: {lora.rank: 3}", "lora.rank needs a list"),
        (
            "methods: {a: {lora.rank: 1}}\ndatasets: {b: }\ngrid: {lora.rank: [3, 4]}",
            "every method sets lora.rank itself",
        ),
        ("methods: {a: }\ndatasets: {b: }\ntargets: {c: 0.5}", "no such dataset 'c'"),
        ("methods: {a: }\ndatasets: {b: }\ntargets: {b: 50}", "between 0 and 1"),
        (
            "methods: {a: }\ndatasets: {b: }\nmore-seeds: [{seeds: [1], methods: [c]}]",
            "no such name",
        ),
        ("methods: {a: }\ndatasets: {b: }\nmore-seeds: [{methods: [a]}]", "needs `seeds`"),
        (
            "methods: {a: , b: {train.local-steps: 3}}\ndatasets: {c: }",
            "b and a on c cannot be compared: train.local-steps is '24 steps' and '96 steps'",
        ),
        (
            "methods: {a: , b: {federation.partition: iid}}\ndatasets: {c: }",
            "cannot be compared: federation.partition",
        ),
    ],
)
def test_bad_experiment_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(UserError, match="no such experiment file"):
        read(tmp_path / "none.yaml")


def test_equal_budgets_are_compared_by_steps_in_all(tmp_path: Path) -> None:
    """One-shot makes all steps in one round; centralised has one client; others may ask."""
    path = tmp_path / "x.yaml"
    once = "{federation.rounds: 1, train.local-steps: 96}"
    one = "{federation: {clients: 1, clients-per-round: 1, min-clients: 1}}"
    path.write_text(f"methods: {{a: , b: {once}, c: {one}}}\ndatasets: {{d: }}")
    assert len(read(path).points()) == 3
    path.write_text("methods: {a: , b: {train.local-steps: 3}}\ndatasets: {c: }\n"
                    "unequal: [train.local-steps]")  # fmt: skip
    assert len(read(path).points()) == 2


def test_results_of_experiments_name_one_folder(tmp_path: Path) -> None:
    path = str(experiment(tmp_path))
    assert main(["compare", path, path, "--results", str(tmp_path / "r")]) == 2
