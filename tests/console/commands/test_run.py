"""`fedpft run`: what it accepts, what it refuses and how it ends. Flower is not started."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from terminal import fake_flower, refused

from fedpft_console import cli, launch
from fedpft_console.commands import run
from fedpft_core import config
from fedpft_core.errors import RunError


def test_later_settings_win_and_the_resolved_configuration_is_saved(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_flower(monkeypatch)
    (elsewhere / "run.yaml").write_text("lora:\n  rank: 2\nfederation.rounds: 3\nrun.seed: 1\n")
    argv = ["run", "--config", "run.yaml", "-c", "lora.rank=4 run.seed=2", "-c", "run.seed=5"]
    assert cli.main(argv) == 0
    given = calls[0]
    assert (given["lora.rank"], given["federation.rounds"], given["run.seed"]) == (4, 3, 5)
    assert given["federation options"].startswith("num-supernodes=5 ")
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
    (elsewhere / "a.csv").write_text("text,label\n" + "a,yes\nb,no\n" * 3)
    (elsewhere / "fm").mkdir()
    (elsewhere / "b.csv").write_text("text,label\na,yes\n")
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
        ("data.train=''", "data.train is empty: without --superlink"),
        ("federation.clients=1", "federation.clients-per-round = 5 is more than federation.cl"),
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


def test_a_write_that_fails_half_way_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_flower(monkeypatch, error=OSError(28, "No space left on device"))
    assert cli.main(["run"]) == 2
    err = capsys.readouterr().err
    assert "cannot write to the run folder" in err and "No space left on device." in err


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


def test_a_run_of_which_a_client_process_died_goes_on_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"event": "run_failed", "reason": "a process died.", "again": True}
    started = {"event": "run_started", "rounds": 6}
    calls: list[dict[str, Any]] = []
    rounds = [None, 1, 1, 2, "end"]

    def run(run_dir: Path, flat: dict[str, Any], *, tick: Any, **rest: Any) -> launch.Result:
        done = rounds[len(calls)]
        calls.append(flat)
        if done and done != "end":
            (run_dir / "checkpoints" / f"round-{done:04d}").mkdir(parents=True, exist_ok=True)
        last = {"event": "run_finished", "seconds": 1.0} if done == "end" else lost
        with open(run_dir / "events.jsonl", "a") as file:
            for event in (started, last):
                file.write(json.dumps({"t": time.time()} | event) + "\n")
        (run_dir / "flower").mkdir(exist_ok=True)
        (run_dir / "flower" / "run.log").write_text("")
        time.sleep(0.01)
        if done == 1:
            raise RunError("the process flwr-simulation ended")  # whoever notices first
        how = launch.COMPLETED if done == "end" else "finished:failed"
        return launch.Result(how, "", "1", run_dir / "flower" / "run.log")

    monkeypatch.setattr(launch, "run_simulation", run)
    assert cli.main(["run", "--run-dir", "r"]) == 0
    assert [c["run.resume"] for c in calls] == [False, True, True, True, True]
    out = capsys.readouterr().out
    assert "goes on from the beginning" in out and "goes on from round 3" in out

    rounds[:] = [None] * 9
    calls.clear()
    assert cli.main(["run", "--run-dir", "s"]) == 1
    assert len(calls) == 4, "the same round is not tried for ever"
    assert "a process died" in capsys.readouterr().err


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


def test_resuming_what_has_ended_says_what_is_done_again(
    old_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = config.from_flat({}).federation.rounds
    log = old_run / "events.jsonl"
    ended = log.read_text().replace('"rounds": 6', f'"rounds": {rounds}')
    for more, said in ((0, True), (1, False)):
        log.write_text(ended)
        fake_flower(monkeypatch)
        cli.main(["run", "--resume", "old", "--rounds", str(rounds + more)])
        assert ("is done again" in capsys.readouterr().out) == said


@pytest.mark.parametrize("log", [None, b"no JSON\n", b'{"t": 1, "event"'])
def test_a_log_that_cannot_be_read_is_left_alone_when_a_run_is_resumed(
    old_run: Path, monkeypatch: pytest.MonkeyPatch, log: bytes | None
) -> None:
    path, seen = old_run / "events.jsonl", []
    path.unlink() if log is None else path.write_bytes(log)
    fake_flower(monkeypatch)
    # Looked at where the run would begin: nobody holds the folder's lock before.
    monkeypatch.setattr(
        run, "_run", lambda *a: seen.append(path.read_bytes() if path.exists() else None) or 0
    )
    assert cli.main(["run", "--resume", "old"]) == 0
    assert seen == [log]


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


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        ("text,label\na,yes\n", "data.label-column=kind", "no column named 'kind'"),
        ("text,label\n", "", "holds no rows"),
        ("text,label\na,\n", "", "row 1 has no label"),
        ("text,label\n" + "a,b\n" * 9, "", "only one label, 'b'"),
        ("text,label\na,high\n", "data.task=regress", "no finite number"),
        ("text,label\n" + "a,b\na,c\n" * 2, "", "4 rows are fewer than federation.clients = 5"),
    ],
)
def test_faults_in_the_data_are_found_before_flower_is_started(
    rows: str, settings: str, sentence: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "a.csv").write_text(rows)
    (elsewhere / "b.csv").write_text("text,label\na,yes\n")
    files = "data.train=a.csv data.test=b.csv"
    assert sentence in refused(capsys, "run", "-c", f"{files} {settings}")
    assert not (elsewhere / "runs").exists()


def test_an_empty_test_file_and_a_public_corpus_of_texts_for_images_are_found_too(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (elsewhere / "a.csv").write_text("text,label\n" + "a,b\na,c\n" * 5)
    (elsewhere / "b.csv").write_text("text,label\n")
    assert "data.test" in refused(capsys, "run", "-c", "data.train=a.csv data.test=b.csv")
    Image.new("RGB", (2, 2)).save(elsewhere / "x.png")
    (elsewhere / "i.csv").write_text("image,label\n" + "x.png,a\nx.png,b\n" * 3)
    said = refused(capsys, "run", "-c", "data.train=i.csv data.test=i.csv data.image-column=image")
    assert "data.public is 'builtin:public', which is text, but the task has images" in said


def test_a_run_is_continued_with_the_same_file_by_another_path_and_with_more_rounds(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "a.csv").write_text("text,label\n" + "a,b\nc,d\n" * 9)
    (elsewhere / "other.csv").write_text("text,label\n" + "a,b\nc,d\n" * 9)
    files = "data.train=a.csv data.test=./a.csv"
    calls = fake_flower(monkeypatch)
    assert cli.main(["run", "--run-dir", "r", "--rounds", "3", "-c", files]) == 0
    assert calls[-1]["federation.rounds"] == 3
    again = ["run", "--resume", "r", "-c", files]
    assert cli.main([*again, "--rounds", "5"]) == 0
    assert calls[-1]["federation.rounds"] == 5 and calls[-1]["run.resume"]
    assert cli.main(again) == 0
    assert calls[-1]["federation.rounds"] == 5, "it is a run of five rounds now"
    assert "is less than the run's 5" in refused(capsys, *again, "--rounds", "2")
    said = refused(capsys, "run", "--resume", "r", "-c", "data.train=other.csv")
    assert "contradicts" in said and "federation.round-timeout" in said
    assert "expected" in refused(capsys, *again, "--rounds", "0")
