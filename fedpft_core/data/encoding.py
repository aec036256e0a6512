"""Turns examples into model inputs once: texts are tokenised, images decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Examples
from fedpft_core.data.pixels import encode_images

if TYPE_CHECKING:
    import torch

_CHARACTERS, _LEAST_CHARACTERS = 256, 65_536  # of a text, for each token that is kept and at least


def encode(
    examples: Examples,
    processor: Any,
    max_length: int,
    say: Callable[[str], None] | None = None,
) -> Encoded:
    """Tokenise texts, or decode and normalise images, once.

    Args:
        examples: rows of any kind.
        processor: a Hugging Face tokenizer for texts, an image processor for images.
        max_length: tokens per row at most, special tokens included; longer rows are truncated (of
            a pair, the longer text first). Unused for images.
        say: told in one sentence how many rows were truncated; None for nobody.

    Returns:
        The examples' rows in their order, with their labels.

    Raises:
        UserError: an image cannot be decoded (its row is named, counting from 1).
    """
    return _encode(examples.inputs, examples.labels, processor, max_length, say)


def _encode(
    inputs: Sequence[Any],
    labels: np.ndarray | None,
    processor: Any,
    max_length: int,
    say: Callable[[str], None] | None,
) -> Encoded:
    import torch

    targets = None if labels is None else torch.from_numpy(np.array(labels))
    if len(inputs) and isinstance(inputs[0], bytes):
        return encode_images(inputs, targets, processor)
    if len(inputs) and isinstance(inputs[0], tuple):
        texts: tuple[list[str], ...] = ([a for a, _ in inputs], [b for _, b in inputs])
    else:
        texts = (list(inputs),)
    found: Mapping[str, Any] = {"input_ids": []}
    if len(inputs):
        found = processor(
            *(_bounded(t, max_length, processor.truncation_side) for t in texts),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
    say_cut(found, max_length, say)
    return ragged(found, targets, processor)


def say_cut(found: Mapping[str, Any], max_length: int, say: Callable[[str], None] | None) -> None:
    """Say in one sentence how many rows a tokenizer has cut.

    Args:
        found: what it has made of all rows.
        max_length: tokens of a row at most.
        say: told, where there are any; None for nobody.
    """
    rows = getattr(found, "encodings", None) or ()
    cut = sum(bool(row.overflowing) for row in rows)
    if cut and say:
        say(
            f"{cut} of {len(rows)} rows are longer than data.max-length = {max_length} tokens; "
            "what is behind them is cut off"
        )


def ragged(found: Mapping[str, Any], labels: torch.Tensor | None, tokenizer: Any) -> Encoded:
    """Model inputs of tokenised texts.

    Args:
        found: what a tokenizer has made of all rows without padding: `input_ids` and maybe
            `token_type_ids`.
        labels: first axis rows; None for rows without.
        tokenizer: it.

    Returns:
        The rows in their order.
    """
    import torch

    rows = found["input_ids"]
    ends = np.cumsum([0, *map(len, rows)])
    types = found.get("token_type_ids")
    return Encoded(
        labels=labels,
        ids=torch.from_numpy(_flat(rows, np.int32)),
        offsets=torch.from_numpy(ends.astype(np.int64)),
        token_types=None if types is None else torch.from_numpy(_flat(types, np.uint8)),
        pad_id=pad_id(tokenizer),
        pad_token_type=int(getattr(tokenizer, "pad_token_type_id", 0) or 0),
    )


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows up.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Returns:
        Its pad token, or else its end token, or else 0.
    """
    # Decoders often have no pad token; the mask hides whatever stands there.
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def _flat(rows: Sequence[Sequence[int]], dtype: Any) -> np.ndarray:
    total = sum(map(len, rows))
    return np.fromiter((value for row in rows for value in row), dtype=dtype, count=total)


def _bounded(texts: Sequence[str], max_length: int, side: str) -> list[str]:
    """Texts no longer than `max_length` tokens of any real text are.

    A tokenizer takes some 200 bytes for each character before it cuts anything off.

    Returns:
        The texts, of longer ones the end that the tokenizer keeps (`side` is the one it cuts).
    """
    most = max(_LEAST_CHARACTERS, _CHARACTERS * max_length)
    return [t if len(t) <= most else (t[-most:] if side == "left" else t[:most]) for t in texts]
