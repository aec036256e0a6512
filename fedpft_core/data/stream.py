"""Serves public rows without labels for as many batches as a distillation takes.

Shapes: B = batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpft_core.data.batches import collate, noise_seeds
from fedpft_core.data.examples import Captioned
from fedpft_core.data.pixels import encode_captioned, final_pixels, raw_pixels, scale_and_shift
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    import torch


def public_batches(
    texts: Sequence[str] | Sequence[bytes] | Sequence[np.ndarray] | Sequence[Captioned],
    processor: Any,
    batch_size: int,
    length: int,
    steps: int,
    seed: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Serve unlabelled rows for distillation, as often over as ``steps`` batches take.

    Args:
        texts: texts, encoded images with or without prompts, or texts from
            :func:`tokenise_public`.
        processor: a Hugging Face tokenizer for texts, an image processor for images.
        batch_size: B.
        length: tokens per row, special tokens included.
        steps: number of batches.
        seed: the rows' order, drawn anew every time all have been served, is a function of it.

    Yields:
        Exactly ``steps`` batches of B rows as from :func:`batches`, without labels, and of texts
        without ``index``. Texts are strung together in that order and cut into rows of exactly
        ``length`` tokens, each framed by the tokenizer's special tokens, so that no step is spent
        on padding.

    Raises:
        UserError: there is no text (or none with a token), an image cannot be decoded, or the
            special tokens leave no room in ``length``.
        ValueError: the batch size is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}")
    if not len(texts):
        raise UserError("data.public has no rows.")
    if steps < 1:
        return
    if isinstance(texts[0], Captioned):
        yield from _captioned_stream(texts, processor, batch_size, steps, seed)
    elif isinstance(texts[0], bytes):
        yield from _image_stream(texts, processor, batch_size, steps, seed)
    else:
        yield from _packed_stream(texts, processor, batch_size, length, steps, seed)


def tokenise_public(texts: Sequence[Any], tokenizer: Any, ended: bool = False) -> list[np.ndarray]:
    """Tokenise a corpus that is served more than once.

    Args:
        texts: texts of any length; nothing is truncated.
        tokenizer: a Hugging Face tokenizer.
        ended: put the tokenizer's end token behind each text, as a decoder knows it, so that texts
            that are strung together do not run into one another.

    Returns:
        Token ids of each text, int64, without other special tokens; empty ones are left out.

    Raises:
        UserError: nothing is left.
    """
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    end = [tokenizer.eos_token_id] if ended and tokenizer.eos_token_id is not None else []
    rows = [np.asarray([*row, *end], dtype=np.int64) for row in found["input_ids"] if len(row)]
    if not rows:
        raise UserError("data.public has no row with a token.")
    return rows


def _packed_stream(
    texts: Sequence[Any], tokenizer: Any, batch_size: int, length: int, steps: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    import torch

    before, after = _frame(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise UserError(
            f"distill.length is {length}, which the {len(before) + len(after)} special tokens of "
            "the tokenizer fill; raise it."
        )
    rows = texts if isinstance(texts[0], np.ndarray) else tokenise_public(texts, tokenizer)
    # All rows are equally long; only a corpus shorter than one row makes them shorter.
    room = min(room, sum(map(len, rows)))
    with_types = "token_type_ids" in tokenizer.model_input_names
    supply = _endless_cuts(rows, room, seed)
    for _ in range(steps):
        body = [next(supply) for _ in range(batch_size)]
        framed = [np.array([*before, *cut, *after], dtype=np.int64) for cut in body]
        ids = torch.from_numpy(np.stack(framed))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if with_types:
            batch["token_type_ids"] = torch.zeros_like(ids)
        yield batch


def _endless_cuts(rows: Sequence[np.ndarray], room: int, seed: int) -> Iterator[np.ndarray]:
    """Pieces of ``room`` tokens; what is left at the end of an epoch (< room) is left out."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        stream = np.concatenate([rows[i] for i in order])
        for start in range(0, len(stream) - room + 1, room):
            yield stream[start : start + room]
        epoch += 1


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a single text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _image_stream(
    images: Sequence[Any], processor: Any, batch_size: int, steps: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Decode images as they are served.

    Twenty thousand would not fit into memory, and decoding takes a small part of a step's time.

    Yields:
        ``pixel_values`` and ``index`` of each batch.
    """
    import torch

    for rows in _endless_rows(len(images), batch_size, steps, seed):
        pixels = raw_pixels(images, rows, processor)
        if pixels.dtype == torch.uint8:
            pixels = final_pixels(pixels, *scale_and_shift(processor))
        yield {"pixel_values": pixels, "index": torch.tensor(rows)}


def _endless_rows(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of so many batches; their order is drawn anew when all have been served."""
    order: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(order) < batch_size:
            order += np.random.default_rng([seed, epoch]).permutation(count).tolist()
            epoch += 1
        rows, order = order[:batch_size], order[batch_size:]
        yield rows


def _captioned_stream(
    rows: Sequence[Any], processor: Any, batch_size: int, steps: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The same of images with prompts.

    Yields:
        ``pixel_values``, ``prompt_ids``, ``noise_seed`` and ``index`` of each batch.
    """
    import torch

    numbers = _endless_rows(len(rows), batch_size, steps, seed)
    for step, chosen in enumerate(numbers):
        batch = collate(
            encode_captioned([rows[i] for i in chosen], processor), np.arange(len(chosen))
        )
        # Another time that a row is served it gets other noise.
        batch["noise_seed"] = noise_seeds(np.arange(len(chosen)) + step * batch_size, seed)
        yield batch | {"index": torch.tensor(chosen)}
