"""The events of a run: each class is one, and its fields are those of its line in events.jsonl.

Every line has `t` (Unix seconds) and `event` (the name in the class's head) besides. A line of a
side run has `arm` too and is no part of the main run's figures (the federation on the undistilled
sub-FM has `arm = "undistilled"`). A field that has a default is left out of the line where it has
that value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run; each subclass names itself in its head."""

    event: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "") -> None:
        cls.event = name
        if name:
            KINDS[name] = cls


# Every event by its name.
KINDS: dict[str, type[Event]] = {}


# ---------------------------------------------------------------- the course of a run


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event, name="run_started"):
    """A run begins, or goes on from a checkpoint."""

    run_dir: str  # the run folder
    version: str  # version of this program
    seed: int  # the run's seed
    method: str  # what the configuration is called (`fedpft`, `fedpetuning`, ...)
    rounds: int  # rounds planned in all
    clients_per_round: int  # clients drawn for each round
    # the last finished round of the run that is resumed; None for a new run
    resumed_from: int | None
    kept: int = 0  # replies of the round after that one which need not be asked for again


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event, name="phase_started"):
    """A part of the run begins."""

    phase: str  # load | build | baselines | undistilled | distil | round | align | local | export
    round: int | None = None  # the round, where the phase is `round` or `align`


@dataclass(frozen=True, kw_only=True)
class PhaseFinished(Event, name="phase_finished"):
    """A part of the run is over."""

    phase: str  # as when it started
    seconds: float  # how long it took
    round: int | None = None  # as when it started


@dataclass(frozen=True, kw_only=True)
class Progress(Event, name="progress"):
    """How far a phase is."""

    phase: str  # the phase, or `evaluate`
    done: int  # what is done of `total`
    total: int  # what there is to do
    unit: str  # what is counted (steps, rows, rounds)
    loss: float | None = None  # the present loss, where there is one
    round: int | None = None  # the round, where the phase belongs to one
    model: str | None = None  # the model that is evaluated


@dataclass(frozen=True, kw_only=True)
class Waiting(Event, name="waiting"):
    """The run waits for others; said again every few seconds."""

    what: str  # nodes | replies
    done: int  # how many are there
    total: int  # how many are waited for
    seconds_left: float  # until the wait is given up


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event, name="run_finished"):
    """The run has ended well."""

    seconds: float  # how long it took, from its start or resumption


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event, name="run_failed"):
    """The run has ended early."""

    reason: str  # one sentence
    again: bool = False  # a simulated client's process died: from a checkpoint the run can go on


@dataclass(frozen=True, kw_only=True)
class Warned(Event, name="warning"):
    """Something a person should know."""

    text: str  # one sentence


@dataclass(frozen=True, kw_only=True)
class Memory(Event, name="memory"):
    """Memory in use so far."""

    process: str  # which process (`server`, or several summed)
    peak_rss_bytes: int  # its largest resident memory, bytes


@dataclass(frozen=True, kw_only=True)
class Files(Event, name="files"):
    """Files the run has written."""

    paths: dict[str, str]  # path by name


# ---------------------------------------------------------------- what the run is about


class BlockSize(TypedDict):
    """A transformer block of the sub-FM.

    Attributes:
        block: its number in the FM.
        kind: its state in the plan: `whole`, `pruned` or `dropped`.
        neurons: FFN neurons it has.
        fm_neurons: FFN neurons the FM's block has.
    """

    block: int
    kind: str
    neurons: int
    fm_neurons: int


@dataclass(frozen=True, kw_only=True)
class Model(Event, name="model"):
    """FM and sub-FM have been made."""

    name: str  # where the FM is from
    fm_parameters: int  # parameters of the FM
    fm_bytes: int  # their size, bytes
    proxy_parameters: int  # parameters of the sub-FM
    proxy_bytes: int  # their size, bytes
    fm_block_parameters: int  # parameters of the FM's transformer blocks
    proxy_block_parameters: int  # parameters of the sub-FM's
    # by model (`fm`, `proxy`) the pair [a, b]: a training step costs a + b·L FLOPs per token
    # at length L
    step_flops: dict[str, Any]
    image_tokens: int | None  # tokens an image becomes; None for texts
    blocks: list[BlockSize]  # the sub-FM's blocks


class Metric(TypedDict):
    """A metric that is shown beside the one that decides.

    Attributes:
        name: its name, as in the `more` of scores.
        higher_is_better: its direction.
        share: whether its values are shares in [0, 1], shown as percent.
    """

    name: str
    higher_is_better: bool
    share: bool


@dataclass(frozen=True, kw_only=True)
class Task(Event, name="task"):
    """The task's rows have been read."""

    name: str  # its name
    kind: str  # what a row is (`text`, `image`, ...)
    train: int  # training rows in all
    validation: int  # the server's validation rows
    test: int  # the server's test rows
    public: int  # public rows for alignment
    # names of the labels; empty where rows have none
    labels: list[str] = field(default_factory=list)
    metric: str  # the metric that models are compared by
    higher_is_better: bool  # its direction
    share: bool  # whether its values are shares in [0, 1], shown as percent
    further: list[Metric] = field(default_factory=list)  # metrics shown beside it, in this order


@dataclass(frozen=True, kw_only=True)
class Nodes(Event, name="nodes"):
    """Clients have connected."""

    count: int  # clients connected now
    names: list[str]  # their names


# ---------------------------------------------------------------- rounds


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
    """A round's replies have been averaged and both models scored."""

    round: int  # the round
    seconds: float  # how long it took, without re-alignment
    exchange_seconds: float  # from drawing clients to the average
    train_seconds: float  # training time of all its good replies, summed
    evaluate_seconds: float  # seconds of scoring
    overhead_seconds: float  # neither training, averaging nor scoring
    loss: float  # mean training loss, weighted by rows
    examples: int  # rows trained on
    good: int  # good replies
    bad: int  # other replies


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
class Adapter(Event, name="adapter"):
    """The average of a round's adapters."""

    round: int  # the round
    norm: float  # its L2 norm


# ---------------------------------------------------------------- scores


@dataclass(frozen=True, kw_only=True)
class Scored(Event):
    """A model has been scored on rows."""

    metric: str  # name of the metric that models are compared by
    value: float  # its value
    error: float | None  # standard error of the value; None where it is unknown
    loss: float | None  # mean loss over the rows; None where it was not measured
    rows: int  # rows scored
    # values of the task's further metrics, by name; without those that were not measured
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Scored, name="evaluation"):
    """A model's score after a round, on the rows of run.eval-split."""

    round: int  # the round; 0 is before the first
    model: str  # proxy | fm | fm-as-trained (its head not refitted, where fm's is)
    split: str  # test | validation
    seconds: float  # how long it took


@dataclass(frozen=True, kw_only=True)
class Confusion(Event, name="confusion"):
    """Which labels a model gave the rows it was scored on; of the server's own rows only."""

    round: int  # as of an evaluation
    model: str  # proxy | fm
    split: str  # as of an evaluation
    # [label's number, number of the label it was given, rows], without pairs that no row has
    counts: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Partition(Event, name="partition"):
    """How a simulation's training rows are divided among its clients."""

    scheme: str  # federation.partition
    clients: dict[str, dict[str, int]]  # by client's name: rows by label


@dataclass(frozen=True, kw_only=True)
class Validation(Scored, name="validation"):
    """A model's score at the end, on the server's validation rows, for choosing settings."""

    round: int  # the last round
    model: str  # proxy | fm
    seconds: float  # how long it took


class Sample(TypedDict):
    """A row with what a model wrote for it.

    Attributes:
        prompt: what the model was given.
        reference: what the row says.
        response: what the model wrote.
    """

    prompt: str
    reference: str
    response: str


@dataclass(frozen=True, kw_only=True)
class Samples(Event, name="samples"):
    """A model has written responses; the texts are cut to what a report shows."""

    round: int  # the round; 0 is before the first
    model: str  # as of an evaluation
    samples: list[Sample]  # the same rows each time
    seconds: float  # how long it took


@dataclass(frozen=True, kw_only=True)
class Pictures(Event, name="pictures"):
    """A model has made images for the prompts of some rows, all with the same noise each time."""

    round: int  # the round; 0 is before the first
    model: str  # as of an evaluation
    prompts: list[str]  # one for each image, in their order; cut to what a report shows
    file: str  # PNG file with the images side by side, relative to the run folder
    seconds: float  # how long it took


@dataclass(frozen=True, kw_only=True)
class Baseline(Scored, name="baseline"):
    """The score of a reference point."""

    name: str  # majority-class | linear-probe | tf-idf | undistilled, or another
    split: str  # as of an evaluation


@dataclass(frozen=True, kw_only=True)
class ClientValidation(Scored, name="client_validation"):
    """What clients with a validation-share found on the rows they keep from training, in all."""

    # the round behind the adapter measured; that of round r is measured while round r + 1
    # trains
    round: int
    clients: int  # how many clients measured


@dataclass(frozen=True, kw_only=True)
class HeadSet(Event, name="head"):
    """The head has been computed from the clients' statistics."""

    round: int  # rounds done
    rows: int  # rows summed over, at the clients; tokens where each has a label
    classes: int  # classes that any of them has; 0 where there are none
    shrinkage: float  # share of the identity in the covariance
    scale: float  # factor of the scores
    loss: float | None  # on the server's rows that shrinkage and scale were chosen by
    # of the rows that judge, those the tuned head labels right, or another merit of the task's
    right_before: float | None
    right_after: float | None  # the same, of the head computed
    taken: bool  # whether the computed head is used
    seconds: float  # the exchange and the computation


@dataclass(frozen=True, kw_only=True)
class Plugged(Event, name="plugged"):
    """The adapter has become the product's."""

    round: int  # rounds done
    method: str  # the candidate that was taken
    # rows that judge and that each candidate labels right, or another merit of the task's that
    # adds up over them; empty without any
    right: dict[str, float]
    # mean loss of each candidate on the rows that judge, where the task has no label to be right
    losses: dict[str, float] = field(default_factory=dict)
    rows: int  # rows that judge; tokens where each has a label
    judged: str = ""  # what `right` over `rows` is called; empty = rows right
    share: bool = False  # whether that is a share in [0, 1], shown as percent
    fitted: int  # rows that candidates were fitted with
    seconds: float  # all candidates together


@dataclass(frozen=True, kw_only=True)
class Refit(Event, name="refit"):
    """The FM's head has been refitted to its own features."""

    round: int  # the round; the number of rounds done at the end
    source: str  # plug.refit
    error_before: float  # features of the FM against the sub-FM's, over their variance
    error_after: float  # the same, through the map that was fitted
    # with plug.refit = better, the score that decides: of the head as trained on validation rows
    # that the map was not fitted to
    score_before: float | None
    score_after: float | None  # the same, of the refitted head
    taken: bool  # whether the refitted head is used
    seconds: float  # how long it took


# ---------------------------------------------------------------- FM and sub-FM


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
