"""Rows in memory: inputs, and what is to be learned of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

Chat = tuple[tuple[str, str], ...]
"""The messages of a conversation in order, each a role and what was said."""


@dataclass(frozen=True)
class Captioned:
    """An image with the prompt that describes it."""

    image: bytes
    """Encoded."""
    prompt: str


Input = str | tuple[str, ...] | Chat | bytes | Captioned
"""An example: a text, a pair of texts, a list of words, a conversation, an encoded image, or one
with a prompt."""


def texts_of(row: Input) -> tuple[str | bytes, ...]:
    """The texts of an example, each by itself, or its encoded image.

    Args:
        row: an example's input.

    Returns:
        One text, the two of a pair and the text that they are together (as a list of words is one),
        what was said in each message, or the image, with a prompt or without.
    """
    if isinstance(row, Captioned):
        return (row.image,)
    if not isinstance(row, tuple):
        return (row,)
    parts = tuple(part if isinstance(part, str) else part[1] for part in row)
    return (*parts, " ".join(parts)) if parts == row else parts


@dataclass(frozen=True)
class Examples:
    """Inputs with their labels; row i of one belongs to row i of the other."""

    inputs: tuple[Input, ...]
    """Texts, pairs of texts, lists of words, conversations, or encoded images with or without
    prompts (all of one kind)."""
    labels: np.ndarray
    """What the task has made of the rows' label cells, first axis rows: whole numbers as int64,
    others as float32."""
    left_out: str = field(default="", compare=False)
    """What of their source cannot be used, in words and without anything that stands in it."""

    sources: np.ndarray | None = field(default=None, compare=False)
    """The number of the source that each row is from, int64 (rows,); None where that is unknown."""

    def __post_init__(self) -> None:
        # A read-only copy: examples are shared between clients of one simulation.
        labels = np.asarray(self.labels)
        labels = np.array(labels, dtype=np.float32 if labels.dtype.kind == "f" else np.int64)
        if labels.shape[:1] != (len(self.inputs),):
            raise ValueError(f"{len(self.inputs)} inputs but labels of shape {labels.shape}")
        labels.flags.writeable = False
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.inputs)

    def select(self, indices: Iterable[int] | np.ndarray) -> Examples:
        """The rows with these numbers, in this order.

        Args:
            indices: row numbers, from 0; one may come several times.

        Returns:
            New examples with their own copy of the labels.
        """
        chosen = np.fromiter(indices, dtype=np.int64)
        return Examples(
            tuple(self.inputs[i] for i in chosen),
            self.labels[chosen],
            self.left_out,
            None if self.sources is None else self.sources[chosen],
        )
