"""The chain that a reply passes on the server, from its envelope to the aggregation.

`STEPS` is the whole of it, in order. A step takes the reply in hand and what was asked of it, and
returns the reply as the next step gets it; what a step leaves out is released. It raises
`ReplyError` to refuse the reply. A step of one's own is a function and one entry in `STEPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fedpft_core.adapter.lora import change_norms, clip_change, rank_of
from fedpft_core.adapter.ranks import widened
from fedpft_core.aggregation import Replies
from fedpft_core.errors import ReplyError
from fedpft_core.tensors import Tensors
from fedpft_core.train.inactivity import Counts
from fedpft_core.wire import merging
from fedpft_core.wire.envelope import Envelope, open_envelope
from fedpft_core.wire.messages import Message, NeedReply, RefusalReply, TrainReply
from fedpft_core.wire.validate import Expected, check_size, validate, validated_merging
from server_app.rounds.nodes import Node

Reply = TypeVar("Reply", bound=Message)

_NEED_BYTES = 2**20  # of a list of all that belongs to a large model


@dataclass(frozen=True)
class Asked:
    """What a round's replies are held against, and where they go.

    `longest` is federation.clip-update-norm; 0 = no limit. Norms of LoRA's product are multiplied
    by `scaling`, alpha / rank. `rebase` is what becomes of an adapter before it is kept, where it
    was not trained from the round's own; None = nothing. Where clients have sub-FMs of several
    widths, or adapters of several ranks, `own` says what is wanted of each.
    """

    want: Expected
    longest: float
    replies: Replies
    scaling: float = 1.0
    rebase: Callable[[Tensors], Tensors] | None = None
    own: Callable[[Node], Expected] | None = None

    def of(self, node: Node) -> Expected:
        """What a good reply of one client looks like.

        Args:
            node: the client, whose sub-FM may be another than others'.

        Returns:
            What its reply is held against.
        """
        return self.own(node) if self.own else self.want


@dataclass(frozen=True)
class InHand:
    """One reply on its way. `message` has no tensors any more once they are decoded."""

    node: Node
    envelope: Envelope | None
    message: TrainReply | None = None
    adapter: Tensors = field(default_factory=dict)  # float32, as the client has it
    counts: Counts | None = None
    merging: Tensors = field(default_factory=dict)  # float32; empty where none are asked for
    norms: Mapping[str, float] = field(default_factory=dict)  # of the change; see `change_norms`


class Lacking(ReplyError):
    """The client lacks the sub-FM it was asked to train on; `need` is what it says of its store."""

    def __init__(self, need: NeedReply) -> None:
        super().__init__("unexpected NeedReply")
        self.need = need


def opened(envelope: Envelope, most: int, kind: type[Reply]) -> Reply:
    """The message of a reply, which must be of one kind.

    Args:
        envelope: what came.
        most: bytes that a good reply can have.
        kind: the class of a good reply.

    Returns:
        The message.

    Raises:
        Lacking: when the client has to be served again.
        ReplyError: when it refuses, or the reply is too large, damaged or of another kind.
    """
    check_size(envelope, max(most, _NEED_BYTES) if envelope.kind == "need" else most)
    message = open_envelope(envelope)
    if isinstance(message, NeedReply):
        raise Lacking(message)
    if isinstance(message, RefusalReply):
        raise ReplyError(message.reason)
    if not isinstance(message, kind):
        raise ReplyError(f"unexpected {type(message).__name__}")
    return message


def decode(hand: InHand, asked: Asked) -> InHand:
    """Open the envelope, after its size and before anything else is looked at.

    Args:
        hand: with the envelope.
        asked: says how many bytes a good reply can have.

    Returns:
        The reply with its message, without the envelope.

    Raises:
        Lacking: when the client has to be served again.
        ReplyError: when it refuses, or the reply is too large, damaged or of another kind.
    """
    assert hand.envelope is not None
    message = opened(hand.envelope, asked.of(hand.node).max_bytes, TrainReply)
    return replace(hand, envelope=None, message=message)


def check(hand: InHand, asked: Asked) -> InHand:
    """Hold the reply against what was asked; from here on its adapter is float32.

    Args:
        hand: with the message.
        asked: what a good reply looks like.

    Returns:
        The reply with adapter and counts, and the message without its tensors.

    Raises:
        ReplyError: with the first check failed.
    """
    assert hand.message is not None
    node = hand.node
    want = asked.of(node)
    adapter, counts = validate(hand.message, want, node.name, node.examples, node.validation)
    figures = validated_merging(hand.message, want)
    bare = replace(hand.message, adapter={}, counts={}, merging={})
    return replace(hand, message=bare, adapter=adapter, counts=counts, merging=figures)


def clip(hand: InHand, asked: Asked) -> InHand:
    """Scale a change that is too long down to the bound, where there is one.

    Args:
        hand: with the adapter, float32.
        asked: has the bound and the adapter that was sent.

    Returns:
        The reply, in which LoRA's factors moved by no more than the bound; the head is as it was.
    """
    if not asked.longest:
        return hand
    start = asked.of(hand.node).adapter
    return replace(hand, adapter=clip_change(hand.adapter, start, asked.longest))


def measure(hand: InHand, asked: Asked) -> InHand:
    """Note how far the adapter has moved, to be held against the round's other replies.

    Args:
        hand: with the adapter, float32.
        asked: has the adapter that was sent.

    Returns:
        The reply with the norms of its change.
    """
    start = asked.of(hand.node).adapter
    return replace(hand, norms=change_norms(hand.adapter, start, asked.scaling))


def widen(hand: InHand, asked: Asked) -> InHand:
    """Bring an adapter of a lower rank to the run's: what was not trained is as the server has it.

    Args:
        hand: with the adapter, float32, of the client's rank.
        asked: has the adapter that the clients were sent, of the run's rank.

    Returns:
        The reply with adapter and merging figures at that rank.
    """
    want = asked.want
    if rank_of(hand.adapter) == rank_of(want.adapter):
        return hand
    figures = merging.widened(hand.merging, want.beside)
    return replace(hand, adapter=widened(hand.adapter, want.adapter), merging=figures)


def rebase(hand: InHand, asked: Asked) -> InHand:
    """Take an adapter that was trained from an older one to the round's own.

    Args:
        hand: with the adapter, float32.
        asked: says how, if it has to be done.

    Returns:
        The reply, with the adapter as if it had been trained from the round's.
    """
    return hand if asked.rebase is None else replace(hand, adapter=asked.rebase(hand.adapter))


def spool(hand: InHand, asked: Asked) -> InHand:
    """Hand the adapter to the aggregation, which keeps it on disk.

    Args:
        hand: with the adapter, float32.
        asked: has the round's replies so far, which take it.

    Returns:
        The reply without its adapter.

    Raises:
        OSError: when the disk is full.
    """
    assert hand.message is not None
    names = asked.of(hand.node).names
    asked.replies.add(
        hand.node.name, hand.message.examples, hand.adapter, names, beside=hand.merging
    )
    return replace(hand, adapter={}, merging={})


STEPS: tuple[Callable[[InHand, Asked], InHand], ...] = (
    decode, check, clip, measure, widen, rebase, spool,
)  # fmt: skip


def receive(node: Node, envelope: Envelope, asked: Asked) -> InHand:
    """Take one reply through the chain.

    Args:
        node: the client it came from.
        envelope: what came.
        asked: what the reply is held against, and where it goes.

    Returns:
        The reply as the last step left it: its figures, as a message without tensors, its
        inactivity counts, and the norms of its change.

    Raises:
        Lacking: when the client has to be served again.
        ReplyError: when the reply must not be used.
    """
    hand = InHand(node, envelope)
    for step in STEPS:
        hand = step(hand, asked)
    return hand
