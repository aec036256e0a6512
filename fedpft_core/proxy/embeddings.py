"""Rows of the table of word embeddings that stay with the owner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_core.errors import UserError


def seen(public: Iterable[np.ndarray], tokenizer: Any) -> Tensor:
    """Tokens that occur in the public corpus, and the tokenizer's special ones.

    Args:
        public: token ids of each public row.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        Token ids, int64, ascending, each once.
    """
    found = {int(t) for t in tokenizer.all_special_ids}
    for row in public:
        found.update(np.unique(row).tolist())
    return torch.tensor(sorted(found), dtype=torch.int64)


@torch.no_grad()
def withhold(proxy: nn.Module, sent: Tensor, unknown: int | None) -> Tensor:
    """Put one row in the place of all rows of the embedding table that are not to be sent.

    Args:
        proxy: the bare proxy, changed in place; the FM has a table of its own.
        sent: ids of the tokens whose rows stay, int64.
        unknown: id of the tokenizer's unknown token, whose row the others get; None for a
            tokenizer that has none, where they get the mean of the rows that stay.

    Returns:
        Ids of the tokens whose rows were replaced, int64, ascending.

    Raises:
        UserError: the table also scores words, so that the proxy could not write the others.
    """
    table = proxy.get_input_embeddings().weight  # type: ignore[operator]
    scores = proxy.get_output_embeddings()  # type: ignore[operator]
    if scores is not None:
        raise UserError(
            "plan.embeddings = seen: this model scores words by a table of the vocabulary, in "
            "which every word needs a row of its own; use all."
        )
    keep = torch.zeros(len(table), dtype=torch.bool)
    keep[sent[sent < len(table)]] = True
    row = table[unknown] if unknown is not None else table[keep].mean(0)
    row = row.clone()
    table[~keep] = row
    return (~keep).nonzero().flatten()
