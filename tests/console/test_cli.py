"""The command line: what it accepts, what it refuses and how it ends. Flower is not started."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpft_console import cli, launch
from fedpft_core import config
from fedpft_core.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


def fake_flower(
    monkeypatch: pytest.MonkeyPatch,
    *,
    events: tuple[dict[str, Any], ...] = ({"event": "run_finished", "seconds": 1.0},),
    status: str = launch.COMPLETED,
    log: str = "",
    error: BaseException | None = None,
) -> list[dict[str, Any]]:
    """Put a pretended simulation in the place of Flower; returns the run configs it was given."""
    calls: list[dict[str, Any]] = []

    def run(run_dir: Path, flat: dict[str, Any], *, tick: Callable[[], None], **rest: Any) -> Any:
        calls.append({**flat, "federation options": rest.get("federation")})
        folder = run_dir / "flower"
        folder.mkdir(exist_ok=True)
        (folder / "run.log").write_text(log)
        with open(run_dir / "events.jsonl", "a") as file:
            for event in events:
                file.write(json.dumps({"t": time.time()} | event) + "\n")
        tick()
        if error is not None:
            raise error
        return launch.Result(status, "", "17", folder / "run.log")

    monkeypatch.setattr(launch, "run_simulation", run)
    return calls


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that the default run folder lands there."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # A bad setting that slips through must not start a real run.
    monkeypatch.setattr(launch, "run_simulation", lambda *a, **k: pytest.fail("a run was started"))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which bad input is refused."""
    assert cli.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") == 1, err
    assert err.startswith("fedpft: error: ")
    return err.removeprefix("fedpft: error: ").strip()


# ---------------------------------------------------------------- the list of keys


def test_pyproject_holds_every_key_with_its_default() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    made = config.flatten(project["tool"]["flwr"]["app"]["config"])
    wanted = {name: info.default for name, info in config.keys().items()}
    assert made == wanted, "run `fedpft config --write`"
    assert {k: type(v) for k, v in made.items()} == {k: type(v) for k, v in wanted.items()}


def test_docs_list_every_key() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == cli.config_markdown(), "run `fedpft config --write`"


@pytest.mark.parametrize("form", ["table", "markdown", "toml", "yaml"])
def test_config_lists_every_key(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--format", form]) == 0
    out = capsys.readouterr().out
    for name in list(config.keys()):
        assert (name if form != "yaml" else name.partition(".")[2]) in out


def test_toml_and_yaml_listings_read_back_as_the_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = config.to_flat(config.Config())
    cli.main(["config", "--format", "toml"])
    assert config.flatten(tomllib.loads(capsys.readouterr().out)) == defaults
    cli.main(["config", "--format", "yaml"])
    assert config.flatten(yaml.safe_load(capsys.readouterr().out)) == defaults


def test_write_replaces_the_run_config_and_nothing_else(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "fedpft_core").mkdir()
    project = elsewhere / "pyproject.toml"
    before = "[project]\nname = 'x'\n\n[tool.flwr.app.config]\n"
    after = "[tool.ruff]\nline-length = 100\n\n[tool.x]\ny = 1\n"
    project.write_text(before + "old.key = 3\n\n" + after)
    assert cli.main(["config", "--write"]) == 0
    once = project.read_text()
    assert once == before + cli.config_toml() + "\n" + after
    assert cli.main(["config", "--write"]) == 0
    assert project.read_text() == once
    assert (elsewhere / "docs" / "config.md").read_text() == cli.config_markdown()


def test_write_outside_a_checkout_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "root of a checkout" in refused(capsys, "config", "--write")


# ---------------------------------------------------------------- fedpft run: what it is given


def test_later_settings_win_and_the_resolved_configuration_is_saved(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_flower(monkeypatch)
    (elsewhere / "run.yaml").write_text("lora:\n  rank: 2\nfederation.rounds: 3\nrun.seed: 1\n")
    argv = ["run", "--config", "run.yaml", "-c", "lora.rank=4 run.seed=2", "-c", "run.seed=5"]
    assert cli.main(argv) == 0
    given = calls[0]
    assert (given["lora.rank"], given["federation.rounds"], given["run.seed"]) == (4, 3, 5)
    assert given["federation options"].startswith("num-supernodes=10 ")
    folder = Path(given["run.dir"])
    assert folder.is_absolute() and folder.parent == elsewhere / "runs"
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", folder.name)
    assert capsys.readouterr().out.startswith(f"run folder {folder}\n")
    saved = config.to_flat(config.from_flat(config.read_file(folder / "config.yaml")))
    assert saved == {k: v for k, v in given.items() if k != "federation options"}


def test_file_names_become_absolute(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path, tmp_path: Path
) -> None:
    calls = fake_flower(monkeypatch)
    (elsewhere / "a.csv").touch()
    (elsewhere / "fm").mkdir()
    (elsewhere / "b.csv").touch()
    argv = ["run", "-c", "data.train=a.csv data.test=./b.csv model.name=fm data.labels=yes,no"]
    assert cli.main([*argv, "--quiet", "--run-dir", str(tmp_path / "r")]) == 0
    assert calls[0]["data.train"] == str(elsewhere / "a.csv")
    assert calls[0]["data.test"] == str(elsewhere / "b.csv")
    assert calls[0]["model.name"] == str(elsewhere / "fm")
    assert calls[0]["data.labels"] == "yes,no"
    assert calls[0]["run.dir"] == str(tmp_path / "r")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("lora.rnk=4", "lora.rnk: no such configuration key. Did you mean lora.rank?"),
        ("lora.rank=two", "lora.rank: expected a whole number, got 'two'."),
        ("plan.keep-share=1.5", "plan.keep-share: expected above 0 and at most 1, got 1.5."),
        ("federation.clients=1", "federation.clients-per-round = 4 is more than federation.cl"),
        ("data.train=none.csv", "data.train: no such file"),
        ("lora.rank", "expected key=value"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(
    setting: str, sentence: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, "run", "-c", setting)
    assert list(elsewhere.iterdir()) == []


def test_a_missing_configuration_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml: no such configuration file" in refused(
        capsys, "run", "--config", "none.yaml"
    )


def test_an_unwritable_folder_is_refused(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "file").touch()
    said = refused(capsys, "run", "--run-dir", "file/below")
    assert said == f"cannot write to the run folder {elsewhere / 'file/below'}: Not a directory."


def test_a_folder_that_holds_something_is_refused_and_kept(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "old").mkdir()
    (elsewhere / "old" / "thesis.txt").write_text("precious")
    assert "is not empty; name a new one" in refused(capsys, "run", "--run-dir", "old")
    (elsewhere / "old" / "config.yaml").touch()
    assert "--resume continues it" in refused(capsys, "run", "--run-dir", "old")
    assert (elsewhere / "old" / "thesis.txt").read_text() == "precious"


def test_a_disk_without_room_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = types.SimpleNamespace(total=10**9, used=10**9 - 5_000_000, free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has 5 MB of room; a run needs at least 200 MB." in refused(capsys, "run")


def test_a_write_that_fails_half_way_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_flower(monkeypatch, error=OSError(28, "No space left on device"))
    assert cli.main(["run"]) == 2
    err = capsys.readouterr().err
    assert "cannot write to the run folder" in err and "No space left on device." in err


def test_contradicting_folders_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "contradicts run.dir" in refused(capsys, "run", "--run-dir", "a", "-c", "run.dir=b")
    assert "exclude each other" in refused(capsys, "run", "--run-dir", "a", "--resume", "b")


def test_a_folder_in_use_is_refused(elsewhere: Path) -> None:
    with (
        cli.locked(elsewhere),
        pytest.raises(cli.UserError, match="in use by another run"),
        cli.locked(elsewhere),
    ):
        pass
    with cli.locked(elsewhere):
        pass  # free again


# ---------------------------------------------------------------- fedpft run: how it ends


def test_success_needs_both_flower_and_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_flower(monkeypatch)
    assert cli.main(["run"]) == 0
    fake_flower(monkeypatch, events=())
    assert cli.main(["run"]) == 1
    assert "its end was not recorded" in capsys.readouterr().err
    fake_flower(monkeypatch, status="finished:failed", log="x\nValueError: bad\n")
    assert cli.main(["run"]) == 1
    assert "error: ValueError: bad (log: " in capsys.readouterr().err
    fake_flower(monkeypatch, status="unknown")
    assert cli.main(["run"]) == 1


def test_the_reason_of_the_run_comes_before_that_of_flower(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "round 3: 1 good reply, federation.min-clients = 2."
    events = ({"event": "run_started", "rounds": 6}, {"event": "run_failed", "reason": reason})
    for status, error in (
        ("finished:failed", None),
        (launch.COMPLETED, None),
        ("", RunError("the process flwr-simulation ended")),
    ):
        fake_flower(monkeypatch, events=events, status=status, error=error)
        assert cli.main(["run"]) == 1
        assert f"fedpft: error: {reason}\n" in capsys.readouterr().err
    folder = next((elsewhere / "runs").iterdir())
    assert reason in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (launch.Terminated(signal.SIGTERM), 143)],
)
def test_an_interrupted_run_says_how_to_go_on(
    error: BaseException, code: int, elsewhere: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake_flower(monkeypatch, events=(), error=error)
    assert cli.main(["run", "--run-dir", "r"]) == code
    assert "--resume" not in capsys.readouterr().err, "there is no checkpoint yet"
    (elsewhere / "r" / "checkpoints" / "1").mkdir(parents=True)
    fake_flower(monkeypatch, events=(), error=error)
    assert cli.main(["run", "--resume", "r"]) == code
    assert f"fedpft run --resume {elsewhere / 'r'}\n" in capsys.readouterr().err


def test_a_deployed_run_is_continued_where_it_ran(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        (elsewhere / "r" / "checkpoints" / "1").mkdir(parents=True)
        raise RunError("the server is gone")

    monkeypatch.setattr(launch, "run_deployed", fail)
    keys = ["-c", "data.train='' data.test=/srv/test.csv"]
    assert cli.main(["run", "--superlink", "lab", "--run-dir", "r", *keys]) == 1
    want = f"Continue with: fedpft run --resume {elsewhere / 'r'} --superlink lab\n"
    assert want in capsys.readouterr().err


def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(launch.Terminated), launch.signals_as_exceptions():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_quiet_prints_the_folder_and_the_outcome_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = (
        {"event": "run_started", "rounds": 1},
        {"event": "evaluation", "round": 1, "model": "fm", "accuracy": 0.5, "rows": 4},
        {"event": "run_finished", "seconds": 1.0},
    )
    fake_flower(monkeypatch, events=events)
    cli.main(["run", "--quiet"])
    out = capsys.readouterr().out
    assert "accuracy 50.0 %" not in out and "FedPFT after round 1" in out


# ---------------------------------------------------------------- fedpft run --resume


@pytest.fixture
def old_run(elsewhere: Path) -> Path:
    """A run folder as an earlier command left it."""
    folder = elsewhere / "old"
    folder.mkdir()
    given = {"lora.rank": 4, "run.stop-after": 2, "run.dir": str(folder)}
    cli.save_config(folder, config.to_flat(config.from_flat(given)))
    old = [{"t": 1.0, "event": "run_started", "rounds": 6}, {"t": 2.0, "event": "run_finished"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in old))
    return folder


def test_resume_takes_the_saved_configuration(
    old_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_flower(monkeypatch)
    assert cli.main(["run", "--resume", "old", "-c", "federation.attempts=5 lora.rank=4"]) == 0
    given = calls[0]
    assert given["run.resume"] is True and given["run.dir"] == str(old_run)
    assert given["lora.rank"] == 4 and given["federation.attempts"] == 5
    # Another number of threads rounds differently: the bits would not be those of one run.
    assert cli.main(["run", "--resume", "old", "-c", "run.threads=1"]) == 2
    assert given["run.stop-after"] == 0, "where the first part stopped does not bind the second"


def test_resume_refuses_another_configuration(
    old_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "run", "--resume", "old", "-c", "lora.rank=8")
    assert said.startswith("lora.rank = 8 contradicts 4 in ")
    assert "no such configuration key" in refused(capsys, "run", "--resume", "old", "-c", "a.b=1")
    assert "no such run folder" in refused(capsys, "run", "--resume", "none")
    (old_run / "config.yaml").unlink()
    assert "is no run folder" in refused(capsys, "run", "--resume", "old")


def test_the_end_of_the_first_part_is_not_taken_for_that_of_the_second(
    old_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flower(monkeypatch, events=())
    assert cli.main(["run", "--resume", "old"]) == 1


# ---------------------------------------------------------------- deployment


def test_a_deployed_run_decides_its_folder_there_unless_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def run(name: str, flat: dict[str, Any], folder: Path, **rest: Any) -> launch.Result:
        calls.append((name, flat))
        return launch.Result(launch.COMPLETED, "", "1", folder / "run.log")

    monkeypatch.setattr(launch, "run_deployed", run)
    argv = ["run", "--superlink", "clinic", "-c", "data.train=/only/there.csv"]
    assert cli.main(argv) == 0
    assert calls[0][0] == "clinic" and calls[0][1]["run.dir"] == ""
    assert calls[0][1]["data.train"] == "/only/there.csv"
    assert "on the machine of the SuperLink" in capsys.readouterr().out
    assert cli.main([*argv, "--run-dir", str(tmp_path / "r")]) == 0
    assert calls[1][1]["run.dir"] == str(tmp_path / "r")


# ---------------------------------------------------------------- report, inspect, the rest


def test_report_is_made_again(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "old"]) == 0
    assert "Run finished" in (old_run / "report.md").read_text()
    assert str(old_run / "report.md") in capsys.readouterr().out


def test_report_refuses_what_is_no_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run folder" in refused(capsys, "report", ".")


def test_inspect_prints_the_tables_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = types.ModuleType("fedpft_core.proxy.cost")

    def inspect(settings: config.Config) -> dict[str, Any]:
        rows = [["0", "whole", 1536, 1_774_464, 0.5], ["all", "[b]", None, 10_646_784, 3.14159]]
        columns = ["block", "kept", "neurons", "parameters", "ratio"]
        note = f"rank {settings.lora.rank} [x]"
        return {"title": "Sizes", "columns": columns, "rows": rows, "notes": [note]}

    made.inspect = inspect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedpft_core.proxy.cost", made)
    assert cli.main(["inspect", "-c", "lora.rank=3"]) == 0
    out = capsys.readouterr().out
    for part in ("Sizes", "1,774,464", "3.14", "[b]", "rank 3 [x]"):
        assert part in out


def test_importing_the_command_is_cheap() -> None:
    code = (
        "import sys, fedpft_console.cli; "
        "heavy = {'torch', 'transformers', 'flwr', 'ray', 'numpy', 'matplotlib', 'yaml', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m fedpft_console.cli config | head -1", shell=True, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
