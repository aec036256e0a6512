"""Whose sums a head is better without, by rows with labels that are known to be right (head.guard).

Sums over rows say nothing of whether the rows' labels are right, and honest clients' sums differ as
much as their rows do; so sums are not held against one another. What tells is the head: the one
that all sums but a client's give, on rows that the server trusts. The shrinkage is that of the head
from all sums throughout. A head with fewer wrong labels may be surer of its scores, so each is
judged at the scale that suits it.

Clients are taken away one after the other, each time the one without whom the mean loss is least,
as long as that lowers it by more than a standard error of the difference (over rows, which are the
same for both heads: paired). Of several attackers the last ones do little harm, and a head of fewer
rows is worse in itself, so that more than `EACH` standard errors would leave them in. That anybody
is left out needs more: at some length of that path, the loss without all who are on it has to be
lower by more standard errors than the best of all sets of so many clients would pass by chance but
once in a hundred times (`CHANCE`; a union bound over these sets, errors taken to be normal).

Shape letters: N rows, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from fedpft_core.head.form import Form, Sums
from fedpft_core.head.statistics import add

CHANCE = 0.01
"""How often chance alone may seem to be an attack, if all differences were noise."""

EACH = 1.0
"""Standard errors by which the loss has to fall without one more client."""


@dataclass(frozen=True)
class Absence:
    """A client whose sums are left out.

    Attributes:
        client: its name.
        gain: by how much the mean loss on the rows falls without its sums.
        error: standard error of that.
    """

    client: str
    gain: float
    error: float


@dataclass(frozen=True)
class Judgement:
    """Whose sums are left out, and what the head has of it.

    Attributes:
        left_out: the clients, in the order in which they were taken away.
        before: mean loss on the rows with all sums.
        after: mean loss without theirs.
    """

    left_out: tuple[Absence, ...]
    before: float
    after: float


def judge(
    form: Form,
    parts: Mapping[str, Sums],
    fixed: float | None,
    features: Tensor,
    answers: Tensor,
    limit: int,
    tell: Callable[[int, int], None] | None = None,
) -> Judgement:
    """Find the clients without whose sums the head is better on some rows.

    A function of what it is given: the clients' order does not matter to the bit. It costs a linear
    system of D unknowns for each client that is there, and once more for each that is taken away;
    and the clients' sums are added up as often times the logarithm of their number.

    Args:
        form: how the head follows from sums.
        parts: the sums of each client, at least one, by its name.
        fixed: the shrinkage to take; None chooses it by all sums and these rows.
        features: float64 [N, D] of labelled rows that no client has, at least two.
        answers: of the same N.
        limit: clients that may be left out, fewer than there are.
        tell: called with the heads made and those that there can be.

    Returns:
        Who is left out, and the loss with and without them.
    """
    kept = dict(sorted(parts.items()))
    share = form.fit(add(kept.values()), fixed, features, answers).shrinkage

    def losses(found: Sums) -> Tensor:
        weight, bias = form.line(found, share)
        return form.losses(features @ weight.T + bias, answers)

    made, most = 0, sum(len(kept) - k for k in range(limit))
    start = now = losses(add(kept.values()))
    taken: list[Absence] = []
    sure = False
    while len(taken) < limit:
        best: tuple[Absence, Tensor] | None = None
        for name, rest in zip(kept, absences(list(kept.values())), strict=True):
            without = losses(rest)
            gain, error = _paired(now, without)
            if gain > EACH * error and (best is None or gain > best[0].gain):
                best = Absence(name, gain, error), without
            made += 1
            if tell:
                tell(made, most)
        if best is None:
            break
        taken.append(best[0])
        now = best[1]
        del kept[best[0].client]
        gain, error = _paired(start, now)
        sure = sure or gain > needed(len(parts), len(taken)) * error
    if tell and made < most:
        tell(most, most)
    before, after = float(start.mean()), float(now.mean())
    return Judgement(tuple(taken), before, after) if sure else Judgement((), before, before)


def needed(clients: int, out: int) -> float:
    """By how many standard errors the loss has to be lower without some clients.

    Args:
        clients: how many there are.
        out: how many of them are left out, at least one.

    Returns:
        The quantile of the normal distribution that a difference passes with probability `CHANCE`
        over the number of sets of so many clients; 3.3 for one of 20, 4.6 for four of them.
    """
    sets = min(math.comb(clients, out), 10**300)
    return -NormalDist().inv_cdf(CHANCE / sets)


def absences(parts: Sequence[Sums]) -> Iterator[Sums]:
    """The sums of all but each, without a subtraction: nothing is left of what only one has.

    Args:
        parts: at least two.

    Yields:
        In the order of the parts, the sum of all others.
    """
    yield from _absences(parts, None)


def _absences(parts: Sequence[Sums], others: Sums | None) -> Iterator[Sums]:
    """The same, with sums besides that all have in common."""
    if len(parts) == 1:
        assert others is not None
        yield others
        return
    half = len(parts) // 2
    for here, there in ((parts[:half], parts[half:]), (parts[half:], parts[:half])):
        both = add(there)
        yield from _absences(here, both if others is None else others.plus(both))


def _paired(before: Tensor, after: Tensor) -> tuple[float, float]:
    """By how much the mean loss falls, and the standard error of that."""
    fall = before - after
    return float(fall.mean()), float(fall.std()) / math.sqrt(len(fall))
