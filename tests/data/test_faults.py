"""Rows that cannot be used: left out and counted up to a limit, above which reading stops."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from client_app.node import checked
from fedpft_core import config
from fedpft_core.data.encoding import encode
from fedpft_core.data.examples import Captioned, Examples
from fedpft_core.data.faults import Faults, RowFault, check_learned, exceeded
from fedpft_core.data.images import decode
from fedpft_core.data.public import load_public
from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import check_settings
from fedpft_core.errors import UserError
from fedpft_core.model.processor import load_processor
from fedpft_core.task import load_task, make

SECRET = "the patient's name"


def png(colour: int, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8, 6), (colour, 0, 0) if mode == "RGB" else colour).save(
        stream, "PNG" if mode == "RGB" else "TIFF"
    )
    return stream.getvalue()


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return str(path)


def parquet(path: Path, images: list[bytes]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": images, "label": ["a", "b"] * (len(images) // 2)}), path)
    return str(path)


GOOD = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(8)]
BAD: dict[str, tuple[Any, str]] = {
    "no text": ({"text": "  ", "label": "a"}, "1 without text"),
    "number": ({"text": 3, "label": "a"}, "1 with no text but another type"),
    "no label": ({"text": SECRET}, "1 without label"),
    "half a character": ('{"text": "\\ud800", "label": "a"}\n', "1 with broken text"),
    "no JSON": ('{"text": ' + SECRET + "\n", "1 that are no JSON"),
    "no object": ("[1]\n", "1 that are no objects"),
}


@pytest.mark.parametrize("which", BAD)
@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_bad_row_is_left_out_and_the_others_stay_in_order(
    tmp_path: Path, which: str, place: int
) -> None:
    row, told = BAD[which]
    path = jsonl(tmp_path / "a.jsonl", [*GOOD[:place], row, *GOOD[place:]])
    found = make("text").read(path, Columns(max_bad=1))
    assert found.inputs == tuple(r["text"] for r in GOOD)
    assert found.labels.tolist() == [0, 1] * 4
    assert found.left_out == f"1 of 9 rows cannot be used and is left out ({told})"
    with pytest.raises(UserError, match=rf"(row|line) {place + 1}\b") as caught:
        make("text").read(path, Columns())
    assert SECRET not in str(caught.value)
    # A share of 9 rows below one row is none.
    with pytest.raises(UserError, match=r"1 of 9 rows cannot be used, max-bad-rows = 0\.1\)"):
        make("text").read(path, Columns(max_bad=0.1))


def test_above_the_limit_reading_stops_with_counts_and_nothing_of_a_cell(tmp_path: Path) -> None:
    bad = [row for row, _ in BAD.values()]
    path = jsonl(tmp_path / "a.jsonl", [*GOOD, *bad])
    assert len(make("text").read(path, Columns(max_bad=len(bad)))) == 8
    with pytest.raises(UserError, match="6 of 14 rows cannot be used") as caught:
        make("text").read(path, Columns(max_bad=len(bad) - 1))
    assert SECRET not in str(caught.value) and SECRET not in caught.value.public
    assert "a.jsonl" not in caught.value.public
    assert "6 of 14 rows" in caught.value.public
    # Nothing left is no data, whatever the limit.
    path = jsonl(tmp_path / "b.jsonl", bad)
    with pytest.raises(UserError, match="6 of 6 rows"):
        make("text", ("a", "b")).read(path, Columns(max_bad=100))


def test_a_csv_row_with_too_few_cells_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\ny\nz,b\n")
    found = make("text").read(tmp_path / "a.csv", Columns(max_bad=0.5))
    assert found.inputs == ("x", "z")
    assert "with another number of cells" in found.left_out


@pytest.mark.parametrize(
    ("kind", "good", "bad", "columns"),
    [
        ("text-regression", [1.5, "2"], "high", {"task": "regress"}),
        ("text-labels", ["a,b", "b"], {"a": 1}, {"task": "multi-label"}),
    ],
)
def test_a_label_of_another_kind_is_left_out(
    tmp_path: Path, kind: str, good: list[Any], bad: Any, columns: dict[str, str]
) -> None:
    rows = [{"text": "x", "label": label} for label in (good[0], bad, good[1])]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = make(kind).read(path, Columns(**columns, max_bad=1))
    assert len(found) == 2 and found.left_out.startswith("1 of 3 rows")
    with pytest.raises(UserError, match="row 2 "):
        make(kind).read(path, Columns(**columns))


def test_rows_of_words_and_of_chats(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "w.jsonl",
        [
            {"text": ["a", "b"], "label": ["x", "y"]},
            {"text": ["a", "b"], "label": ["x"]},
            {"text": [], "label": []},
        ],
    )
    found = make("tokens").read(path, Columns(task="tokens", max_bad=2))
    assert found.inputs == (("a", "b"),)
    assert "1 with another number of labels" in found.left_out and "1 without" in found.left_out
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    path = jsonl(tmp_path / "c.jsonl", [{"m": chat}, {"m": chat[:1]}, {"m": None}])
    found = make("generate").read(path, Columns(messages="m", max_bad=2))
    assert found.inputs == ((("user", "q"), ("assistant", "r")),)
    path = jsonl(tmp_path / "p.jsonl", [{"text": "q", "r": "a"}, {"text": "q", "r": " "}])
    found = make("generate").read(path, Columns(response="r", max_bad=1))
    assert found.inputs == (("q", "a"),) and "1 without response" in found.left_out


def test_a_message_after_rows_were_left_out_names_the_row_of_the_file(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", [{"text": " ", "label": "a"}, *GOOD, {"text": "z", "label": "c"}]
    )
    with pytest.raises(UserError, match="row 10 has the unknown label"):
        make("text", ("a", "b")).read(path, Columns(max_bad=5))


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    good = [png(c) for c in (10, 20)]
    broken = {
        "with no known image format": b"no image",
        "with an image that cannot be decoded": good[0][:45],
        "with an image of 32-bit numbers": png(1, "F"),
        "without image": b"",
    }
    path = parquet(tmp_path / "a.parquet", [good[0], *broken.values(), good[1]])
    found = make("image").read(path, Columns(image="image", max_bad=0.8))
    assert found.inputs == tuple(good)
    for kind in broken:
        assert f"1 {kind}" in found.left_out
    with pytest.raises(UserError, match="row 2: "):
        make("image").read(path, Columns(image="image"))
    public = load_public(path, "image", "image", (), 0, 0, max_bad=4)
    assert public == good
    told: list[str] = []
    load_public(path, "image", "image", (), 0, 0, max_bad=4, say=told.append)
    assert len(told) == 1 and told[0].startswith("data.public: 4 of 6 rows")


def test_a_jpeg_cut_short_is_no_image(tmp_path: Path) -> None:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    whole = stream.getvalue()
    path = parquet(tmp_path / "a.parquet", [whole, whole[: len(whole) // 2]])
    with pytest.raises(UserError, match="row 2: the image cannot be decoded"):
        make("image", ("a", "b")).read(path, Columns(image="image"))


def test_images_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    pixels = np.arange(8 * 4 * 3, dtype=np.uint8).reshape(4, 8, 3)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(stream.getvalue())), np.rot90(pixels, -1))
    plain = io.BytesIO()
    Image.fromarray(pixels).save(plain, "PNG")
    assert np.array_equal(np.asarray(decode(plain.getvalue())), pixels)
    folder = tiny.folder("vit", tmp_path / "m")
    processor = load_processor(str(folder), "image")
    turned = encode(Examples((stream.getvalue(),), np.zeros(1)), processor, 0)
    upright = io.BytesIO()
    Image.fromarray(np.rot90(pixels, -1)).save(upright, "PNG")
    other = encode(Examples((upright.getvalue(),), np.zeros(1)), processor, 0)
    assert turned.pixels is not None and other.pixels is not None
    assert turned.pixels.equal(other.pixels)
    assert Captioned(stream.getvalue(), "p").image == stream.getvalue()


def test_a_run_says_what_it_left_out_file_by_file(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", [*GOOD, BAD["no text"][0]])
    test = jsonl(tmp_path / "b.jsonl", GOOD)
    flat = {"data.train": train, "data.test": test, "data.max-bad-rows": 2}
    found = load_task(config.from_flat(flat).data, 0)
    assert found.left_out == (
        "data.train: 1 of 9 rows cannot be used and is left out (1 without text) "
        "(data.max-bad-rows = 2)",
    )


@pytest.mark.parametrize("limit", [-0.1, 0.995, 1.5, float("nan"), float("inf")])
def test_a_limit_is_a_share_or_a_whole_number(limit: float) -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match="max-bad-rows"):
        check_settings(replace(config.Config().data, max_bad_rows=limit))
    with pytest.raises(UserError, match="max-bad-rows"):
        checked({"name": "n", "data-path": "x.csv", "max-bad-rows": limit})


def test_the_limit_itself_may_be_reached() -> None:
    assert not exceeded(1, 100, 0.01) and exceeded(2, 100, 0.01)
    assert not exceeded(3, 3, 3) and exceeded(4, 1000, 3)
    assert exceeded(1, 10**6, 0) and not exceeded(0, 0, 0)
    check_learned(99, 100, 0.01, "k")
    check_learned(0, 0, 0.0, "k")
    with pytest.raises(UserError, match=r"in 2 of 100 rows the prompt"):
        check_learned(98, 100, 0.01, "k")
    with pytest.raises(UserError, match="in 5 of 5 rows"):
        check_learned(0, 5, 100, "k")
    faults = Faults(5)
    faults.note(1, RowFault("row 2.", "odd"))
    faults.note(1, RowFault("row 2.", "odd"))
    assert faults.each(3, lambda i: i) == [0, 2] and faults.said(3).startswith("1 of 3 rows")
