"""How much each reply weighs: by what its client claims, all alike, or claims up to a share."""

from __future__ import annotations

from collections.abc import Sequence

WEIGHTINGS = ("examples", "uniform", "capped")


def weights_of(examples: Sequence[int], weighting: str, cap: float) -> list[float]:
    """The weights of some replies.

    Args:
        examples: what each client says it trains on, each at least 1.
        weighting: `examples`, `uniform`, or `capped`, which is `examples` with nobody above `cap`.
        cap: largest share of all weights that one reply has, in (0, 1].

    Returns:
        One weight for each, above 0; not normalised. By `examples` they are the whole numbers.

    Raises:
        ValueError: there is no such weighting.
    """
    if weighting == "uniform":
        return [1 for _ in examples]
    if weighting == "examples":
        return list(examples)
    if weighting == "capped":
        return capped(examples, cap)
    raise ValueError(f"no weighting {weighting!r}")


def capped(examples: Sequence[int], cap: float) -> list[float]:
    """Lower the largest of some numbers so far that none is more than a share of their sum.

    Args:
        examples: each at least 1.
        cap: the share, in (0, 1].

    Returns:
        The numbers, those above the limit replaced by it; all alike where they are too few for
        the share.
    """
    ordered = sorted(examples, reverse=True)
    rest = sum(ordered)
    if not ordered or ordered[0] <= cap * rest:
        return list(examples)
    for over, largest in enumerate(ordered, start=1):
        rest -= largest
        free = 1 - cap * over
        if free <= 0:
            break
        # `over` of them at the limit t, and t is the share `cap` of over * t + rest.
        limit = cap * rest / free
        if over < len(ordered) and limit >= ordered[over]:
            return [min(float(n), limit) for n in examples]
    return [1.0 for _ in examples]


def shares(weights: Sequence[float]) -> list[float]:
    """Weights as parts of their sum.

    Args:
        weights: at least one, each above 0.

    Returns:
        One share for each; together 1.
    """
    total = sum(weights)
    return [w / total for w in weights]
