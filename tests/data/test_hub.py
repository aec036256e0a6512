"""Data sets of the hub's layout, read from local folders: the loader is the same for names."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from fedpft_console.commands.settings import absolute_files
from fedpft_core import config
from fedpft_core.data import hub
from fedpft_core.data.public import load_public
from fedpft_core.data.rows import Columns
from fedpft_core.errors import UserError
from fedpft_core.task import load_task, make


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def features() -> datasets.Features:
    return datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["worse", "better"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )


def parquet(folder: Path) -> Path:
    """A folder as `push_to_hub` makes one: data/SPLIT-*.parquet, and a card that names them."""
    (folder / "data").mkdir(parents=True)
    parts = {
        "train": ([f"t{i}" for i in range(10)], [i % 2 for i in range(10)]),
        "test": (["u0", "u1", "u2"], [0, 1, -1]),
    }
    for split, (texts, labels) in parts.items():
        rows = {"sentence": texts, "label": labels, "tags": [[0, 1]] * len(texts)}
        made = datasets.Dataset.from_dict(rows, features=features())
        made.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


def test_a_folder_of_the_hubs_layout_is_read_as_a_name_is(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set")
    flat = {
        "data.train": f"hub:{folder}:train[:80%]",
        "data.test": f"hub:{folder}",
        "data.text-column": "sentence",
        "data.validation-share": 0.0,
        "data.max-bad-rows": 1,
    }
    found = load_task(config.from_flat(flat).data, 0)
    assert found.task.labels == ("better", "worse")
    assert found.train.inputs == tuple(f"t{i}" for i in range(8))
    assert found.train.labels.tolist() == [1, 0] * 4
    # data.test names no split and means `test`; the row without a label is left out, and counted.
    assert found.test.inputs == ("u0", "u1")
    assert "1 of 3 rows" in found.left_out[0] and "without label" in found.left_out[0]
    # The same folder, without the prefix.
    assert hub.is_hub(folder) and not hub.is_hub(tmp_path)
    again = load_task(config.from_flat(flat | {"data.train": str(folder)}).data, 0)
    assert len(again.train) == 10


def test_lists_of_classes_are_lists_of_names(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set")
    found = hub.read_columns(f"hub:{folder}:test", ["tags", "label"])
    assert found == {"tags": [["O", "B-x"]] * 3, "label": ["worse", "better", None]}


def test_saved_to_disk_json_lines_and_images(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    assert make("text").read(tmp_path / "saved", Columns()).inputs == ("a", "b")
    rows.save_to_disk(str(tmp_path / "one"))
    assert make("text").read(f"hub:{tmp_path / 'one'}:train", Columns()).inputs == ("a", "b")
    lines = tmp_path / "lines"
    lines.mkdir()
    text = "".join(json.dumps({"text": t}) + "\n" for t in "cd")
    (lines / "train.jsonl").write_text(text)
    assert load_public(f"hub:{lines}", "text", "text", (), 0, 0) == ["c", "d"]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(stream, "PNG")
    made = datasets.Dataset.from_dict(
        {"img": [{"bytes": stream.getvalue(), "path": None}] * 2, "label": [0, 1]},
        features=datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        ),
    )
    made.to_parquet(str(pictures / "train.parquet"))
    found = make("image").read(f"hub:{pictures}", Columns(image="img"))
    assert found.inputs == (stream.getvalue(),) * 2 and found.labels.tolist() == [0, 1]


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set")
    with pytest.raises(UserError, match=r"no column named 'text'; .*'sentence'"):
        make("text").read(f"hub:{folder}", Columns())
    with pytest.raises(UserError, match="the split 'dev' cannot be loaded"):
        hub.read_columns(f"hub:{folder}:dev", ["label"])
    with pytest.raises(UserError, match=r"the split 'train' cannot be loaded .*\.$") as caught:
        hub.read_columns(f"hub:{tmp_path / 'nothing'}", ["label"], "data.train")
    assert str(tmp_path) not in caught.value.public


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("hub:a/b", hub.Source("a/b")),
        ("hub:a/b:train[:90%]", hub.Source("a/b", split="train[:90%]")),
        ("hub:a/b#c:test", hub.Source("a/b", "c", "", "test")),
        ("hub:a/b#c@main:test", hub.Source("a/b", "c", "main", "test")),
        ("hub:a/b@1.0", hub.Source("a/b", revision="1.0")),
    ],
)
def test_the_parts_of_a_name(spec: str, want: hub.Source) -> None:
    assert hub.parse(spec) == want
    assert hub.absolute(spec) == spec


def test_a_relative_folder_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    found = absolute_files({"data.train": "hub:set:train", "data.test": "set", "data.public": ""})
    assert found["data.train"] == f"hub:{tmp_path / 'set'}:train"
    assert found["data.test"] == str(tmp_path / "set")
    assert absolute_files({"data.train": "hub:a/b:train"})["data.train"] == "hub:a/b:train"
