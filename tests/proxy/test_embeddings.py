"""Rows of the embedding table that stay home."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from fedpft_core.errors import UserError
from fedpft_core.proxy.build import build
from fedpft_core.proxy.embeddings import seen, withhold


@pytest.mark.parametrize("family", ["bert", "electra", "deberta-v2", "llama", "opt"])
def test_only_seen_rows_and_special_ones_are_in_the_proxy(family: str) -> None:
    fm = tiny.model(family)
    proxy = build(fm, tiny.plan_for(fm))
    tokenizer = tiny.tokenizer(family)
    sent = seen([np.array([7, 9, 7]), np.array([12])], tokenizer)
    assert set(sent.tolist()) == {7, 9, 12, *tokenizer.all_special_ids}
    gone = withhold(proxy, sent, tokenizer.unk_token_id)
    mine, own = (m.get_input_embeddings().weight for m in (proxy, fm))  # type: ignore[operator]
    assert torch.equal(mine[sent], own[sent])
    assert sorted([*sent.tolist(), *gone.tolist()]) == list(range(len(own)))
    assert torch.equal(mine[gone], own[tokenizer.unk_token_id].expand(len(gone), -1))
    assert not torch.equal(own[gone[0]], mine[gone[0]])


def test_without_an_unknown_token_the_mean_stands_in() -> None:
    fm = tiny.model("bert")
    proxy = build(fm, tiny.plan_for(fm))
    own = fm.get_input_embeddings().weight  # type: ignore[operator]
    gone = withhold(proxy, torch.tensor([0, 1, 2, 8]), None)
    mine = proxy.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(mine[gone[0]], own[torch.tensor([0, 1, 2, 8])].mean(0))


def test_a_model_that_scores_words_keeps_its_table() -> None:
    fm = tiny.writer("llama")
    proxy = build(fm, tiny.plan_for(fm))
    with pytest.raises(UserError, match=r"plan.embeddings = seen"):
        withhold(proxy, torch.tensor([0, 1, 2]), 1)
