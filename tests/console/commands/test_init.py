"""`fedpft init` and `fedpft completion`, as a newcomer uses them."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import fake_flower, refused

from fedpft_console import cli
from fedpft_console.commands import completion
from fedpft_core import config


@pytest.fixture
def rows(elsewhere: Path) -> Path:
    (elsewhere / "a.csv").write_text("question,kind\n" + "who,person\nwhere,place\n" * 5)
    (elsewhere / "b.csv").write_text("question,kind\nwho,person\nwhere,place\n")
    return elsewhere


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_an_answer_it_is_the_first_run(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["init", "--yes"]) == 0
    assert config.from_flat(config.read_file(elsewhere / "run.yaml")) == config.from_flat({})
    calls = fake_flower(monkeypatch)
    assert cli.main(["run", "--config", "run.yaml"]) == 0 and len(calls) == 1


def test_five_answers_make_the_file(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("\na.csv\nb.csv\nquestion,kind\n4\n"))
    assert cli.main(["init", "my.yaml"]) == 0
    said = capsys.readouterr()
    assert said.err.count("]: ") + said.err.count("?: ") >= 1 and said.err.count("?") == 5
    assert "(there are question, kind)" in said.err
    assert "fedpft run --config my.yaml" in said.out
    assert config.read_file(rows / "my.yaml") == {
        "data.train": "a.csv", "data.test": "b.csv", "data.text-column": "question",
        "data.label-column": "kind", "federation.clients": 4, "federation.clients-per-round": 4,
    }  # fmt: skip


def test_flags_do_without_a_terminal(rows: Path) -> None:
    argv = ["init", "--train", "a.csv", "--test", "b.csv", "--columns", "question,kind"]
    assert cli.main([*argv, "--clients", "2", "--rounds", "3"]) == 0
    assert config.read_file(rows / "run.yaml")["federation.rounds"] == 3


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--train", "a.csv", "--test", "b.csv"], "no column named 'text'"),
        (["--train", "a.csv", "--columns", "question,kind"], "data.test is empty"),
        (["--train", "none.csv", "--test", "b.csv"], "data.train: no such file"),
        (["--train", "a.csv", "--test", "b.csv", "--columns", "x"], "expected INPUT,LABEL"),
        (["--clients", "many"], "--clients many: expected a whole number"),
        (["--train", "a.csv", "--test", "b.csv", "--columns", "question,kind", "--clients", "99"],
         "10 rows are fewer than federation.clients = 99"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_not_written(
    argv: list[str], sentence: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, "init", *argv)
    assert not (rows / "run.yaml").exists()


def test_a_file_that_is_there_is_kept(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rows / "run.yaml").write_text("run.seed: 5\n")
    assert "--force replaces it" in refused(capsys, "init", "--yes")
    assert (rows / "run.yaml").read_text() == "run.seed: 5\n"
    assert cli.main(["init", "--yes", "--force"]) == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fedpft ", {"run", "watch", "init", "compare"}),
        ("fedpft ru", {"run"}),
        ("fedpft run --res", {"--resume"}),
        ("fedpft node ", {"check"}),
        ("fedpft completion ", {"bash", "zsh"}),
        ("fedpft run -c lora.ra", {"lora.rank="}),
    ],
)
def test_bash_completes_commands_options_and_keys(line: str, expected: set[str]) -> None:
    words = line.split(" ")
    code = completion.script(cli.parser(), "bash") + (
        f"COMP_WORDS=({' '.join(repr(w) for w in words)}); COMP_CWORD={len(words) - 1}; _fedpft; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert expected <= set(done.stdout.split())
