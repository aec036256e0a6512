"""Tasks from own files: labels, splits, subsets, and bad rows."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import stratified_subset
from fedpft_core.errors import UserError
from fedpft_core.task import load_task, make
from fedpft_core.task.labels import label_index


@dataclass(frozen=True)
class Data:
    train: str = ""
    validation: str = ""
    test: str = ""
    text_column: str = "text"
    text_pair_column: str = ""
    image_column: str = ""
    label_column: str = "label"
    task: str = ""
    label_separator: str = ","
    response_column: str = ""
    messages_column: str = ""
    source_column: str = ""
    labels: str = ""
    validation_share: float = 0.0
    max_bad_rows: float = 0.0
    max_train_rows: int = 0
    max_test_rows: int = 0


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(labels: list[Any], prefix: str = "t") -> list[dict[str, Any]]:
    return [{"text": f"{prefix}{i}", "label": label} for i, label in enumerate(labels)]


def png(colour: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def fault(data: Data, seed: int = 0) -> str:
    with pytest.raises(UserError) as caught:
        load_task(data, seed)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def test_label_names_are_sorted_and_integers_numerically(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", rows_of([10, 2, "2", 9.0, " 10 "]))
    task = load_task(Data(train=train, test=train), 0)
    assert task.task.labels == ("2", "9", "10")
    assert task.train.labels.tolist() == [2, 0, 0, 1, 2]
    names = write_jsonl(tmp_path / "b.jsonl", rows_of(["pear", "apple", "pear"]))
    task = load_task(Data(train=names, test=names), 0)
    assert task.task.labels == ("apple", "pear")
    assert task.test.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("as_file", [True, False])
def test_declared_labels_take_names_integers_and_numerals(tmp_path: Path, as_file: bool) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", rows_of(["low", 2, "1", 0.0, "high"]))
    labels = "low, mid, high"
    if as_file:
        (tmp_path / "names.json").write_text('["low", "mid", "high"]')
        labels = str(tmp_path / "names.json")
    task = load_task(Data(train=train, test=train, labels=labels), 0)
    assert task.task.labels == ("low", "mid", "high")
    assert task.train.labels.tolist() == [0, 2, 1, 0, 2]


@pytest.mark.parametrize(
    ("names", "value", "want"),
    [
        (("5", "7"), 7, 1),
        (("5", "7"), "7", 1),
        (("5", "7"), "07", 1),
        (("5", "7"), 7.0, 1),
        (("5", "7"), 0, None),  # all names are integers: by name only
        (("a", "b"), 1, 1),
        (("a", "b"), "1", 1),
        (("a", "b"), "1.0", 1),
        (("a", "b"), 2, None),
        (("a", "b"), -1, None),
        (("a", "b"), "B", None),
        (("a", "b"), " b ", 1),
        (("a", "b"), 0.5, None),
        (("a", "b"), "²", None),
        (("0-20", "1"), "1", 1),  # a name wins over an index
    ],
)
def test_label_index(names: tuple[str, ...], value: Any, want: int | None) -> None:
    assert label_index(value, names) == want


def test_csv_and_jsonl_give_the_same_examples(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,1\ny,0\n")
    lines = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
    )
    a = make("text", ("n", "p")).read(tmp_path / "a.csv", Columns())
    b = make("text", ("n", "p")).read(lines, Columns())
    assert a.inputs == b.inputs == ("x", "y")
    assert a.labels.tolist() == b.labels.tolist() == [1, 0]


def test_unknown_label_names_file_row_and_label(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(["cat", "dog", "bird"]))
    with pytest.raises(UserError) as caught:
        make("text", ("cat", "dog")).read(path, Columns(), "data-path")
    assert str(caught.value) == (
        f"data-path: {path}: row 3 has the unknown label 'bird'; known are 'cat', 'dog'."
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": " ", "label": 0}, "row 2 has no text in column 'text'"),
        ({"label": 0}, "row 2 has no text in column 'text'"),
        ({"text": 5, "label": 0}, "row 2 holds int instead of text"),
        ({"text": "a", "label": ""}, "row 2 has no label in column 'label'"),
        ({"text": "a", "label": None}, "row 2 has no label in column 'label'"),
        ({"text": "a", "label": float("nan")}, "row 2 has no label in column 'label'"),
    ],
)
def test_bad_row(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 0}, row])
    with pytest.raises(UserError, match=words):
        make("text", ("a", "b")).read(path, Columns())


def test_pairs(tmp_path: Path) -> None:
    rows = [{"text": "a", "other": "b", "label": 0}, {"text": "c", "other": "d", "label": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    task = load_task(Data(train=path, test=path, text_pair_column="other"), 0)
    assert task.task.name == "pair"
    assert task.train.inputs == (("a", "b"), ("c", "d"))
    rows[1]["other"] = ""
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert "row 2 has no text in column 'other'" in fault(
        Data(train=path, test=path, text_pair_column="other")
    )


def test_images_as_bytes_dictionaries_and_paths(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "x.png").write_bytes(png(3))
    (tmp_path / "a.csv").write_text("image,label\nx.png,0\nx.png,1\n")
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 1]}), tmp_path / "b.parquet")
    nested = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "x.png"}]
    pq.write_table(pa.table({"image": nested, "label": [0, 1]}), tmp_path / "c.parquet")
    want = {"a.csv": (3, 3), "b.parquet": (1, 2), "c.parquet": (1, 3)}
    for name, colours in want.items():
        path = str(tmp_path / name)
        task = load_task(Data(train=path, test=path, image_column="image"), 0)
        assert task.task.name == "image"
        assert task.train.inputs == tuple(map(png, colours))


def test_bad_images_name_the_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    for bad, words in (
        (b"not an image", "row 2: the 12 bytes are not a known image format"),
        (b"", "row 2: there is no image"),
        (None, "row 2: there is no image"),
    ):
        pq.write_table(pa.table({"image": [png(1), bad], "label": [0, 1]}), path)
        assert words in fault(Data(train=str(path), test=str(path), image_column="image"))
    (tmp_path / "a.csv").write_text("image,label\nnone.png,0\n")
    with pytest.raises(UserError, match=r"row 1: the image file .*none\.png cannot be read"):
        make("image", ("a", "b")).read(tmp_path / "a.csv", Columns(image="image"))


def test_validation_is_cut_from_train_and_stratified(tmp_path: Path) -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    train = write_jsonl(tmp_path / "a.jsonl", rows_of(labels))
    test = write_jsonl(tmp_path / "b.jsonl", rows_of(["a", "b"], "test"))
    task = load_task(Data(train=train, test=test, validation_share=0.2), 5)
    assert np.bincount(task.validation.labels).tolist() == [12, 6, 2]
    assert np.bincount(task.train.labels).tolist() == [48, 24, 8]
    every = [*task.train.inputs, *task.validation.inputs]
    assert sorted(every) == sorted(f"t{i}" for i in range(100))
    for inputs, numbers in (
        (task.train.inputs, task.train.labels),
        (task.validation.inputs, task.validation.labels),
    ):
        assert [labels[int(str(text)[1:])] for text in inputs] == [
            task.task.labels[c] for c in numbers
        ]
    again = load_task(Data(train=train, test=test, validation_share=0.2), 5)
    other = load_task(Data(train=train, test=test, validation_share=0.2), 6)
    assert again.validation.inputs == task.validation.inputs
    assert other.validation.inputs != task.validation.inputs


def test_subsets_keep_shares_and_leave_validation_alone(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", rows_of(["a", "a", "b", "a"] * 50))
    test = write_jsonl(tmp_path / "b.jsonl", rows_of(["a", "b"] * 20))
    full = load_task(Data(train=train, test=test, validation_share=0.1), 0)
    task = load_task(
        Data(train=train, test=test, validation_share=0.1, max_train_rows=40, max_test_rows=10), 0
    )
    assert np.bincount(task.train.labels).tolist() == [30, 10]
    assert np.bincount(task.test.labels).tolist() == [5, 5]
    assert task.validation.inputs == full.validation.inputs
    assert set(task.train.inputs) < set(full.train.inputs)


def test_given_validation_file_is_used_whole(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", rows_of(["a", "b"] * 5))
    held = write_jsonl(tmp_path / "b.jsonl", rows_of(["b", "a"], "v"))
    task = load_task(Data(train=train, validation=held, test=held, validation_share=0.3), 0)
    assert task.validation.inputs == ("v0", "v1")
    assert len(task.train) == 10


def test_settings_that_are_wrong(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", rows_of(["a", "b"]))
    one = write_jsonl(tmp_path / "b.jsonl", rows_of(["a", "a"]))
    (tmp_path / "n.json").write_text('{"a": 0}')
    (tmp_path / "m.json").write_text("[")
    cases: list[tuple[Data, str]] = [
        (Data(), "data.train and data.test are empty"),
        (Data(train=good), "data.test is empty"),
        (Data(train="builtin:iris", test=good), "data.train is 'builtin:iris'"),
        (Data(train=good, test=good, validation_share=0.5), "data.validation-share is 0.5"),
        (Data(train=good, test=good, validation_share=-0.1), "data.validation-share"),
        (Data(train=good, test=good, validation_share=float("nan")), "data.validation-share"),
        (Data(train=good, test=good, max_train_rows=-1), "data.max-train-rows is -1"),
        (Data(train=good, test=good, max_test_rows=-2), "data.max-test-rows is -2"),
        (Data(train=one, test=good), "only one label, 'a'"),
        (Data(train=good, test=good, labels="a"), "data.labels"),
        (Data(train=good, test=good, labels="a,b,a"), "'a' occurs more than once"),
        (Data(train=good, test=good, labels="a,,b"), "data.labels: a label name is empty"),
        (Data(train=good, test=good, labels="x,y"), "row 1 has the unknown label 'a'"),
        (Data(train=good, test=good, labels=str(tmp_path / "n.json")), "JSON list of names"),
        (Data(train=good, test=good, labels=str(tmp_path / "m.json")), "not valid JSON"),
        (Data(train=good, test=good, labels=str(tmp_path / "o.json")), "no such file"),
        (Data(train=good, test=good, text_column="body"), "no column named 'body'"),
        (Data(train=good, test=str(tmp_path / "no.csv")), "data.test: "),
        (Data(train="builtin:docstrings", image_column="i"), "data.image-column is 'i'"),
        (Data(train=good, test=good, image_column="i", text_pair_column="p"), "both"),
    ]
    for data, words in cases:
        assert words in fault(data), data


def test_test_label_unknown_to_train_is_refused(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", rows_of(["a", "b"]))
    test = write_jsonl(tmp_path / "b.jsonl", rows_of(["a", "c"]))
    assert fault(Data(train=train, test=test)).startswith(
        f"data.test: {test}: row 2 has the unknown label 'c'"
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.integers(0, 2**63 - 1),
    st.data(),
)
def test_stratified_subset(labels: list[int], seed: int, data: st.DataObject) -> None:
    array = np.array(labels)
    count = data.draw(st.integers(0, len(labels)))
    chosen = stratified_subset(array, count, np.random.default_rng(seed))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == count
    for label in set(labels):
        share = count * labels.count(label) / len(labels)
        assert abs((array[chosen] == label).sum() - share) < 2
    more = stratified_subset(array, min(count + 1, len(labels)), np.random.default_rng(seed))
    assert set(chosen) <= set(more)


def test_examples_are_read_only_and_selectable() -> None:
    labels = np.array([2, 0, 1])
    examples = Examples(("a", "b", "c"), labels)
    labels[0] = 9
    assert examples.labels.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="read-only"):
        examples.labels[0] = 1
    some = examples.select([2, 0])
    assert some.inputs == ("c", "a")
    assert some.labels.tolist() == [1, 2]
    assert some.labels.dtype == np.int64
    with pytest.raises(ValueError, match="2 inputs"):
        Examples(("a", "b"), np.array([1]))
