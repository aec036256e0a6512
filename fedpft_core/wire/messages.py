"""What crosses the network, as plain values.

Every message is a small JSON `head` and named byte parts (`package`, `patch.N`, `adapter`,
`counts`, `merging`, `statistics`), each one safetensors blob: its length is exactly what
the byte ledger counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpft_core.tensors import Tensors
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire.package import Patch

OUT_OF_MEMORY = "out of memory"
"""How the reason of a client's refusal begins when the sub-FM is too large for it."""


@dataclass(frozen=True)
class Hello:
    """First query: who are you, how many rows do you hold, which sub-FMs do you have?"""


@dataclass(frozen=True)
class HelloReply:
    """`name` is the node's stable name; `have` the digests in its own store.

    `examples` are the rows it trains on, `validation` those it keeps from training. `means` is
    what it has and will take, where it says so: `memory` and `package` in bytes, the widest `width`
    by its name, the `blocks` whose LoRA it trains, and what it holds the frozen `base` in.
    """

    name: str
    examples: int
    have: tuple[str, ...] = ()
    version: str = ""
    validation: int = 0
    means: dict[str, int | str] = field(default_factory=dict)
    rank: int = 0  # most of LoRA's rank that it trains; 0 = whatever the run has


@dataclass(frozen=True)
class TrainRequest:
    """One round's work. `package` or `patches` bring the client to `digest` if it is not there.

    `package` is a `Parcel`: the sub-FM's manifest, and what the client is known to lack of it.
    """

    round: int
    digest: str
    adapter: Tensors  # in wire format `fmt`
    fmt: str
    settings: LocalSettings
    seed: int
    count_rule: str = ""  # non-empty: also count inactive neurons by this rule
    package: bytes = b""
    patches: tuple[Patch, ...] = ()
    reply_fmt: str = ""  # format of the reply's adapter; empty = `fmt`
    run: str = ""  # names the run to what a client keeps between its rounds; 16 hex digits
    merging_rule: str = ""  # non-empty: also send such merging figures (fisher, gram)


@dataclass(frozen=True)
class TrainReply:
    """What a client sends back after a round."""

    name: str
    round: int
    digest: str
    examples: int
    steps: int
    loss: float
    seconds: float
    adapter: Tensors
    fmt: str
    counts: Tensors = field(default_factory=dict)  # `{block}` int64 [K], `{block}/tokens` [1]
    timings: dict[str, float] = field(default_factory=dict)
    validation_rows: int = 0  # rows kept from training
    # What the sub-FM with the adapter *received* came to on them; see `Task.sent`.
    validation_sums: dict[str, float] = field(default_factory=dict)
    merging: Tensors = field(default_factory=dict)  # see `fedpft_core.train.merging`
    private: bool = False  # trained with example-level privacy: the loss is not said


@dataclass(frozen=True)
class StatisticsRequest:
    """Class statistics are wanted, of the features that the sub-FM has with this adapter.

    With a `head` the slope of the loss at it is wanted instead (`fedpft_core.head.slope`).
    `package` or `patches` bring the client to `digest` if it is not there.
    """

    round: int  # after which the statistics are taken; 0 = before the first
    digest: str
    adapter: Tensors  # in wire format `fmt`
    fmt: str
    seed: int
    width: int  # features kept at most; wider ones are projected, by a map drawn from the seed
    batch_size: int  # rows at once
    threads: int
    package: bytes = b""
    patches: tuple[Patch, ...] = ()
    head: Tensors = field(default_factory=dict)  # `weight` and `bias` over the features summed


@dataclass(frozen=True)
class StatisticsReply:
    """Sums over a client's rows; see `fedpft_core.head.statistics`."""

    name: str
    round: int
    digest: str
    examples: int
    seconds: float
    statistics: Tensors


@dataclass(frozen=True)
class KeysRequest:
    """Secure aggregation, first: show your public keys for this session."""

    session: str  # 32 hex digits
    round: int


@dataclass(frozen=True)
class KeysReply:
    """A client's public keys, for shares on their way and for the pairs' masks."""

    name: str
    session: str
    sealing: str  # 64 hex digits
    masking: str  # 64 hex digits
    own: str  # digest of the own mask's seed, 64 hex digits


@dataclass(frozen=True)
class SharesRequest:
    """Secure aggregation, second: share your secrets among these neighbours."""

    session: str
    round: int
    index: int  # the client's own number
    threshold: int  # shares that rebuild a secret
    peers: dict[str, list[str]]  # by number the neighbour's two public keys, as in `KeysReply`


@dataclass(frozen=True)
class SharesReply:
    """Shares of a client's secrets, sealed for each neighbour, by its number."""

    name: str
    session: str
    shares: dict[str, str]  # 120 hex digits each


@dataclass(frozen=True)
class SecureTrainRequest(TrainRequest):
    """Secure aggregation, third: train, and send the change and the counts masked."""

    session: str = ""
    bits: int = 16  # of a quantised value, with its sign
    reach: float = 1.0  # what the largest one stands for
    modulus_bits: int = 32  # of the ring in which changes are summed
    longest: float = 0.0  # L2 norm that the change is scaled down to; 0 = as it is
    variance: float = 0.0  # of the Skellam noise on each number; 0 = none
    digits: int = 0  # of each count of inactive neurons, where `count_rule` asks for them
    alive: tuple[int, ...] = ()  # neighbours that have shared their secrets


@dataclass(frozen=True)
class SecureTrainReply:
    """What a client sends back of its training; `adapter` is the one tensor `masked`, uint8."""

    name: str
    session: str
    round: int
    digest: str
    steps: int
    seconds: float
    adapter: Tensors


@dataclass(frozen=True)
class SecureStatisticsRequest(StatisticsRequest):
    """Secure aggregation, third, of statistics: send the sums as whole numbers, masked.

    What a whole number stands for follows from the fields here; see `fedpft_core.head.fixed`.
    """

    session: str = ""
    modulus_bits: int = 62  # of the ring in which sums are summed
    clients: int = 3  # whose sums are added up, at most
    rows: int = 1  # that one of them has, at most
    longest: float = 0.0  # L2 norm that a feature vector can have
    label: float = 0.0  # how far from zero a number to be learned can be; 0 = there are none
    alive: tuple[int, ...] = ()  # neighbours that have shared their secrets


@dataclass(frozen=True)
class SecureStatisticsReply:
    """Sums under masks; `statistics` is the one tensor `masked`, uint8."""

    name: str
    session: str
    round: int
    digest: str
    seconds: float
    statistics: Tensors


@dataclass(frozen=True)
class RevealRequest:
    """Secure aggregation, last: what takes off the masks that do not cancel."""

    session: str
    round: int
    answered: tuple[int, ...]  # neighbours whose numbers are in the sum
    dropped: tuple[int, ...]  # neighbours that shared secrets and whose numbers are not in it
    shares: dict[str, str]  # by neighbour what it sealed for this client


@dataclass(frozen=True)
class RevealReply:
    """Shares by neighbour, 32 hex digits each.

    Of the own mask's seed of those who answered, of the pairs' seed of those who did not.
    """

    name: str
    session: str
    own_shares: dict[str, str]
    pair_shares: dict[str, str]


@dataclass(frozen=True)
class NeedReply:
    """The client lacks the sub-FM it should train on; `have` is what it could start from.

    `lacks` are the digests of the tensors and files of it that are not in its store; None where it
    has not seen the sub-FM's manifest.
    """

    name: str
    digest: str
    have: tuple[str, ...] = ()
    lacks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RefusalReply:
    """The client cannot take part, and says why in one sentence."""

    name: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """No usable reply: Flower reported an error, or the round's time was up.

    `late` says that it was not waited for any longer, `died` that the client's process is gone.
    """

    reason: str
    late: bool = False
    died: bool = False


Message = (
    Hello | HelloReply | TrainRequest | TrainReply | StatisticsRequest | StatisticsReply
    | NeedReply | RefusalReply | KeysRequest | KeysReply | SharesRequest | SharesReply
    | SecureTrainRequest | SecureTrainReply | SecureStatisticsRequest | SecureStatisticsReply
    | RevealRequest | RevealReply
)  # fmt: skip
