"""Images as pixels: decoded, resized and normalised, with or without prompts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Captioned
from fedpft_core.data.images import decode
from fedpft_core.data.rows import MOST_PIXELS
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    import torch

_IMAGES_AT_ONCE = 64


def encode_images(images: Sequence[bytes], labels: torch.Tensor | None, processor: Any) -> Encoded:
    """Images in the model's size.

    Args:
        images: encoded images.
        labels: first axis rows; None for rows without.
        processor: a Hugging Face image processor.

    Returns:
        The rows in their order, their pixels as bytes where the processor allows it.

    Raises:
        UserError: an image cannot be decoded (its row is named, counting from 1).
    """
    import torch

    parts = [
        raw_pixels(images, range(start, min(start + _IMAGES_AT_ONCE, len(images))), processor)
        for start in range(0, len(images), _IMAGES_AT_ONCE)
    ]
    pixels = torch.cat(parts)
    if pixels.dtype != torch.uint8:
        return Encoded(labels=labels, pixels=pixels)
    scale, shift = scale_and_shift(processor)
    return Encoded(labels=labels, pixels=pixels, scale=scale, shift=shift)


def raw_pixels(images: Sequence[bytes], rows: Sequence[int], processor: Any) -> torch.Tensor:
    """Resized and cropped pixels of some images.

    Args:
        images: encoded images.
        rows: the numbers of those that are wanted.
        processor: a Hugging Face image processor.

    Returns:
        (rows, channels, height, width): bytes where normalising can wait for the batch (a quarter
        of the memory), else float32.

    Raises:
        UserError: an image cannot be decoded (its row is named, counting from 1).
    """
    import torch

    if len(rows) > 1 and sum(_pixels(images[row]) for row in rows) > MOST_PIXELS:
        # As much memory as the largest image may take, however many are asked for at once.
        return torch.cat([raw_pixels(images, [row], processor) for row in rows])
    decoded = [_decode(images[row], row) for row in rows]
    if scale_and_shift(processor) is not None:
        pixels = processor(decoded, do_rescale=False, do_normalize=False, return_tensors="pt")[
            "pixel_values"
        ]
        if pixels.dtype == torch.uint8:
            return torch.as_tensor(pixels).contiguous()
    final = processor(decoded, return_tensors="pt")["pixel_values"]
    return torch.as_tensor(final, dtype=torch.float32).contiguous()


def _pixels(content: bytes) -> int:
    """Pixels that an image says it has; 0 where it is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return int(image.width * image.height)
    except Exception:  # decoding will say what is wrong with it
        return 0


def _decode(content: bytes, row: int) -> Any:
    try:
        return decode(content)
    except Exception as error:  # PIL raises a dozen kinds, SyntaxError among them
        raise UserError(
            f"the image in row {row + 1} cannot be decoded ({type(error).__name__}: {error})."
        ) from error


def scale_and_shift(processor: Any) -> Any:
    """The processor's rescaling and normalisation as one affine map per channel.

    Args:
        processor: a Hugging Face image processor.

    Returns:
        Scale and shift, float32 (channels,) each; None where it does something else.
    """
    import torch

    try:
        factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
        if not processor.do_normalize:
            return torch.full((3,), factor), torch.zeros(3)
        mean = torch.tensor(processor.image_mean, dtype=torch.float64)
        deviation = torch.tensor(processor.image_std, dtype=torch.float64)
    except (AttributeError, TypeError):
        return None
    if mean.shape != (3,) or deviation.shape != (3,):
        return None
    return (factor / deviation).float(), (-mean / deviation).float()


def final_pixels(
    pixels: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> torch.Tensor:
    """Pixels as a model takes them.

    Args:
        pixels: (B, channels, height, width).
        scale: float32 (channels,); None if the pixels are final.
        shift: float32 (channels,); None with ``scale``.

    Returns:
        pixels · scale + shift, float32; the given pixels where they are final.
    """
    if scale is None or shift is None:
        return pixels
    return pixels.float() * scale[:, None, None] + shift[:, None, None]


def encode_captioned(rows: Sequence[Captioned], processor: Any) -> Encoded:
    """Images in the model's size, and their prompts as token ids.

    Args:
        rows: images with prompts.
        processor: a `CaptionedProcessor`.

    Returns:
        The rows in their order, without labels; pixels are in [-1, 1] once they are served.

    Raises:
        UserError: an image cannot be decoded (its row is named, counting from 1).
    """
    import torch

    size = (processor.channels, processor.height, processor.width)
    parts = [torch.zeros(0, *size, dtype=torch.uint8)]
    parts += [processor.images([_decode(row.image, i)]) for i, row in enumerate(rows)]
    prompts = torch.zeros(0, processor.prompt_tokens, dtype=torch.int64)
    if len(rows):
        prompts = processor.prompts([row.prompt for row in rows])
    return Encoded(
        labels=None,
        pixels=torch.cat(parts),
        scale=torch.full((processor.channels,), 2 / 255),
        shift=torch.full((processor.channels,), -1.0),
        prompts=prompts.to(torch.int32),
    )
