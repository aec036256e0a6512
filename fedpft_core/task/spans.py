"""Entities that tags in the IOB format mark, and how they are counted.

A tag is `O`, or a prefix and a type, as in `B-place`. The prefixes: `B` begins an entity and `I`
goes on with one (IOB2, and IOB1, where `B` stands only between two entities of a type); `E` or `L`
ends one and `S` or `U` is a whole one (IOBES, BILOU). An `I` or `E` behind another type or `O`
begins an entity, as in the scorer of CoNLL-2000. scikit-learn has no entities, and the one library
that counts them in common use, seqeval, has had no release since 2020; hence these few lines.
"""

from __future__ import annotations

from collections.abc import Sequence

Entity = tuple[int, int, str]
"""First position, position behind the last, type."""

_BEGIN, _INSIDE, _END, _WHOLE = "B", "I", "EL", "SU"


def are_tags(labels: Sequence[str]) -> bool:
    """Whether labels mark entities: each is `O` or a prefix and a type, and one begins or goes on.

    Args:
        labels: the task's.

    Returns:
        Whether they do.
    """
    marked = [label for label in labels if label != "O"]
    prefixes = set(_BEGIN + _INSIDE + _END + _WHOLE)
    return bool(marked) and all(
        len(label) > 2 and label[1] == "-" and label[0] in prefixes for label in marked
    )


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of one row.

    Args:
        tags: of its words in order.

    Returns:
        Each once; none overlaps another.
    """
    found: set[Entity] = set()
    start, kind = 0, ""  # of the entity that is open; "" for none
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        goes_on = bool(kind) and own == kind and prefix in (_INSIDE, *_END)
        if kind and not goes_on:
            found.add((start, i, kind))
            kind = ""
        if tag == "O":
            continue
        if not goes_on:
            start, kind = i, own
        if prefix in (*_END, *_WHOLE):
            found.add((start, i + 1, own))
            kind = ""
    return found
