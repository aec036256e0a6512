"""Events of what brings the sub-FM nearer to the FM, and of how alike they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from server_app.run.schema.event import Event


class BlockError(TypedDict):
    """A pruned block with its hidden-state error before and after an alignment."""

    block: int
    error_before: float
    error_after: float


class BlockAgreement(TypedDict):
    """A block with the agreement of its adapter gradients."""

    block: int
    cosine: float
    relative_l2: float


@dataclass(frozen=True, kw_only=True)
class Distilled(Event, name="distilled"):
    """The sub-FM has been distilled from the FM, before round 1."""

    steps: int  # steps made
    seconds: float  # how long they took
    loss_first: float  # loss of the first step
    loss_last: float  # loss of the last
    error_before: dict[int, float]  # hidden-state error by pruned block, before
    output_error: dict[int, float]  # the same, after
    # whether it was found in run.proxy-cache; seconds are then those it took once
    cached: bool = False


@dataclass(frozen=True, kw_only=True)
class Alignment(Event, name="alignment"):
    """Neurons of the sub-FM have been re-aligned after a round."""

    round: int  # the round
    neurons: int  # how many moved
    share: float  # their share (align.proportion)
    loss_before: float  # loss of the first step
    loss_after: float  # loss of the last
    digest_from: str  # digest of the sub-FM's package before
    digest_to: str  # digest after
    seconds: float  # how long it took, with its measurements
    blocks: list[BlockError]  # hidden-state errors by pruned block
    # score of the sub-FM minus that of the FM, its head as trained; None in rounds that are
    # not evaluated
    gap_before: float | None
    gap_after: float | None  # the same, after

    @property
    def moved(self) -> float | None:
        """Score of the sub-FM after minus before; None in rounds that are not evaluated."""
        if self.gap_before is None or self.gap_after is None:
            return None
        return self.gap_after - self.gap_before


@dataclass(frozen=True, kw_only=True)
class AlignmentCheck(Event, name="alignment_check"):
    """With align.threshold, whether an alignment that is due happens."""

    round: int  # the round
    measure: str  # align.disagreement
    value: float  # the disagreement measured
    threshold: float  # align.threshold
    aligned: bool  # whether the alignment happens


@dataclass(frozen=True, kw_only=True)
class Agreement(Event, name="agreement"):
    """How alike the adapter gradients of FM and sub-FM are."""

    round: int  # the round
    when: str  # start | before-align | after-align | end
    cosine: float | None  # cosine of the LoRA gradients
    relative_l2: float | None  # their distance over the FM's norm
    head_cosine: float | None  # cosine of the head's gradients
    head_relative_l2: float | None  # their distance over the FM's norm
    blocks: list[BlockAgreement]  # the same of the LoRA gradients of each block
