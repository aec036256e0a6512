"""Words with a label each: as a row's cells hold them, and as a model's inputs have them.

Shape letters: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpft_core.data.chat import Say
from fedpft_core.data.encoded import UNLEARNED, Encoded
from fedpft_core.data.encoding import ragged, say_cut
from fedpft_core.data.faults import RowFault
from fedpft_core.data.rows import Table
from fedpft_core.errors import UserError
from fedpft_core.model.device import Batch
from fedpft_core.task.labels import STRANGE, LabelTable, shown
from fedpft_core.task.ratio import ratio_sums
from fedpft_core.task.spans import are_tags, entities

MOST_WORDS = 4096
"""Words of a row that are looked at, more than any model reads."""


def word_labels(table: Table) -> list[list[Any]]:
    """The labels of each row's words, as they were read.

    Args:
        table: rows as read.

    Returns:
        For each row a list, as long as its words.

    Raises:
        UserError: a row has not one label for each word, or one that is no name; no cell is quoted.
    """
    return [labels_of(table, i) for i in range(len(table.cells))]


def labels_of(table: Table, i: int) -> list[Any]:
    """The labels of a row's words.

    Args:
        table: rows as read.
        i: the row's number here, from 0.

    Returns:
        The cells of its labels.

    Raises:
        RowFault: the row has not one label for each word.
    """
    words, value = table.inputs[i], table.cells[i]
    at = f"{table.where}: row {table.row(i)}"
    if not isinstance(words, tuple) or not isinstance(value, list | tuple):
        what = type(words if not isinstance(words, tuple) else value).__name__
        raise RowFault(
            f"{at} holds {what} instead of a list of words and a list of their labels.",
            "with no list of labels",
        )
    if len(words) != len(value):
        raise RowFault(
            f"{at} has {len(words)} words but {len(value)} labels.", "with another number of labels"
        )
    for label in value:
        if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
            raise RowFault(
                f"{at} has a word whose label is no name.", "with a label that is no name"
            )
    return list(value)


def class_numbers(table: Table, labels: Sequence[str]) -> np.ndarray:
    """The class number of each word.

    Args:
        table: rows as read.
        labels: the task's.

    Returns:
        int64 [rows, words of the longest], -100 behind a row's last word.

    Raises:
        UserError: a label is unknown, or a row has not as many labels as words; no cell is quoted.
    """
    known, rows = LabelTable(labels), word_labels(table)
    index = {
        str(value): known.index(value) for value in {str(v): v for r in rows for v in r}.values()
    }
    longest = min(max(map(len, rows), default=1), MOST_WORDS)
    found = np.full((len(rows), longest), UNLEARNED, dtype=np.int64)
    for i, row in enumerate(rows):
        for j, value in enumerate(row[:longest]):
            number = index[str(value)]
            if number is None:
                raise UserError(
                    f"{table.where}: row {table.row(i)} has an unknown label at word {j + 1}; "
                    f"known are {shown(labels)}.",
                    public=STRANGE,
                )
            found[i, j] = number
    return found


def encode_words(
    rows: Sequence[tuple[Any, ...]],
    labels: np.ndarray,
    tokenizer: Any,
    max_length: int,
    say: Say | None = None,
) -> Encoded:
    """Rows as model inputs, with the class number of each word at its first sub-word.

    Args:
        rows: the words of each.
        labels: their class numbers, as :func:`class_numbers` gives them.
        tokenizer: a fast Hugging Face tokenizer.
        max_length: tokens per row at most, special tokens included.
        say: told how many rows were cut; None for nobody.

    Returns:
        The rows in their order, labels int64 [rows, positions of the longest].
    """
    texts = [" ".join(map(str, words)) for words in rows]
    found: Mapping[str, Any] = {"input_ids": [], "offset_mapping": []}
    if texts:
        found = tokenizer(
            texts, truncation=True, max_length=max_length, padding=False,
            return_attention_mask=False, return_offsets_mapping=True,
        )  # fmt: skip
    say_cut(found, max_length, say)
    width = max(map(len, found["input_ids"]), default=1)
    out = np.full((len(texts), width), UNLEARNED, dtype=np.int64)
    for i, spans in enumerate(found["offset_mapping"]):
        ends = np.cumsum([len(word) + 1 for word in rows[i]]) - 1
        before = -1
        for j, (begin, end) in enumerate(spans):
            if begin == end:
                continue  # a special token
            # By its last character: some tokenizers count the blank before a word to it.
            word = int(np.searchsorted(ends, end - 1, side="right"))
            if word != before and word < labels.shape[1]:
                out[i, j] = labels[i, word]
            before = word
    return ragged(found, torch.from_numpy(out), tokenizer)


def aligned(batch: Batch) -> Tensor:
    """The labels of a batch, as long as its inputs.

    Args:
        batch: inputs and labels, the labels as long as those of the longest row of all.

    Returns:
        int64 [B, L].
    """
    length = batch["input_ids"].shape[1]
    labels = batch["labels"][:, :length]
    return F.pad(labels, (0, length - labels.shape[1]), value=UNLEARNED)


def word_figures(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], labels: Sequence[str]
) -> dict[str, float]:
    """All figures that a score of words is made from, but the loss.

    Args:
        rows: for each row the class numbers that its words were given, and those that they have.
        labels: the task's; where they are tags, entities are counted, else words.

    Returns:
        `rows`, `words`, `correct`, what `ratio.ratio_sums` gives, and for each class c `hits c` and
        `named c`.
    """
    hits, both = np.zeros((2, len(labels)), dtype=np.int64)
    top, below = [], []
    for given, has in rows:
        right = given == has
        np.add.at(hits, has[right], 1)
        np.add.at(both, np.concatenate([given, has]), 1)
        if are_tags(labels):
            a, b = (entities([labels[c] for c in part]) for part in (given, has))
            top.append(len(a & b))
            below.append(len(a) + len(b))
        else:
            top.append(int(right.sum()))
            below.append(len(has))
    return {
        "rows": len(rows),
        "words": int(sum(len(has) for _, has in rows)),
        "correct": int(hits.sum()),
        **ratio_sums(np.array(top), np.array(below)),
        **{f"hits {c}": int(n) for c, n in enumerate(hits)},
        **{f"named {c}": int(n) for c, n in enumerate(both)},
    }
