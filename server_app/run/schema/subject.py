"""Events of what a run is about: its models, its task and the nodes that are there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from server_app.run.schema.event import Event


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
