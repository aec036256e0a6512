"""The model card beside the exported adapter: what it says, and that its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

SHORT = {
    "federation.rounds": 1, "distill.steps": 2, "train.local-epochs": 1, "align.interval": 0,
}  # fmt: skip


def card_of(flat: dict[str, Any], run: Path) -> tuple[dict[str, Any], str]:
    tiny.run(flat, run)
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_adapter_is(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path / "task", rows=90) | SHORT
    head, body = card_of(flat, tmp_path / "run")
    names = ["accuracy", "f1", "matthews_correlation"]
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-classification"
    assert head["metrics"] == names and head["license"] == "unknown"
    (result,) = head["model-index"][0]["results"]
    assert [m["type"] for m in result["metrics"]] == names
    assert "More Information Needed" not in body
    assert str(tmp_path) not in body + str(head), "no path of this machine"
    labels = re.findall(r"^\| (\d+) \| (.+) \|$", body, flags=re.M)
    assert [int(i) for i, _ in labels] == list(range(len(labels))) and len(labels) > 1
    assert f"max_length={flat['data.max-length']}" in body


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_its_code_loads_the_adapter_and_names_a_label(family: str, tmp_path: Path) -> None:
    from PIL import Image

    flat = tiny.write_task(family, tmp_path / "task", rows=60) | SHORT
    _, body = card_of(flat, tmp_path / "run")
    (code,) = re.findall(r"```python\n(.*?)```", body, flags=re.S)
    name = re.search(r"base = ('.*?')", code)
    assert name
    code = code.replace(name[1], repr(str(flat["model.name"])))
    code = code.replace("FOLDER_OF_THIS_CARD", str(tmp_path / "run" / "adapter"))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    labels = re.findall(r"^\| \d+ \| (.+) \|$", body, flags=re.M)
    assert done.stdout.strip().splitlines()[-1] in labels
