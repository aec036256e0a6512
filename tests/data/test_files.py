"""Own files: what is read, and the one sentence for each thing that can be wrong."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft_core.data.files import read_columns
from fedpft_core.errors import UserError


def sentence(path: Path, columns: list[str], key: str = "") -> str:
    with pytest.raises(UserError) as caught:
        read_columns(path, columns, key)
    text = str(caught.value)
    assert str(path) in text
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_quoted_csv_with_newlines_commas_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label,x\r\n"one\ntwo, ""three""",7,\r\n\r\nNA,007,y\r\n')
    assert read_columns(path, ["label", "text"]) == {
        "label": ["7", "007"],
        "text": ['one\ntwo, "three"', "NA"],
    }


cells = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00\r"), min_size=1
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([("text", "label"), *rows])
    path.write_bytes(stream.getvalue().encode())
    assert read_columns(path, ["text", "label"]) == {
        "text": [a for a, _ in rows],
        "label": [b for _, b in rows],
    }


def test_all_formats_agree(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "a\u2028b", "label": 1}, {"text": "c", "label": 0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    want = {"text": ["a\u2028b", "c"], "label": [1, 0]}
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert read_columns(tmp_path / name, ["text", "label"]) == want


def test_missing_file_folder_and_suffix(tmp_path: Path) -> None:
    assert "no such file" in sentence(tmp_path / "none.csv", ["text"], "data.train")
    (tmp_path / "d.csv").mkdir()
    assert "folder" in sentence(tmp_path / "d.csv", ["text"])
    (tmp_path / "a.xlsx").write_bytes(b"x")
    text = sentence(tmp_path / "a.xlsx", ["text"])
    assert "'.xlsx'" in text and ".parquet" in text


def test_key_leads_the_message(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    assert sentence(path, ["text"], "data.test").startswith(f"data.test: {path}: ")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    assert "empty" in sentence(path, ["text"])
    path.write_bytes(b"text,label\n" if name.endswith("csv") else b"[]")
    if name != "a.jsonl":
        assert "no rows" in sentence(path, ["text"])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_missing_column_lists_the_present_ones(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / name
    if name == "a.csv":
        path.write_text("words,tag\na,b\n")
    elif name == "a.parquet":
        pq.write_table(pa.table({"words": ["a"], "tag": ["b"]}), path)
    else:
        path.write_text('{"words": "a", "tag": "b"}')
    text = sentence(path, ["words", "label"])
    assert "'label'" in text and "'words', 'tag'" in text


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_not_utf8(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    text = sentence(path, ["text"])
    assert "UTF-8" in text and "0xe9 at offset 14" in text


def test_malformed_content_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1\nb,2,3\n")
    assert "row 2 has 3 cells, the header has 2" in sentence(path, ["text"])
    path.write_text('text,label\na,1\n"b,2\n')
    assert "row 2 is not valid CSV" in sentence(path, ["text"])
    path.write_text("text,text\na,1\n")
    assert "'text' occurs more than once" in sentence(path, ["text"])
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n{"text": \n')
    assert "line 2 is not valid JSON" in sentence(lines, ["text"])
    lines.write_text('{"text": "a"}\n[1]\n')
    assert "row 2 is not an object" in sentence(lines, ["text"])
    whole = tmp_path / "a.json"
    whole.write_text('{"text": ')
    assert "line 1 is not valid JSON" in sentence(whole, ["text"])
    whole.write_text("3")
    assert "list of objects" in sentence(whole, ["text"])
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"PAR1 this is not one PAR1")
    assert "not a readable Parquet file" in sentence(parquet, ["text"])
