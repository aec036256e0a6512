"""Encoded images: whether they are whole, and what they look like upright and in colour."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np

from fedpft_core.data.faults import RowFault

_RANGELESS = ("I", "F")  # 32-bit numbers: what is white in them nobody says


def check(content: bytes, where: str, most_pixels: int) -> None:
    """Refuse what is no image, or not a whole one.

    Args:
        content: of the file.
        where: source and row, put in front of messages.
        most_pixels: of the largest image that is decoded.

    Raises:
        RowFault: the bytes are no image, not a whole one or too large a one, or of a mode whose
            pixels have no known range.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            (width, height), mode = image.size, image.mode
    except Exception as error:  # damaged headers make PIL raise a dozen kinds
        raise RowFault(
            f"{where}: the {len(content)} bytes are not a known image format.",
            "with no known image format",
        ) from error
    if width * height > most_pixels:
        # A few kilobytes can hold an image that takes gigabytes once it is decoded.
        raise RowFault(
            f"{where}: the image has {width} x {height} pixels, more than {most_pixels:,} in all.",
            "with too large an image",
        )
    if mode in _RANGELESS:
        raise RowFault(
            f"{where}: the image is of mode {mode} (32-bit numbers), whose range nobody knows; "
            "save it with 8 or 16 bits.",
            "with an image of 32-bit numbers",
        )
    try:
        with Image.open(io.BytesIO(content)) as image:
            # A JPEG is read whole but not computed in full size, which takes a quarter of the time.
            image.draft("RGB", (1, 1))
            image.load()
    except Exception as error:
        raise RowFault(
            f"{where}: the image cannot be decoded ({type(error).__name__}).",
            "with an image that cannot be decoded",
        ) from error


def decode(content: bytes) -> Any:
    """An image as it is meant to be seen, with three channels of 8 bits.

    Args:
        content: of the file, of any mode; turned as its EXIF orientation says.

    Returns:
        A PIL image of mode RGB. What PIL raises for a broken image is left as it is.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        upright: Any = image
        with contextlib.suppress(Exception):  # tags that cannot be read tell no orientation
            upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # PIL would cut 16 bits off at 255.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")
