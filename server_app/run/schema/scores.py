"""Events of scores: of models, of reference points, and of heads that were computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from server_app.run.schema.event import Event


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
    by: str = "label"  # federation.partition-by
    seed: int = 0  # run.seed
    digest: str = ""  # sha256 of the row numbers of all clients


@dataclass(frozen=True, kw_only=True)
class Validation(Scored, name="validation"):
    """A model's score at the end, on the server's validation rows, for choosing settings."""

    round: int  # the last round
    model: str  # proxy | fm
    seconds: float  # how long it took


@dataclass(frozen=True, kw_only=True)
class Backdoor(Event, name="backdoor"):
    """How far a simulated backdoor got, at the end, on rows of run.eval-split not of class 0."""

    round: int  # the last round
    model: str  # proxy | fm
    rows: int  # rows looked at
    obeyed: float  # share of them that the model gives class 0 with simulate.trigger in front
    before: float  # the same without the trigger


@dataclass(frozen=True, kw_only=True)
class Check(Scored, name="check"):
    """The sub-FM's score after a round on validation rows, by which rounds end early."""

    round: int  # rounds done
    best: int  # the round of the best score so far
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
    seconds: float  # the exchanges and the computation
    exchanges: int = 0  # of slopes, by which the head of the statistics was tuned (head.descent)
    descent: int = 0  # the exchange that led to the head which is used; 0 = that of the statistics


class LeftOut(TypedDict):
    """A client whose statistics are left out of the sums.

    Attributes:
        client: its name.
        gain: by how much the mean loss on the server's rows falls without it.
        error: standard error of that.
    """

    client: str
    gain: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Guarded(Event, name="guarded"):
    """Clients' statistics have been held against the server's validation rows (head.guard)."""

    round: int  # rounds done
    width: str = ""  # of the sub-FM that they are of; empty where there is one
    clients: int  # who sent statistics of it
    rows: int  # of the server, that judge; tokens where each has a label
    left_out: list[LeftOut]  # in the order in which they were taken away
    before: float  # mean loss on the rows with everybody's statistics
    after: float  # the same without those that are left out
    seconds: float  # how long it took


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
