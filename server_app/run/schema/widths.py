"""Events of sub-FMs of several widths: which there are, who has which, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from server_app.run.schema.event import Event
from server_app.run.schema.scores import Scored


class WidthSize(TypedDict):
    """The sub-FM of one width.

    Attributes:
        width: its name, as in plan.widths.
        share: of the FM's FFN neurons that it keeps.
        parameters: its parameters.
        package: bytes of its package, within the headers.
        memory: bytes that a client's process takes to train on it, by formula.
        step_flops: the pair [a, b]: a training step costs a + b·L FLOPs per token at length L.
    """

    width: str
    share: float
    parameters: int
    package: int
    memory: int
    step_flops: Any


@dataclass(frozen=True, kw_only=True)
class Widths(Event, name="widths"):
    """There are sub-FMs of several widths, each a part of the next."""

    sizes: list[WidthSize]  # narrowest first
    proxy: str  # the one that is aligned and scored as the sub-FM


@dataclass(frozen=True, kw_only=True)
class WidthGiven(Event, name="width_given"):
    """A client has been given a width to train at, or another than before."""

    round: int  # the round in which it was
    client: str  # the client's name
    width: str  # the width
    before: str = ""  # the width that it had; empty for its first
    blocks: str = ""  # the blocks whose LoRA it trains (`first:n`, `last:n`); empty = all
    reason: str  # why this one, in a few words


@dataclass(frozen=True, kw_only=True)
class WidthScored(Scored, name="width_scored"):
    """The score of the sub-FM of a width, on the rows of run.eval-split."""

    round: int  # the round; 0 is before the first
    width: str  # the width
    split: str  # test | validation


@dataclass(frozen=True, kw_only=True)
class WidthAgreement(Event, name="width_agreement"):
    """How alike the adapter gradients of the FM and of the sub-FM of a width are."""

    round: int  # rounds done
    width: str  # the width
    cosine: float | None  # cosine of the LoRA gradients
    relative_l2: float | None  # their distance over the FM's norm


@dataclass(frozen=True, kw_only=True)
class WidthDistilled(Event, name="width_distilled"):
    """The sub-FM of a width has been distilled from the FM, before round 1."""

    width: str  # the width
    output_error: dict[int, float]  # hidden-state error by pruned block
    seconds: float  # how long it took, where it was distilled alone; 0 with the others
