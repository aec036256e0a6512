"""Folders of images, images of any mode, and augmentation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from client_app.node import client_for
from fedpft_core.data.augment import augmented
from fedpft_core.data.encoding import encode
from fedpft_core.data.examples import Examples
from fedpft_core.data.folders import read_classes
from fedpft_core.errors import UserError
from fedpft_core.train.tune import LocalSettings, local_batches


def folders(path: Path, rows: int, seed: int) -> Path:
    made = tiny.examples("vit", rows, seed)
    for i, (content, label) in enumerate(zip(made.inputs, made.labels, strict=True)):
        own = path / tiny.LABELS[int(label)]
        own.mkdir(parents=True, exist_ok=True)
        assert isinstance(content, bytes)
        (own / f"{i}.PNG").write_bytes(content)
    return path


def test_a_run_and_a_node_on_folders(tmp_path: Path) -> None:
    flat = tiny.write_task("vit", tmp_path, rows=30)
    del flat["data.image-column"]
    flat |= {
        "data.train": str(folders(tmp_path / "train", 60, 0)),
        "data.test": str(folders(tmp_path / "test", 30, 1)),
        "data.public": str(folders(tmp_path / "public", 30, 2)),
        "train.augment": 0.5, "federation.rounds": 2, "distill.steps": 2, "align.steps": 2,
        "head.start": "statistics",
    }  # fmt: skip
    (tmp_path / "train" / "notes.txt").write_text("no image")
    events = tiny.run(flat, tmp_path / "run")
    (task,) = [e for e in events if e["event"] == "task"]
    assert task["kind"] == "image" and task["labels"] == sorted(tiny.LABELS)
    assert [e for e in events if e["event"] == "evaluation"][-1]["value"] > 0.5
    node = {"name": "a", "data-path": flat["data.train"], "cache-dir": str(tmp_path / "cache")}
    client = client_for(node, {})
    assert client.count_rows() == (60, 0)
    (tmp_path / "train" / "animal" / "new.png").write_bytes(tiny.image(0, np.random.default_rng(9)))
    assert client_for(node, {}).rows_id != client.rows_id


def test_what_is_no_folder_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder holds neither data files nor images"):
        read_classes(tmp_path, "x")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.png lies beside the folders"):
        read_classes(tmp_path, "x")
    own = tmp_path / "own" / "class"
    own.mkdir(parents=True)
    (own / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="not a known image format"):
        tiny.task_of("vit").read(tmp_path / "own", tiny_columns())


def tiny_columns() -> Any:
    from fedpft_core.data.rows import Columns

    return Columns(image="image")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "RGB"])
def test_images_of_any_mode_have_three_channels(mode: str) -> None:
    grey = np.full((16, 16), 140, dtype=np.uint8)
    if mode == "I;16":
        made = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        made = Image.fromarray(grey).convert(mode)
    stream = io.BytesIO()
    made.save(stream, "TIFF")
    found = encode(Examples((stream.getvalue(),), np.zeros(1)), tiny.processor("vit"), 8)
    assert found.pixels is not None and found.pixels.shape == (1, 3, 16, 16)
    level = float(found.pixels.float().mean())
    assert level == pytest.approx(140, abs=2) or mode == "1"


def test_augmentation_is_a_crop_of_the_image_and_maybe_its_mirror() -> None:
    column = torch.arange(32.0).expand(400, 1, 32, 32)  # brightness rises to the right
    moved = augmented(column, 0.25, 0)
    assert moved.shape == column.shape and torch.equal(moved, augmented(column, 0.25, 0))
    assert not torch.equal(moved, augmented(column, 0.25, 1))
    slope = moved[:, 0, 16, -1] - moved[:, 0, 16, 0]
    assert 0.4 < float((slope < 0).float().mean()) < 0.6  # mirrored every other time
    widths = slope.abs() / 31
    assert float(widths.min()) > 0.4 and float(widths.max()) <= 1.001
    rows = augmented(torch.arange(32.0)[:, None].expand(400, 1, 32, 32), 0.25, 0)
    heights = (rows[:, 0, -1, 16] - rows[:, 0, 0, 16]) / 31
    area = widths * heights
    assert float(area.min()) > 0.2 and float(area.max()) > 0.9
    only = augmented(column, 1.0, 3)
    mirrored = only[:, 0, 0, 0] > 16
    torch.testing.assert_close(only[~mirrored], column[~mirrored], atol=1e-3, rtol=0)
    torch.testing.assert_close(only[mirrored], column[mirrored].flip(-1), atol=1e-3, rtol=0)


def test_batches_are_augmented_by_the_seed_and_off_by_default() -> None:
    data = tiny.encoded("vit", 12)

    def served(augment: float, seed: int) -> list[dict[str, torch.Tensor]]:
        settings = LocalSettings(1e-3, 4, 2, 0, 0.0, 1.0, 1, augment=augment)
        return list(local_batches(data, settings, seed))

    plain, first, again, other = served(0, 5), served(0.5, 5), served(0.5, 5), served(0.5, 6)
    assert all(tiny.same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a["index"], b["index"]) for a, b in zip(plain, first, strict=True))
    assert not any(
        torch.equal(a["pixel_values"], b["pixel_values"])
        for part in (first, other) for a, b in zip(plain, part, strict=True)
    )  # fmt: skip
    # A row that comes again in the next epoch is cropped anew.
    seen = {
        int(i): p for b in first[:3] for i, p in zip(b["index"], b["pixel_values"], strict=True)
    }
    later = {
        int(i): p for b in first[3:] for i, p in zip(b["index"], b["pixel_values"], strict=True)
    }
    assert not any(torch.equal(seen[i], later[i]) for i in seen)


def test_texts_are_not_augmented(tmp_path: Path) -> None:
    flat = tiny.write_task("bert", tmp_path, rows=30) | {"train.augment": 0.5}
    with pytest.raises(
        UserError, match=r"train.augment = 0.5 is for images, but the rows are texts"
    ):
        tiny.run(flat, tmp_path / "run")
