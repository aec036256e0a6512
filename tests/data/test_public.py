"""The public corpus from own files, without the task's rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from fedpft_core.data.examples import Examples
from fedpft_core.data.public import load_public
from fedpft_core.errors import UserError


def png(colour: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def examples(*inputs: object) -> Examples:
    return Examples(inputs, np.zeros(len(inputs), dtype=np.int64))  # type: ignore[arg-type]


def test_text_file_one_row_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("One row.\r\n\n  Two\u2028rows. \nThree.\nThree!\n".encode())
    assert load_public(str(path), "", "text", [], 0, 0) == ["One row.", "Two\u2028rows.", "Three."]


def test_task_rows_are_dropped_whatever_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["Keep me.", "the FIRST row", "second text", "Left, of pair", None, "", "right"]
    path.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    avoid = [
        examples("The first row."),
        examples(("Left of pair?", "Right!")),
        examples("Second-text"),
    ]
    assert load_public(str(path), "body", "text", avoid, 0, 0) == ["Keep me."]
    assert len(load_public(str(path), "body", "pair", [], 0, 0)) == 5


def test_subset_is_seeded_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    names = ["".join(chr(97 + int(d)) for d in f"{i:03d}") for i in range(200)]
    path.write_text("text\n" + "\n".join(names))
    first = load_public(str(path), "text", "text", [], 50, 1)
    assert len(first) == 50 and first == sorted(first) and set(first) <= set(names)
    assert first == load_public(str(path), "text", "text", [], 50, 1)
    assert first != load_public(str(path), "text", "text", [], 50, 2)
    assert load_public(str(path), "text", "text", [], 200, 1) == names


def test_images(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(1), png(2), png(1), png(3)]}), path)
    avoid = [examples(png(3))]
    assert load_public(str(path), "image", "image", avoid, 0, 0) == [png(1), png(2)]


def test_faults(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the row\n")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "c.txt").write_bytes(b"caf\xe9\n")
    cases: list[tuple[str, str, str, list[Examples], int, str]] = [
        ("", "", "text", [], 0, "data.public is empty"),
        ("builtin:wiki", "", "text", [], 0, "data.public is 'builtin:wiki'"),
        ("builtin:public", "", "image", [], 0, "which is text, but the task has images"),
        (str(tmp_path / "a.txt"), "", "text", [examples("The row.")], 0, "no rows are left"),
        (str(tmp_path / "a.txt"), "", "text", [], -1, "data.max-public-rows is -1"),
        (str(tmp_path / "b.jsonl"), "text", "text", [], 0, "row 2 holds int"),
        (str(tmp_path / "b.jsonl"), "body", "text", [], 0, "no column named 'body'"),
        (str(tmp_path / "c.txt"), "", "text", [], 0, "not UTF-8"),
        (str(tmp_path / "no.txt"), "", "text", [], 0, "no such file"),
        (str(tmp_path / "no.pdf"), "", "text", [], 0, "unsupported file type"),
    ]
    for spec, column, kind, avoid, limit, words in cases:
        with pytest.raises(UserError) as caught:
            load_public(spec, column, kind, avoid, limit, 0)
        assert words in str(caught.value), spec
        assert str(caught.value).startswith("data.")
