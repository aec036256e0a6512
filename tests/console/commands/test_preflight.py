"""What is looked at before Flower starts is what the task of the run will read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny

from fedpft_console.commands import preflight
from fedpft_core import config
from fedpft_core.errors import UserError


@pytest.mark.parametrize("task", tasks.TASKS)
def test_rows_of_every_task_pass(task: str, tmp_path: Path) -> None:
    flat = tasks.write(task, tmp_path)
    preflight.check(config.from_flat(flat))
    with pytest.raises(UserError, match=r"90 rows are fewer than federation\.clients = 91"):
        preflight.check(config.from_flat(flat | {"federation.clients": 91}))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"text": "a text"}, {"data.task": "generate"}),
        ({"text": "a prompt", "answer": "its end"}, {"data.response-column": "answer"}),
        (
            {"talk": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"data.messages-column": "talk"},
        ),
    ],
)
def test_rows_without_labels_are_what_generation_reads(
    row: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    file = lines(tmp_path / "rows.jsonl", [row] * 6)
    flat = {"data.train": file, "data.test": file} | keys
    preflight.check(config.from_flat(flat))
    bad = lines(tmp_path / "bad.jsonl", [row] * 5 + [dict.fromkeys(row)])
    with pytest.raises(UserError, match=r"data\.test.*row 6"):
        preflight.check(config.from_flat(flat | {"data.test": bad}))


def test_a_file_beside_built_in_rows_is_read_by_itself(tmp_path: Path) -> None:
    """The built-in rows are not: parsing them takes longer than anything here."""
    good = lines(tmp_path / "good.jsonl", [{"text": "a", "label": x} for x in ("one", "two")])
    preflight.check(config.from_flat({"data.test": good}))
    bad = lines(tmp_path / "bad.jsonl", [{"text": "", "label": "one"}])
    with pytest.raises(UserError, match=r"data\.test: .*bad\.jsonl: row 1 has no text"):
        preflight.check(config.from_flat({"data.test": bad}))


def test_the_public_file_is_read_by_its_own_column(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path)
    public = lines(tmp_path / "public.jsonl", [{"sentence": f"public {i}"} for i in range(4)])
    flat |= {"data.public": public, "data.public-column": "sentence"}
    preflight.check(config.from_flat(flat))
    with pytest.raises(UserError, match="no column named 'other'"):
        preflight.check(config.from_flat(flat | {"data.public-column": "other"}))
