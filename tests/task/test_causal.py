"""Next-token losses in chunks and in packed rows: those of the plain way, gradients too."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F

from fedpft_core.data.encoded import UNLEARNED
from fedpft_core.data.packing import pack
from fedpft_core.model.batch import inputs_of
from fedpft_core.model.families import FAMILIES
from fedpft_core.task import causal, make

DECODERS = tuple(name for name, family in FAMILIES.items() if family.causal)
decoders = pytest.mark.parametrize("family", DECODERS)
packing = pytest.mark.parametrize("family", [f for f in DECODERS if FAMILIES[f].packs])
TASK = make("generate")


def writer(family: str, seed: int = 0) -> Any:
    return tiny.writer(family, seed).double()


def batch_of(lengths: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Documents of these lengths; the first half of each is not learned."""
    stream = torch.Generator().manual_seed(seed)
    width, words = max(lengths), len(tiny.vocabulary())
    ids = torch.randint(5, words, (len(lengths), width), generator=stream)
    place = torch.arange(width)
    real = place < torch.tensor(lengths)[:, None]
    learned = real & (place >= torch.tensor(lengths)[:, None] // 2)
    return {
        "input_ids": torch.where(real, ids, 0),
        "attention_mask": real.long(),
        "labels": torch.where(learned, ids, UNLEARNED),
        "index": torch.arange(len(lengths)),
    }


def plain_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The library's scores all at once, document by document, and nothing of ours."""
    total = torch.zeros((), dtype=torch.float64)
    for row, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        n = int(mask.sum())
        scores = model(input_ids=row[None, :n]).logits[0]
        total = total + F.cross_entropy(
            scores[: n - 1], labels[1:n], ignore_index=UNLEARNED, reduction="sum"
        )
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {k: g for k, g in zip(named, found, strict=True) if g is not None}


@decoders
def test_loss_of_a_packed_batch_is_that_of_each_document_alone(family: str) -> None:
    model = writer(family)
    model.get_output_embeddings().requires_grad_(False)
    batch = batch_of((9, 3, 4, 2, 8))
    packed = pack(batch)
    assert len(packed["input_ids"]) == 3  # 9, 8, 4 + 3 + 2
    want, got = plain_loss(model, batch), TASK.loss(model, batch, "sum")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        TASK.loss(model, batch), want / TASK.count(batch), rtol=1e-10, atol=0
    )
    a, b = gradients(model, want), gradients(model, got)
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-8, atol=1e-12, msg=name)


@packing
def test_a_document_does_not_see_its_neighbour(family: str) -> None:
    model = writer(family)
    packed = pack(batch_of((4, 2, 2)))
    assert packed["input_ids"].shape == (2, 4)
    other = {k: v.clone() for k, v in packed.items()}
    other["input_ids"][1, :2] = 7  # the first of the two in the second row
    h = [causal.read(model, b, torch.ones(2, 4, dtype=torch.bool)) for b in (packed, other)]
    same = (h[0] == h[1]).all(-1).reshape(2, 4)
    assert same.tolist() == [[True] * 4, [False, False, True, True]]


def test_packing_keeps_every_token_with_its_label_once() -> None:
    batch = batch_of((5, 1, 2, 3, 5, 4, 1))
    packed = pack(batch)
    begins = packed["position_ids"] == 0
    assert set(packed) == {"input_ids", "attention_mask", "labels", "position_ids"}
    found = []
    for ids, mask, labels, begin in zip(
        packed["input_ids"], packed["attention_mask"], packed["labels"], begins, strict=True
    ):
        starts = [*begin.nonzero().flatten().tolist(), len(ids)]
        for a, b in pairwise(starts):
            if mask[a]:
                assert mask[a:b].all()
                found.append((ids[a:b].tolist(), labels[a + 1 : b].tolist()))
                assert labels[a] == UNLEARNED
            else:
                assert not mask[a:b].any() and (labels[a:b] == UNLEARNED).all()
    want = [
        (ids[:n].tolist(), labels[1:n].tolist())
        for ids, labels, n in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].sum(1), strict=True
        )
    ]
    assert sorted(found) == sorted(want)


def test_a_batch_that_packing_does_not_shorten_stays_as_it_is() -> None:
    batch = batch_of((5, 4, 3))
    packed = pack(batch)
    assert "position_ids" not in packed and "index" not in packed
    assert all(torch.equal(packed[k], batch[k]) for k in packed)
    assert "attention_mask" in inputs_of(packed)
    assert set(inputs_of(pack(batch_of((4, 2, 2))))) == {"input_ids", "position_ids"}


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_loss_in_chunks_is_the_loss_in_one_piece(chunk: int) -> None:
    """Chunks of one, seven and all positions; the scores of no more are ever there."""
    model = writer("llama")
    head = causal.scorer(model)
    head.requires_grad_(False)
    words = len(tiny.vocabulary())
    h = torch.randn(20, head.weight.shape[1], dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, words, (20,))
    sizes = []
    handle = head.register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    got = causal.loss_sum(model, h, target, chunk * 4 * words)
    (g,) = torch.autograd.grad(3 * got, h)
    handle.remove()
    assert max(sizes) == min(chunk, 20) and sum(sizes) == 20
    want = F.cross_entropy(h @ head.weight.T, target, reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(g, torch.autograd.grad(3 * want, h)[0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        causal.losses(model, h, target, chunk * 4 * words).sum(), want, rtol=1e-12, atol=0
    )


def test_divergence_in_chunks_is_that_in_one_piece() -> None:
    a, b = writer("llama"), writer("llama", seed=1)
    batch = batch_of((6, 4))
    got, n = TASK.apart(a, b, batch)
    learned = causal.next_tokens(batch) != UNLEARNED
    assert n == int(learned.sum())
    x, y = (m(**inputs_of(batch)).logits[learned] for m in (a, b))
    want = F.kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    p = next(p for k, p in a.named_parameters() if "q_proj" in k)
    torch.testing.assert_close(
        torch.autograd.grad(got, p)[0], torch.autograd.grad(want, p)[0], rtol=1e-8, atol=1e-12
    )
    torch.testing.assert_close(
        TASK.divergence(TASK.outputs(a, batch)[learned], TASK.outputs(b, batch)[learned]), want / n
    )


def test_nothing_to_learn_is_no_loss_and_no_gradient() -> None:
    model = writer("llama")
    batch = batch_of((4, 3))
    batch["labels"][:] = UNLEARNED
    loss = TASK.loss(model, batch)
    assert float(loss.detach()) == 0 and TASK.count(batch) == 1
    assert all(not g.any() for g in gradients(model, loss).values())
