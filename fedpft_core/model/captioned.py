"""What turns images with prompts into tensors: a tokenizer, and the size of the images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpft_core.errors import UserError, first_line
from fedpft_core.model.shape import Shape

_FILE = "captioned_image.json"
_INDEX = "model_index.json"
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class CaptionedProcessor:
    """How images with prompts are read.

    Attributes:
        tokenizer: of the prompts; all are padded to the length that it says a model can read.
        channels: of the images, 1 (grey) or 3.
        height: in pixels.
        width: in pixels.
    """

    tokenizer: Any
    channels: int
    height: int
    width: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of every prompt, padding included."""
        return int(self.tokenizer.model_max_length)

    def images(self, decoded: Sequence[Any]) -> Tensor:
        """Images in the model's size: scaled to cover it, the middle cut out.

        Args:
            decoded: PIL images of any size and mode.

        Returns:
            uint8 [B, C, H, W].
        """
        from PIL import ImageOps

        size = (self.width, self.height)
        made = [
            np.asarray(ImageOps.fit(image.convert(_MODES[self.channels]), size))
            for image in decoded
        ]
        stacked = np.stack(made).reshape(len(made), self.height, self.width, self.channels)
        return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))

    def prompts(self, texts: Sequence[str]) -> Tensor:
        """Prompts as token ids.

        Args:
            texts: of any length; longer ones are cut.

        Returns:
            int64 [B, P].
        """
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.prompt_tokens
        )
        return torch.tensor(found["input_ids"], dtype=torch.int64).reshape(
            len(texts), self.prompt_tokens
        )

    def check(self, shape: Shape, name: str) -> None:
        """Refuse a tokenizer that does not fit the text encoder.

        Args:
            shape: the model's sizes.
            name: of the model, for messages.

        Raises:
            UserError: there are more tokens, or longer prompts, than the text encoder knows.
        """
        if self.prompt_tokens > shape.prompt_tokens or len(self.tokenizer) > shape.vocabulary:
            raise UserError(
                f"model.name = {name}: the tokenizer has {len(self.tokenizer)} tokens and prompts "
                f"of {self.prompt_tokens}, the text encoder {shape.vocabulary} and "
                f"{shape.prompt_tokens}."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what :func:`load_captioned` reads.

        Args:
            folder: exists.
        """
        self.tokenizer.save_pretrained(folder)
        said = {"channels": self.channels, "height": self.height, "width": self.width}
        (Path(folder) / _FILE).write_text(json.dumps(said), encoding="utf-8")


def load_captioned(source: str) -> CaptionedProcessor:
    """The processor of a pipeline, or one that was saved.

    Args:
        source: a folder in the layout of Stable Diffusion, or as `save_pretrained` writes it.

    Returns:
        The processor.

    Raises:
        UserError: there is no usable tokenizer or size of images in the folder.
    """  # noqa: DOC501  # the ValueError below does not leave this function
    from transformers import AutoTokenizer

    folder = Path(source)
    whole = (folder / _INDEX).is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder / "tokenizer" if whole else folder,
            trust_remote_code=False,
            local_files_only=True,
        )
        size = _of_pipeline(folder) if whole else json.loads((folder / _FILE).read_text("utf-8"))
        made = CaptionedProcessor(tokenizer, size["channels"], size["height"], size["width"])
        if made.channels not in _MODES or not 0 < made.height * made.width < 2**26:
            raise ValueError(f"images of {made.channels} channels, {made.height} x {made.width}")
        if not 0 < made.prompt_tokens < 2**16 or tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token, or says no longest text")
        return made
    except Exception as error:
        raise UserError(
            f"{source}: no usable tokenizer or image size ({first_line(error)})."
        ) from error


def _of_pipeline(folder: Path) -> dict[str, int]:
    unet = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
    side, channels = int(unet["sample_size"]), unet["in_channels"]
    if (folder / "vae" / "config.json").is_file():
        vae = json.loads((folder / "vae" / "config.json").read_text("utf-8"))
        side, channels = side * 2 ** (len(vae["block_out_channels"]) - 1), vae["in_channels"]
    return {"channels": channels, "height": side, "width": side}


__all__ = ["CaptionedProcessor", "load_captioned"]
