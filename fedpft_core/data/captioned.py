"""Rows that are images with prompts, for text-to-image."""

from __future__ import annotations

from pathlib import Path

from fedpft_core.data import files
from fedpft_core.data.examples import Captioned
from fedpft_core.data.faults import Faults
from fedpft_core.data.folders import is_folder, read_classes
from fedpft_core.data.rows import image_bytes, text_in
from fedpft_core.errors import UserError


def read(
    path: str | Path, image: str, prompt: str, key: str = "", faults: Faults | None = None
) -> list[Captioned]:
    """All rows of one file, in file order.

    Args:
        path: .csv, .tsv, .json, .jsonl or .parquet file; or a folder with a folder of images for
            each prompt, whose name then is the prompt.
        image: column with the images.
        prompt: column with the prompts.
        key: configuration key to name in messages; "" for none.
        faults: where rows are noted that cannot be used; None = the first one is refused.

    Returns:
        Encoded images with their prompts.

    Raises:
        UserError: missing file or column, no column named, no rows, an empty prompt, or no image;
            names the file and the row (from 1), and nothing that stands in the row.
    """
    where = f"{key}: {path}" if key else str(path)
    faults = faults or Faults()
    if str(path).startswith("builtin:"):
        raise UserError(f"{where}: text-to-image needs files of its own (built-in data are texts).")
    if is_folder(path):
        content, names = read_classes(Path(path), where)
        return faults.each(
            len(content),
            lambda i: Captioned(
                image_bytes(content[i], Path(path), f"{where}: image {i + 1}"), names[i]
            ),
        )
    if not image:
        raise UserError(f"{where}: no column with images is named (image-column).")
    cells = files.read_columns(path, [image, prompt], key, faults)
    folder = Path(path).parent

    def row(i: int) -> Captioned:
        at = f"{where}: row {i + 1}"
        text = text_in(cells[prompt][i], prompt, at)
        return Captioned(image_bytes(cells[image][i], folder, at), text)

    return faults.each(len(cells[image]), row)


__all__ = ["read"]
