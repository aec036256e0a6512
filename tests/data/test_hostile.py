"""Data files that mean harm, or that nobody would expect: one sentence each, and bounded memory."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import tiny
import torch

from fedpft_core.data import encoding, pixels
from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns, cell_text, read_table
from fedpft_core.errors import UserError
from fedpft_core.task import make
from fedpft_core.task.classify import label_names

ROOT = Path(__file__).parents[2]


def bomb(side: int) -> bytes:
    """A PNG of one colour, a few kilobytes for hundreds of megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    row = b"\0" * (1 + (side + 7) // 8)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * side, 9))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def image_rows(path: Path, cell: str) -> None:
    path.write_text(f"image,label\n{cell},a\n")


def test_an_image_that_unpacks_to_gigabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    data = bomb(13_000)
    assert len(data) < 100_000
    (tmp_path / "bomb.png").write_bytes(data)
    image_rows(tmp_path / "rows.csv", "bomb.png")
    with pytest.raises(UserError, match="13000 x 13000 pixels"):
        read_table(tmp_path / "rows.csv", Columns(image="image"))


def test_many_large_images_are_decoded_one_by_one_to_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import Image

    processor = tiny.processor("vit")
    images = []
    for i in range(5):
        out = io.BytesIO()
        Image.effect_noise((60 + i, 40), 50).convert("RGB").save(out, "PNG")
        images.append(out.getvalue())
    rows = Examples(tuple(images), torch.zeros(5, dtype=torch.int64).numpy())
    together = encoding.encode(rows, processor, 8).pixels
    monkeypatch.setattr(pixels, "MOST_PIXELS", 1)
    alone = encoding.encode(rows, processor, 8).pixels
    assert together is not None and alone is not None and torch.equal(together, alone)


@pytest.mark.parametrize("what", ["fifo", "device"])
def test_a_cell_that_names_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path, what: str) -> None:
    name = "/dev/zero"
    if what == "fifo":
        os.mkfifo(tmp_path / "pipe")
        name = "pipe"
    image_rows(tmp_path / "rows.csv", name)
    with pytest.raises(UserError, match="pipe or a device"):
        read_table(tmp_path / "rows.csv", Columns(image="image"))


LONG = """
import resource, sys
sys.path.insert(0, "tests")
import numpy as np, tiny
from fedpft_core.data.encoding import encode
from fedpft_core.data.examples import Examples
tokenizer = tiny.tokenizer("bert")
one = encode(Examples(("the cat " * 10,), np.zeros(1, np.int64)), tokenizer, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
long = encode(Examples(("the cat " * 500_000,), np.zeros(1, np.int64)), tokenizer, 16)
assert long.ids.tolist() == one.ids.tolist()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_cell_of_megabytes_takes_no_hundreds_of_them() -> None:
    done = subprocess.run([sys.executable, "-c", LONG], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, check=True)  # fmt: skip
    assert float(done.stdout) < 100  # 4 MB of text; it used to be 800


def test_the_end_of_a_long_text_is_kept_where_that_is_what_counts() -> None:
    text = "a" * 200_000 + "b"
    assert encoding._bounded([text], 16, "left")[0].endswith("b")
    assert len(encoding._bounded([text], 16, "right")[0]) == 65_536
    assert encoding._bounded(["short"], 16, "right") == ["short"]


@pytest.mark.parametrize("cells", [
    {"text": "a \ud800 b", "label": "x"}, {"text": "a", "label": "x\udfff"},
])  # fmt: skip
def test_half_a_character_is_named(tmp_path: Path, cells: dict[str, str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(cells) + "\n")
    with pytest.raises(UserError, match="row 1 holds half of a character"):
        read_table(path, Columns())


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 10_000])
def test_label_files_that_no_parser_likes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"data\.labels: .*labels\.json"):
        label_names(str(path))


def test_a_parquet_file_with_a_column_twice(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text", "label"]),
                   tmp_path / "rows.parquet")  # fmt: skip
    with pytest.raises(UserError, match=r"rows\.parquet"):
        read_table(tmp_path / "rows.parquet", Columns())


def test_one_label_in_two_spellings_is_one_class(tmp_path: Path) -> None:
    """The same letters as one character or as two: macOS and Windows differ in it."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert cell_text(composed) == cell_text(apart)
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\na,{composed}\nb,{apart}\nc,tea\n", encoding="utf-8")
    task = make("text").learn(path, Columns())
    assert task.labels == (composed, "tea")
    found = make("text", (composed, "tea")).read(path, Columns())
    assert found.labels.tolist() == [0, 0, 1]
    assert label_names(f"{apart}, tea") == (composed, "tea")
