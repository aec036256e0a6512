"""Events of the rounds: who was asked, what came back, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass, field

from server_app.run.schema.event import Event


@dataclass(frozen=True, kw_only=True)
class RoundStarted(Event, name="round_started"):
    """Clients have been drawn for a round."""

    round: int  # its number, from 1
    rounds: int  # rounds planned in all
    attempt: int  # from 1; more where too few replies were good
    clients: list[str]  # names of the clients
    lr: float  # learning rate of the round


@dataclass(frozen=True, kw_only=True)
class Reply(Event, name="reply"):
    """A client has answered, or has failed to. All after `reason` is of good replies only."""

    round: int  # the round
    client: str  # the client's name
    # ok | refused | error | need (it lacks the weights) | late (the round had enough without it, or
    # it came after the deadline) | again (one of its replies is merged already)
    status: str
    seconds: float  # since the round's messages were sent
    reason: str | None = None  # why the reply is of no use
    examples: int | None = None  # rows the client trains on
    loss: float | None = None  # its mean training loss
    staleness: int | None = None  # merges made since it was asked, in the async schedule
    steps: int | None = None  # optimiser steps it made
    train_seconds: float | None = None  # seconds it trained, by its own clock
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part of its work
    # rows it keeps from training, where it has a validation-share
    validation_rows: int | None = None
    validation_value: float | None = None  # the metric on them, of the model it got
    width: str = ""  # of the sub-FM that it trained on, with plan.widths


@dataclass(frozen=True, kw_only=True)
class Joined(Event, name="joined"):
    """A client that connected after a round had begun has been asked as well."""

    round: int  # the round
    client: str  # the client's name


@dataclass(frozen=True, kw_only=True)
class Merged(Event, name="merged"):
    """The replies so far have been merged, and the adapter they give can be used."""

    round: int  # the round under way
    replies: int  # how many were merged
    examples: int  # rows they were trained on
    seconds: float  # since the first message was sent, by the clock of this server process
    norm: float  # the adapter's L2 norm
    merge_seconds: float  # what merging and writing took
    metric: str = ""  # the metric the plugged-in FM was scored by; empty where it was not scored
    value: float | None = None  # its value on the rows of run.eval-split
    score_seconds: float = 0.0  # how long scoring took
    clock: float | None = None  # simulated seconds since the start, where they are simulated


@dataclass(frozen=True, kw_only=True)
class Aggregated(Event, name="aggregated"):
    """What a rule of aggregation has found on its way."""

    round: int  # the round
    rule: str  # federation.aggregate
    # by name; `discarded`: the share of squared singular values that the rank cannot hold
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RoundFinished(Event, name="round_finished"):
    """A round's replies have been averaged and, without align.lag, both models scored."""

    round: int  # the round
    seconds: float  # how long it took, without re-alignment
    exchange_seconds: float  # from drawing clients to the average
    train_seconds: float  # training time of all its good replies, summed
    evaluate_seconds: float  # seconds of scoring
    overhead_seconds: float  # neither training, averaging, scoring nor meanwhile_seconds
    loss: float  # mean training loss, weighted by rows
    examples: int  # rows trained on
    good: int  # good replies
    bad: int  # other replies
    # with align.lag: scores and re-alignment of the round before, while clients trained
    meanwhile_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Bytes(Event, name="bytes"):
    """A message was sent or received; one event for each part of it."""

    round: int  # the round
    client: str  # the client's name
    direction: str  # down (to the client) | up
    kind: str  # package | patch | adapter | counts | control
    bytes: int  # size of the part


@dataclass(frozen=True, kw_only=True)
class PrivacySpent(Event, name="privacy"):
    """What all rounds so far have spent of the clients' privacy, with this one."""

    round: int  # the round
    epsilon: float  # the smaller of the two that follow
    rdp: float  # epsilon by Renyi divergences
    pld: float | None  # epsilon by privacy loss distributions; None where they do not apply
    delta: float  # privacy.delta
    target: float | None  # privacy.epsilon; None for no limit
    noise: float  # privacy.client-noise
    bound: float  # norm to which this round's changes were scaled down
    sampling: str  # poisson | fixed


@dataclass(frozen=True, kw_only=True)
class Stopped(Event, name="stopped"):
    """Rounds have ended, and the adapter of the best round is what becomes of them."""

    round: int  # the last round
    rounds: int  # federation.rounds
    best: int  # whose adapter is kept


@dataclass(frozen=True, kw_only=True)
class Adapter(Event, name="adapter"):
    """The average of a round's adapters."""

    round: int  # the round
    norm: float  # its L2 norm
