"""Turns examples into model inputs once, and serves them as length-grouped batches.

Shapes: rows = examples, B = batch size, L = longest row of the batch (tokens).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpft_core.data.examples import Captioned, Examples
from fedpft_core.data.images import decode
from fedpft_core.data.rows import MOST_PIXELS
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    import torch

_POOL_BATCHES = 50
"""Rows are sorted by length within pools of at most this many batches …"""
_MIN_POOLS = 4
"""… and of at most a quarter of the data, so that a small client's batches still vary."""
_IMAGES_AT_ONCE = 64
UNLEARNED = -100
"""The label of a token at which nothing is to be learned."""
_CHARACTERS, _LEAST_CHARACTERS = 256, 65_536  # of a text, for each token that is kept and at least


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
        batch = _collate(encoded, rows)
        if encoded.prompts is not None:
            batch["noise_seed"] = noise_seeds(rows, generator_seed or 0)
        yield batch


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
        return _encode_images(inputs, targets, processor)
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


def _encode_images(images: Sequence[bytes], labels: torch.Tensor | None, processor: Any) -> Encoded:
    import torch

    parts = [
        _raw_pixels(images, range(start, min(start + _IMAGES_AT_ONCE, len(images))), processor)
        for start in range(0, len(images), _IMAGES_AT_ONCE)
    ]
    pixels = torch.cat(parts)
    if pixels.dtype != torch.uint8:
        return Encoded(labels=labels, pixels=pixels)
    scale, shift = _scale_and_shift(processor)
    return Encoded(labels=labels, pixels=pixels, scale=scale, shift=shift)


def _raw_pixels(images: Sequence[bytes], rows: Sequence[int], processor: Any) -> torch.Tensor:
    """Resized and cropped pixels of some images.

    Returns:
        Bytes where normalising can wait for the batch (a quarter of the memory), else float32.
    """
    import torch

    if len(rows) > 1 and sum(_pixels(images[row]) for row in rows) > MOST_PIXELS:
        # As much memory as the largest image may take, however many are asked for at once.
        return torch.cat([_raw_pixels(images, [row], processor) for row in rows])
    decoded = [_decode(images[row], row) for row in rows]
    if _scale_and_shift(processor) is not None:
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


def _bounded(texts: Sequence[str], max_length: int, side: str) -> list[str]:
    """Texts no longer than `max_length` tokens of any real text are.

    A tokenizer takes some 200 bytes for each character before it cuts anything off.

    Returns:
        The texts, of longer ones the end that the tokenizer keeps (`side` is the one it cuts).
    """
    most = max(_LEAST_CHARACTERS, _CHARACTERS * max_length)
    return [t if len(t) <= most else (t[-most:] if side == "left" else t[:most]) for t in texts]


def _decode(content: bytes, row: int) -> Any:
    try:
        return decode(content)
    except Exception as error:  # PIL raises a dozen kinds, SyntaxError among them
        raise UserError(
            f"the image in row {row + 1} cannot be decoded ({type(error).__name__}: {error})."
        ) from error


def _scale_and_shift(processor: Any) -> Any:
    """The processor's rescaling and normalisation as one affine map per channel, or None."""
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


def _collate(encoded: Encoded, rows: np.ndarray) -> dict[str, torch.Tensor]:
    import torch

    index = torch.from_numpy(np.array(rows, dtype=np.int64))
    batch: dict[str, torch.Tensor] = {}
    if encoded.pixels is not None:
        batch["pixel_values"] = _final_pixels(encoded.pixels[index], encoded.scale, encoded.shift)
    else:
        batch.update(_padded(encoded, index))
    if encoded.prompts is not None:
        batch["prompt_ids"] = encoded.prompts[index].long()
    if encoded.labels is not None:
        batch["labels"] = encoded.labels[index]
    batch["index"] = index
    return batch


def _final_pixels(
    pixels: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> torch.Tensor:
    if scale is None or shift is None:
        return pixels
    return pixels.float() * scale[:, None, None] + shift[:, None, None]


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
        pixels = _raw_pixels(images, rows, processor)
        if pixels.dtype == torch.uint8:
            pixels = _final_pixels(pixels, *_scale_and_shift(processor))
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
        batch = _collate(
            encode_captioned([rows[i] for i in chosen], processor), np.arange(len(chosen))
        )
        # Another time that a row is served it gets other noise.
        batch["noise_seed"] = noise_seeds(np.arange(len(chosen)) + step * batch_size, seed)
        yield batch | {"index": torch.tensor(chosen)}


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
