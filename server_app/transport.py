"""How the server's messages reach the nodes: through Flower, or in process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpft_core.errors import ReplyError, RunError
from fedpft_core.wire import flower as wire
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import Failure
from server_app.guard import Guard, of_grid

# Takes a node's id and its reply; True where no more replies are waited for.
OnReply = Callable[[int, "Envelope | Failure"], "bool | None"]

OnWait = Callable[[int, int, float], None]
"""Told what is there, what is waited for, and the seconds until the wait is given up."""

# Work of the server's own while nodes are at theirs; replies that come meanwhile are kept.
Meanwhile = Callable[[], None]

_AT_ONCE = 4  # replies asked of Flower at once, which it gives all together
_LATE_SECONDS = 600.0  # how long after its deadline a reply is still kept for us by Flower


class Mailbox(Protocol):
    """Messages to single nodes, whose replies are fetched as they come.

    What an exchange is for a round, this is for schedules that ask clients at different times.
    """

    def send(self, node: int, envelope: Envelope, timeout: float) -> None:
        """Send a message to a node.

        Args:
            node: the node's id.
            envelope: the message.
            timeout: how long a reply can be of use, seconds.
        """

    def fetch(self) -> list[tuple[int, Envelope | Failure]]:
        """Replies that have come since the last call.

        Returns:
            Node ids with what came from each; empty, after a short wait, where nothing has come.
        """

    def now(self) -> float:
        """The time that deadlines are measured in.

        Returns:
            Seconds; only differences mean anything.
        """


class Transport(Protocol):
    """Nodes by id, and one exchange of messages with some of them."""

    def nodes(self) -> list[int]:
        """Ids of the nodes that are connected now.

        Returns:
            The ids, in ascending order.
        """

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Send one message to each node and wait for the replies, at most `timeout` seconds.

        Each reply is handed to `on_reply` as it comes and is not kept. That is called for every
        node addressed; for one that did not answer, or that was not waited for because `on_reply`
        said so, with a Failure.

        Args:
            messages: what each node gets, by node id.
            round: the round the messages belong to.
            timeout: the longest wait, seconds.
            on_reply: takes a node's id and its reply.
            meanwhile: called once, when all messages are sent. Replies that have come when it
                returns are taken, however long that was.
        """

    def mailbox(self) -> Mailbox:
        """A way to ask nodes one by one.

        Returns:
            A new mailbox, which knows of no message sent before.
        """


def _silently() -> OnWait:
    return lambda done, total, seconds_left: None


class WorkerLost(RunError):
    """A process that simulates clients has died, which Flower never replaces."""


@dataclass
class FlowerTransport:
    """Messages over Flower's Grid; each wait for replies is told to what `waits` then makes.

    Where clients are `simulated`, one whose process has died raises :class:`WorkerLost`: all
    further messages to that process would fail too, and a run with fewer clients is another run.
    """

    grid: Grid
    poll_seconds: float = 0.05
    waits: Callable[[], OnWait] = _silently
    simulated: bool = False
    guard: Guard | None = None

    def __post_init__(self) -> None:
        self.guard = of_grid(self.grid)

    def nodes(self) -> list[int]:
        """Ids of the nodes that Flower says are connected.

        Returns:
            The ids, in ascending order.
        """
        return sorted(self.grid.get_node_ids())

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Push one message to each node, and pull the replies until all are there or time is up.

        Args:
            messages: what each node gets, by node id; a `hello` goes as a query, others to train.
            round: becomes Flower's group id of the messages.
            timeout: the longest wait, seconds; Flower drops a message 60 s after it.
            on_reply: takes a node's id and its reply, or the Failure that stands for it.
            meanwhile: called once the messages are pushed. Flower keeps what comes until it is
                pulled, for ten minutes more than without.

        Raises:
            WorkerLost: a process that simulates clients has died.
        """
        waiting: dict[str, int] = {}
        records: dict[int, RecordDict] = {}  # one copy of a package for all that get the same
        kept = timeout + (_LATE_SECONDS if meanwhile else 0.0)
        for node, envelope in messages.items():
            if id(envelope) not in records:
                records[id(envelope)] = wire.to_record(envelope)
            content = records[id(envelope)]
            sent = _push(self.grid, self.guard, node, envelope, content, kept, str(round))
            if sent:
                waiting[sent] = node
                continue
            on_reply(node, Failure(_ERRORS[5]))
        deadline, done = time.monotonic() + timeout, False
        if meanwhile:
            meanwhile()
        # What has come while the server was at work is there, whatever time it is now.
        waits, pulled = self.waits(), not meanwhile
        while waiting and not done and (not pulled or time.monotonic() < deadline):
            got, pulled = False, True
            for node, reply in _pull(self.grid, self.guard, waiting, self.simulated):
                got = True
                done = bool(on_reply(node, reply)) or done
            if waiting and not got:
                left = max(0.0, deadline - time.monotonic())
                waits(len(messages) - len(waiting), len(messages), left)
                time.sleep(self.poll_seconds)
        why = "not waited for" if done else f"no reply within {timeout:.1f} s"
        for node in waiting.values():
            on_reply(node, Failure(why, late=True))

    def mailbox(self) -> FlowerMailbox:
        """A way to ask nodes one by one.

        Returns:
            A new mailbox over the same Grid.
        """
        return FlowerMailbox(self.grid, self.poll_seconds, self.simulated, self.guard)


@dataclass
class FlowerMailbox:
    """Messages to single nodes over Flower's Grid."""

    grid: Grid
    poll_seconds: float
    simulated: bool = False
    guard: Guard | None = None
    _waiting: dict[str, int] = field(default_factory=dict)
    _unsent: list[int] = field(default_factory=list)
    _last: tuple[Envelope, RecordDict] | None = None  # one copy of a package for all

    def send(self, node: int, envelope: Envelope, timeout: float) -> None:
        """Push a message.

        Args:
            node: the node's id.
            envelope: a `hello` goes as a query, others to train.
            timeout: how long a reply can be of use, seconds. Flower keeps message and reply for
                ten minutes more, so that a late reply can be told from none.
        """
        if self._last is None or self._last[0] is not envelope:
            self._last = envelope, wire.to_record(envelope)
        content, wait = self._last[1], timeout + _LATE_SECONDS
        sent = _push(self.grid, self.guard, node, envelope, content, wait, "")
        if sent:
            self._waiting[sent] = node
        else:
            self._unsent.append(node)

    def fetch(self) -> list[tuple[int, Envelope | Failure]]:
        """Pull what has come.

        Returns:
            Node ids with what came from each; empty, after a short wait, where nothing has come.

        Raises:
            WorkerLost: a process that simulates clients has died.
        """
        found: list[tuple[int, Envelope | Failure]] = [
            (n, Failure(_ERRORS[5])) for n in self._unsent
        ]
        self._unsent.clear()
        found += _pull(self.grid, self.guard, self._waiting, self.simulated)
        if not found:
            time.sleep(self.poll_seconds)
        return found

    def now(self) -> float:
        """The machine's clock.

        Returns:
            `time.monotonic()`, seconds.
        """
        return time.monotonic()


def _push(
    grid: Grid,
    guard: Guard | None,
    node: int,
    envelope: Envelope,
    content: RecordDict,
    timeout: float,
    group: str,
) -> str:
    """Send a message; the id it has, empty for a node that is gone."""
    message = Message(
        content=content,
        dst_node_id=node,
        message_type=MessageType.QUERY if envelope.kind == "hello" else MessageType.TRAIN,
        ttl=timeout + 60,
        group_id=group,
    )
    # One by one: for a node that has just left Flower answers with an empty id or with none at
    # all, and in a longer list nobody could tell which one that was.
    sent = next(iter(grid.push_messages([message])), "")
    if guard and sent:
        guard.expect(sent, envelope.answer)
    return sent


def _pull(
    grid: Grid, guard: Guard | None, waiting: dict[str, int], simulated: bool
) -> Iterator[tuple[int, Envelope | Failure]]:
    """Replies to messages that are waited for, by their ids; those that came wait no more."""
    asked = list(waiting)
    for start in range(0, len(asked), _AT_ONCE):
        try:
            replies = list(grid.pull_messages(asked[start : start + _AT_ONCE]))
        except (ValueError, KeyError, TypeError, IndexError):
            # Flower gives up on all that came together when it cannot read one of them.
            for sent in sorted(guard.came & waiting.keys()) if guard else ():
                yield waiting.pop(sent), Failure("unreadable reply, or one that came with such")
            if not guard or not guard.came:
                raise
            continue
        replies.reverse()
        while replies:  # one that has been handed on is not held any longer
            reply = replies.pop()
            # By the id replied to: the error reply of a dead node has another source id.
            sent = reply.metadata.reply_to_message_id
            if sent not in waiting:
                continue
            if simulated and reply.has_error() and _of_ray(reply.error.reason or ""):
                raise WorkerLost(
                    "the process of a simulated client died (killed, or out of memory?)."
                )
            node = waiting.pop(sent)
            if guard and sent in guard.refused:
                yield node, Failure("the reply is larger than a good one can be")
            else:
                yield node, _opened(reply)
            if guard:
                guard.forget(sent)
            del reply


_ERRORS = {
    2: "the client raised an error",
    5: "the node is gone",
    8: "the client process died",
}
_DIED = 8
_GONE = (5, _DIED)
_RAY_ERRORS = ("RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError",
               "OutOfMemoryError", "NodeDiedError")  # fmt: skip


def _of_ray(reason: str) -> bool:
    """Whether an error is Ray's, of a process that is no more: its type comes first."""
    kind, _, _ = reason.partition(">")
    return "ray.exceptions." in kind and kind.strip("'").endswith(_RAY_ERRORS)


def _opened(reply: Message) -> Envelope | Failure:
    if reply.has_error():
        code = reply.error.code
        what = _ERRORS.get(code, "Flower reported an error")
        # Of a process or node that is gone Flower can only say so once more, at length.
        lines = [] if code in _GONE else (reply.error.reason or "").strip().splitlines()
        text = f"{what} (code {code}{': ' + lines[-1] if lines else ''})"
        return Failure(text, died=code == _DIED)
    try:
        return wire.from_record(reply.content)
    except ReplyError as error:
        return Failure(f"unreadable reply: {error}")


@dataclass
class LocalTransport:
    """Clients in this process, for comparisons and tests: the same bytes, no network.

    `clients[i]` answers for node i. Every message takes the way through Flower's records.
    """

    clients: Mapping[int, Callable[[Envelope], Envelope]]

    def nodes(self) -> list[int]:
        """Ids of the clients in this process.

        Returns:
            The ids, in ascending order.
        """
        return sorted(self.clients)

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Ask one client after the other, and keep the server's thread count as it was.

        Args:
            messages: what each client gets, by node id.
            round: not looked at.
            timeout: not looked at: every client answers.
            on_reply: takes a client's id and its reply.
            meanwhile: called before the clients are asked.
        """
        if meanwhile:
            meanwhile()
        for node, envelope in messages.items():
            on_reply(node, self.ask(node, envelope))

    def ask(self, node: int, envelope: Envelope) -> Envelope:
        """Take one message to a client and its answer back.

        Args:
            node: the client's id.
            envelope: the message.

        Returns:
            The answer. The server's thread count stays as it was.
        """
        # Clients pin their threads, which in one process would be the server's as well.
        threads = torch.get_num_threads()
        sent = wire.from_record(wire.to_record(envelope))
        reply = wire.from_record(wire.to_record(self.clients[node](sent)))
        torch.set_num_threads(threads)
        return reply

    def mailbox(self) -> LocalMailbox:
        """A way to ask clients one by one.

        Returns:
            A new mailbox.
        """
        return LocalMailbox(self)


@dataclass
class LocalMailbox:
    """Messages to single clients in this process, which answer in the order they were asked."""

    transport: LocalTransport
    _waiting: list[tuple[int, Envelope]] = field(default_factory=list)

    def send(self, node: int, envelope: Envelope, timeout: float) -> None:
        """Keep a message until its client's turn comes.

        Args:
            node: the client's id.
            envelope: the message.
            timeout: not looked at: every client answers.
        """
        self._waiting.append((node, envelope))

    def fetch(self) -> list[tuple[int, Envelope | Failure]]:
        """Let the client that was asked first answer.

        Returns:
            Its reply; empty when nobody was asked.
        """
        if not self._waiting:
            return []
        node, envelope = self._waiting.pop(0)
        return [(node, self.transport.ask(node, envelope))]

    def now(self) -> float:
        """The machine's clock.

        Returns:
            `time.monotonic()`, seconds.
        """
        return time.monotonic()
