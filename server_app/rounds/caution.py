"""What clients claim, taken with caution: rows, losses, lengths of changes, held against the round.

One client cannot be told from a liar by its own figures; beside those of the others it can.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

from fedpft_core.aggregation._weights import shares, weights_of
from fedpft_core.config import FederationConfig
from fedpft_core.train.inactivity import Counts

_ABSURD = 10.0  # a mean loss may be so many times the round's median, and so much above it
_FEWEST = 3  # of two figures nobody can say which is the odd one


def dominating(what: str, claims: Mapping[str, int], f: FederationConfig) -> str | None:
    """A warning where one client has more of a round than it should.

    Args:
        what: what is shared, such as `round 3`.
        claims: rows by client name, each at least 1.
        f: its weighting and weight-cap decide.

    Returns:
        One sentence; None where nobody is above federation.weight-cap, or too few reply for it.
    """
    names = sorted(claims)
    if f.weighting != "examples" or f.weight_cap * len(names) <= 1:
        return None
    found = shares([claims[n] for n in names])
    share, name = max(zip(found, names, strict=True))
    if share <= f.weight_cap:
        return None
    return (
        f"{what}: {name} has {100 * share:.0f}% of all rows by its own count, more than "
        f"federation.weight-cap = {f.weight_cap:g}; with federation.weighting = capped it would "
        "count no more than that"
    )


def scales(claims: Sequence[int], f: FederationConfig) -> list[float]:
    """What part of each client's sums counts, so that it weighs as federation.weighting says.

    Args:
        claims: rows that each client says its sums are of, each at least 1.
        f: the weighting.

    Returns:
        For each a factor in (0, 1], 1 for the one that is shortened least; all 1 for `examples`.
    """
    ratios = [w / n for w, n in zip(weights_of(claims, f.weighting, f.weight_cap), claims,
                                    strict=True)]  # fmt: skip
    most = max(ratios, default=1.0)
    return [r / most for r in ratios]


def scaled_counts(counts: Counts, factor: float) -> Counts:
    """Inactivity counts over a part of the tokens.

    Args:
        counts: as a client sent them.
        factor: in (0, 1].

    Returns:
        Whole counts of the same shares; those given where the factor is 1.
    """
    if factor == 1:
        return counts
    tokens = {b: max(1, round(n * factor)) for b, n in counts.tokens.items()}
    inactive = {
        b: (c.double() * (tokens[b] / counts.tokens[b])).round().to(torch.int64)
        for b, c in counts.inactive.items()
    }
    return Counts(inactive, tokens)


def mean_loss(losses: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean of the clients' losses without absurd ones.

    Args:
        losses: finite, or NaN where a client does not say.
        weights: one for each, above 0.

    Returns:
        The mean of those that are said and not 10 times the round's median and 10 above it; NaN
        where there are none.
    """
    limit = math.inf
    said = [loss for loss in losses if not math.isnan(loss)]
    if len(said) >= _FEWEST:
        middle = statistics.median(said)
        limit = _ABSURD * middle + _ABSURD
    total = weight = 0.0
    for loss, w in zip(losses, weights, strict=True):
        if loss <= limit:
            total += loss * w
            weight += w
    return total / weight if weight else math.nan


def outliers(
    norms: Mapping[str, Mapping[str, float]], steps: Mapping[str, int], most: float
) -> dict[str, str]:
    """Clients whose change is out of all proportion to the others'.

    A client that made more steps may go further: a change counts as too long only if it also is
    by step.

    Args:
        norms: by client name the L2 norms of its change, by what they are of.
        steps: by client name the steps that its rows and the round's settings ask for.
        most: largest multiple of the round's median; 0 = no limit.

    Returns:
        Reasons by client name; empty for fewer than 3 clients.
    """
    out: dict[str, str] = {}
    if not most or len(norms) < _FEWEST:
        return out
    for what in next(iter(norms.values())):
        middle = statistics.median(n[what] for n in norms.values())
        by_step = statistics.median(n[what] / steps[name] for name, n in norms.items())
        for name, n in sorted(norms.items()):
            if min(n[what] - most * middle, n[what] / steps[name] - most * by_step) > 0 < middle:
                out.setdefault(
                    name,
                    f"its change of {what} has a norm of {n[what]:.3g}, more than "
                    f"federation.largest-change = {most:g} times the round's median {middle:.3g}",
                )
    return out
