"""Serves model inputs as length-grouped batches.

Shapes: rows = examples, B = batch size, L = longest row of the batch (tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fedpft_core.data.encoded import UNLEARNED, Encoded
from fedpft_core.data.pixels import final_pixels

if TYPE_CHECKING:
    import torch

_POOL_BATCHES = 50
"""Rows are sorted by length within pools of at most this many batches …"""
_MIN_POOLS = 4
"""… and of at most a quarter of the data, so that a small client's batches still vary."""


def batches(
    encoded: Encoded,
    batch_size: int,
    generator_seed: int | None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Serve every row exactly once, in ceil(rows / batch_size) batches.

    Args:
        encoded: the rows.
        batch_size: B; one batch may be smaller.
        generator_seed: with a seed, rows are shuffled, cut into pools, sorted by length within
            each pool, cut into batches, and the batches shuffled: a function of the seed alone.
            With None, the longest rows come first and nothing is random (for evaluation).

    Yields:
        For texts ``input_ids``, ``attention_mask`` and, where the tokenizer has them,
        ``token_type_ids``, each int64 (B, L), padded on the right to the batch's own longest row;
        for images ``pixel_values`` float32 (B, channels, height, width). Further ``labels``
        (B, …) unless the rows have none, of rows with token labels int64 (B, L) with -100 behind
        each row's end, and ``index`` int64 (B,): the row numbers in ``encoded``. Of images with
        prompts ``prompt_ids`` int64 (B, tokens), and ``noise_seed`` int64 (B,): what a diffusion
        model draws noise by, a function of the row's number and the seed.

    Raises:
        ValueError: the batch size is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}")
    for rows in _batch_rows(encoded.lengths, batch_size, generator_seed):
        batch = collate(encoded, rows)
        if encoded.prompts is not None:
            batch["noise_seed"] = noise_seeds(rows, generator_seed or 0)
        yield batch


def _batch_rows(lengths: np.ndarray, batch_size: int, seed: int | None) -> Iterator[np.ndarray]:
    rows = len(lengths)
    if seed is None:
        order = np.argsort(-lengths, kind="stable")
        for start in range(0, rows, batch_size):
            yield order[start : start + batch_size]
        return
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows)
    pool = batch_size * max(1, min(_POOL_BATCHES, rows // (batch_size * _MIN_POOLS)))
    for start in range(0, rows, pool):
        inside = order[start : start + pool]
        order[start : start + pool] = inside[np.argsort(-lengths[inside], kind="stable")]
    starts = np.arange(0, rows, batch_size)
    for start in rng.permutation(starts):
        yield order[start : start + batch_size]


def collate(encoded: Encoded, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """One batch of the rows with these numbers.

    Args:
        encoded: the rows.
        rows: row numbers, whole numbers (B,).

    Returns:
        What :func:`batches` serves, but for ``noise_seed``.
    """
    import torch

    index = torch.from_numpy(np.array(rows, dtype=np.int64))
    batch: dict[str, torch.Tensor] = {}
    if encoded.pixels is not None:
        batch["pixel_values"] = final_pixels(encoded.pixels[index], encoded.scale, encoded.shift)
    else:
        batch.update(_padded(encoded, index))
    if encoded.prompts is not None:
        batch["prompt_ids"] = encoded.prompts[index].long()
    if encoded.labels is not None:
        batch["labels"] = encoded.labels[index]
    batch["index"] = index
    return batch


def _padded(encoded: Encoded, index: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    assert encoded.ids is not None and encoded.offsets is not None
    begin = encoded.offsets[index]
    length = encoded.offsets[index + 1] - begin
    width = int(length.max())
    column = torch.arange(width)
    real = column < length[:, None]
    # Gathered in one go; positions beyond a row's end point at token 0 and are overwritten.
    place = torch.where(real, begin[:, None] + column, 0)
    ids = encoded.ids[place].long() if len(encoded.ids) else torch.zeros_like(place)
    batch = {
        "input_ids": torch.where(real, ids, encoded.pad_id),
        "attention_mask": real.long(),
    }
    if encoded.token_types is not None:
        types = encoded.token_types[place].long()
        batch["token_type_ids"] = torch.where(real, types, encoded.pad_token_type)
    if encoded.token_labels is not None:
        learned = encoded.token_labels[place].long() if len(encoded.ids) else place
        batch["labels"] = torch.where(real, learned, UNLEARNED)
    return batch


def noise_seeds(rows: np.ndarray, seed: int) -> torch.Tensor:
    """A seed for each row, spread over all numbers of 62 bits.

    Args:
        rows: row numbers, whole numbers (B,).
        seed: of what the rows are served for.

    Returns:
        int64 (B,), each a function of its row and the seed alone.
    """
    import torch

    drawn = [np.random.default_rng([seed, int(row)]).integers(2**62) for row in rows]
    return torch.from_numpy(np.array(drawn, dtype=np.int64))
