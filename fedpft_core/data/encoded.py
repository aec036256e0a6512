"""Model inputs of all rows, as one bundle of tensors.

Shapes: rows = examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


UNLEARNED = -100
"""The label of a token at which nothing is to be learned."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Model inputs of all rows: ragged token ids, pixels, or pixels with prompts.

    Ragged: row i is ``ids[offsets[i]:offsets[i + 1]]``. A plain bundle of tensors and numbers, so
    that it can be stored with safetensors (:meth:`tensors`).
    """

    labels: torch.Tensor | None
    """What the task has to learn of each row, first axis rows; None for unlabelled rows, and for
    rows with token labels."""
    ids: torch.Tensor | None = None
    """int32 (all tokens,): the rows' token ids one after the other; None for images."""
    offsets: torch.Tensor | None = None
    """int64 (rows + 1,); None for images."""
    prompts: torch.Tensor | None = None
    """int32 (rows, tokens): token ids of the prompts that images come with, padded to one length;
    None without."""
    token_types: torch.Tensor | None = None
    """uint8 (all tokens,), aligned with ids; None if the tokenizer yields none."""
    token_labels: torch.Tensor | None = None
    """int32 (all tokens,), aligned with ids: what is to be learned at each token, -100 for nothing;
    None where rows are learned as wholes."""
    pixels: torch.Tensor | None = None
    """(rows, channels, height, width): uint8 with ``scale`` and ``shift``, else float32; None for
    texts."""
    scale: torch.Tensor | None = None
    """float32 (channels,): pixel_values = pixels · scale + shift; None if pixels are final."""
    shift: torch.Tensor | None = None
    """float32 (channels,); None with ``scale``."""
    pad_id: int = 0
    """Token id that fills rows up."""
    pad_token_type: int = 0
    """Token type that fills rows up."""

    def __len__(self) -> int:
        if self.pixels is not None:
            return len(self.pixels)
        return 0 if self.offsets is None else len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 (rows,): tokens per row; 1 for images."""
        if self.offsets is None:
            return np.ones(len(self), dtype=np.int64)
        return np.diff(self.offsets.numpy())

    @property
    def learned_rows(self) -> int:
        """Rows of which something is learned: with token labels those that have one."""
        if self.token_labels is None or self.offsets is None:
            return len(self)
        learned = np.concatenate([[0], (self.token_labels.numpy() != UNLEARNED).cumsum()])
        return int((np.diff(learned[self.offsets.numpy()]) > 0).sum())

    def select(self, rows: np.ndarray) -> Encoded:
        """The rows with these numbers, in this order.

        Args:
            rows: row numbers, int64 (n,); one may come several times.

        Returns:
            A bundle of n rows, with copies of theirs.
        """
        import torch

        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        changes: dict[str, Any] = {}
        if self.labels is not None:
            changes["labels"] = self.labels[index]
        if self.prompts is not None:
            changes["prompts"] = self.prompts[index]
        if self.pixels is not None:
            changes["pixels"] = self.pixels[index]
        elif self.offsets is not None and self.ids is not None:
            length = (self.offsets[1:] - self.offsets[:-1])[index]
            changes["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
            # Token t of new row r lies where its old row begins, plus t.
            begin = torch.repeat_interleave(
                self.offsets[:-1][index] - changes["offsets"][:-1], length
            )
            place = begin + torch.arange(len(begin))
            changes["ids"] = self.ids[place]
            for name in ("token_types", "token_labels"):
                if getattr(self, name) is not None:
                    changes[name] = getattr(self, name)[place]
        return replace(self, **changes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are not None, by field name.

        Returns:
            The tensors themselves, not copies.
        """
        names = (
            "labels", "ids", "offsets", "token_types", "token_labels", "pixels", "scale", "shift",
            "prompts",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, torch.Tensor], pad_id: int = 0, pad_token_type: int = 0
    ) -> Encoded:
        """The inverse of :meth:`tensors`.

        Args:
            tensors: by field name; fields that are absent become None.
            pad_id: the token id that fills rows up.
            pad_token_type: the token type that fills rows up.

        Returns:
            The rows, with these very tensors.
        """
        fields: dict[str, Any] = {"labels": None, **tensors}
        return Encoded(**fields, pad_id=pad_id, pad_token_type=pad_token_type)
