"""Letting a decoder write, and judging what it wrote against what rows say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpft_core.data.chat import begin
from fedpft_core.data.examples import Examples
from fedpft_core.model.device import device_of
from fedpft_core.model.families import base_model

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_ANSWER = re.compile(r"####\s*([-+]?\$?\d[\d,]*(?:\.\d+)?)")


@dataclass(frozen=True)
class Sample:
    """What a model wrote.

    Attributes:
        prompt: what it was given.
        reference: what the row says.
        response: what it wrote.
    """

    prompt: str
    reference: str
    response: str


@torch.inference_mode()
def write(
    model: nn.Module,
    examples: Examples,
    tokenizer: Any,
    max_length: int,
    new_tokens: int,
    batch_size: int,
) -> list[Sample]:
    """Let a model write the responses of some rows, by its likeliest token each time.

    Prompts of uneven length are padded on the left, so that all responses begin at one place.

    Args:
        model: a causal language model, bare or with the adapter; left in eval mode.
        examples: texts, prompts with responses, or conversations.
        tokenizer: one that has a chat template and a pad token.
        max_length: tokens of a prompt at most; the last ones are kept.
        new_tokens: tokens that are written at most.
        batch_size: rows at once.

    Returns:
        One sample for each row, in order.
    """
    from transformers import GenerationConfig

    model.eval()
    bare: Any = base_model(model)
    # Not the checkpoint's own settings, which may draw at random.
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    begun = begin(examples.inputs, tokenizer, max_length)
    # Prompts of a like length are written together; the order of the rows is kept in the result.
    order = sorted(range(len(begun)), key=lambda i: -len(begun[i].ids))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(begun[rows[0]].ids)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for r, i in enumerate(rows):
            own = torch.tensor(begun[i].ids)
            ids[r, width - len(own) :] = own
            mask[r, width - len(own) :] = 1
        device = device_of(model)
        out = bare.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )
        for i, written in zip(rows, out[:, width:].cpu(), strict=True):
            found[i] = tokenizer.decode(written, skip_special_tokens=True).strip()
    return [Sample(b.prompt, b.reference, found[i]) for i, b in enumerate(begun)]


def exact(sample: Sample) -> bool:
    """Whether a response says what the reference does.

    Where the reference is a number, or ends in one behind #### (as in GSM8K), the last number of
    the response counts; otherwise all of it does, without regard to case and blanks.

    Args:
        sample: a response with its reference.

    Returns:
        Whether they agree.
    """
    answer = _ANSWER.findall(sample.reference)
    alone = _NUMBER.fullmatch(sample.reference.strip().rstrip("."))
    if answer or alone:
        wanted = _value(answer[-1] if answer else sample.reference)
        written = _NUMBER.findall(sample.response)
        return bool(written) and _value(written[-1]) == wanted
    return _folded(sample.response) == _folded(sample.reference)


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("$", "").strip().rstrip("."))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def rouge_l(response: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, without regard to case and punctuation.

    Source: Lin (2004), ROUGE, section 3; with equal weight on precision and recall, as is usual.

    Args:
        response: what was written.
        reference: what it is compared with.

    Returns:
        In [0, 1]; 0 where either has no word.
    """
    a, b = (re.findall(r"\w+", text.casefold()) for text in (response, reference))
    common = _longest(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _longest(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
        before = row
    return before[-1]


__all__ = ["Sample", "exact", "rouge_l", "write"]
