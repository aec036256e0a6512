"""LoRA in fewer blocks: the first or the last n of those a sub-FM has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fedpft_core.adapter.lora import parameters
from fedpft_core.model.families import family_of
from fedpft_core.model.names import is_lora
from fedpft_core.model.plan import Plan

_FORM = re.compile(r"(first|last):([1-9][0-9]{0,3})")


def readable(text: str) -> bool:
    """Whether a text names blocks.

    Args:
        text: `first:n` or `last:n`; empty for all.

    Returns:
        Whether :func:`trained_blocks` can read it.
    """
    return not text or bool(_FORM.fullmatch(text))


def trained_blocks(text: str, plan: Plan) -> tuple[int, ...]:
    """The blocks whose LoRA is trained.

    Args:
        text: `first:n` or `last:n`; empty for all.
        plan: the sub-FM's.

    Returns:
        FM indices; all blocks of the sub-FM where n is more than it has.

    Raises:
        ValueError: the text is none of these.
    """
    if not text:
        return plan.present
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"not first:n or last:n: {text[:40]!r}")
    count = int(found[2])
    return plan.present[:count] if found[1] == "first" else plan.present[-count:]


def in_blocks(name: str, text: str, plan: Plan) -> bool:
    """Whether a tensor of the adapter is trained where LoRA is trained in some blocks only.

    Args:
        name: its FM name.
        text: as of :func:`trained_blocks`.
        plan: the sub-FM's.

    Returns:
        True for LoRA in these blocks, and for whatever is no factor of LoRA's.

    Raises:
        ValueError: the text names no blocks.
    """
    if not text or not is_lora(name):
        return True
    prefix = family_of(plan.model_type).blocks + "."
    number = name[name.find(prefix) + len(prefix) :].partition(".")[0]
    return int(number) in trained_blocks(text, plan)


@contextmanager
def only_blocks(model: nn.Module, text: str, plan: Plan) -> Iterator[None]:
    """Freeze LoRA in all other blocks, for the duration.

    Args:
        model: a sub-FM with an adapter, whose parameters alone require gradients.
        text: as of :func:`trained_blocks`.
        plan: the sub-FM's.

    Yields:
        Nothing. Afterwards all of the adapter requires gradients again.

    Raises:
        ValueError: the text names no blocks.
    """
    frozen = [p for name, p in parameters(model, plan).items() if not in_blocks(name, text, plan)]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


__all__ = ["in_blocks", "only_blocks", "readable", "trained_blocks"]
