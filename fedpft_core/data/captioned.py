"""Rows that are images with prompts, for text-to-image."""

from __future__ import annotations

from pathlib import Path

from fedpft_core.data import files
from fedpft_core.data.examples import Captioned
from fedpft_core.data.folders import is_folder, read_classes
from fedpft_core.data.rows import image_bytes, texts_in
from fedpft_core.errors import UserError


def read(path: str | Path, image: str, prompt: str, key: str = "") -> list[Captioned]:
    """All rows of one file, in file order.

    Args:
        path: .csv, .tsv, .json, .jsonl or .parquet file; or a folder with a folder of images for
            each prompt, whose name then is the prompt.
        image: column with the images.
        prompt: column with the prompts.
        key: configuration key to name in messages; "" for none.

    Returns:
        Encoded images with their prompts.

    Raises:
        UserError: missing file or column, no column named, no rows, an empty prompt, or no image;
            names the file and the row (from 1), and nothing that stands in the row.
    """
    where = f"{key}: {path}" if key else str(path)
    if str(path).startswith("builtin:"):
        raise UserError(f"{where}: text-to-image needs files of its own (built-in data are texts).")
    if is_folder(path):
        content, names = read_classes(Path(path), where)
        found = [
            image_bytes(one, Path(path), f"{where}: image {row}")
            for row, one in enumerate(content, start=1)
        ]
        return [Captioned(*row) for row in zip(found, names, strict=True)]
    if not image:
        raise UserError(f"{where}: no column with images is named (image-column).")
    cells = files.read_columns(path, [image, prompt], key)
    prompts = texts_in(cells[prompt], prompt, where)
    folder = Path(path).parent
    return [
        Captioned(image_bytes(one, folder, f"{where}: row {row}"), text)
        for row, (one, text) in enumerate(zip(cells[image], prompts, strict=True), start=1)
    ]


__all__ = ["read"]
