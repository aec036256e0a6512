"""Who is there: the connected nodes, and what each says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fedpft_core.config import FederationConfig
from fedpft_core.config.ranks import ranks_of
from fedpft_core.errors import ReplyError, RunError
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import Failure, Hello, HelloReply, RefusalReply
from fedpft_core.wire.validate import check_size
from server_app.phases.reporting import Waits
from server_app.reach import registered_name
from server_app.rounds import ledger
from server_app.rounds.ledger import printable
from server_app.rounds.matching import Matching
from server_app.rounds.names import looks, usable_name
from server_app.run import schema as ev
from server_app.state import Events, State
from server_app.transport import Transport

_SETTLE_SECONDS = 3.0  # how long the set of nodes must stand still before a smaller one will do
_HELLO_SECONDS = 300.0  # a fresh process has to import torch, on a machine that may be busy
_MOST_RANK = 2**16
_MOST_EXAMPLES = 2**40  # keeps sums over clients exact in float64
HELLO_BYTES = 2**17
"""The largest answer to the first query."""


@dataclass(frozen=True)
class Node:
    """A connected client.

    Attributes:
        id: Flower's, for this run.
        name: the client's stable name.
        examples: rows it announced to train on.
        validation: rows it announced to keep from training.
        rank: most of LoRA's rank that it trains; 0 = whatever the run has.
    """

    id: int
    name: str
    examples: int
    validation: int = 0
    rank: int = 0


class Nodes:
    """The nodes of one federation; each is asked once who it is."""

    def __init__(
        self, settings: FederationConfig, transport: Transport, events: Events,
        matching: Matching | None = None,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.matching = matching
        self.ranks = ranks_of(settings.ranks)
        self.transport = transport
        self.events = events
        self.known: dict[int, Node] = {}
        self.left_out: dict[int, str] = {}  # why, by node id
        self._early: dict[int, Envelope] = {}  # answers to the first query that nobody has read

    def wait(self) -> None:
        """Wait for all `federation.clients`, or for a standing set of at least min-clients.

        Raises:
            RunError: there are fewer than min-clients after node-timeout seconds.
        """
        f = self.settings
        start = changed = time.monotonic()
        count = -1
        waits = Waits(self.events, "nodes", silent=1.0)
        while True:
            nodes = len(self.transport.nodes())
            now = time.monotonic()
            if nodes != count:
                count, changed = nodes, now
            if nodes >= f.clients:
                return
            if nodes >= f.min_clients and now - changed >= _SETTLE_SECONDS:
                if nodes >= f.clients_per_round:
                    return
                self.events.emit(
                    ev.Warned(
                        text=f"only {nodes} nodes are connected, so that many are used per round "
                        f"instead of federation.clients-per-round = {f.clients_per_round}",
                    )
                )
                return
            if now - start > f.node_timeout:
                raise RunError(
                    f"only {nodes} of federation.min-clients = {f.min_clients} nodes connected "
                    f"within federation.node-timeout = {f.node_timeout:g} s"
                )
            waits(nodes, f.clients, max(0.0, f.node_timeout - (now - start)))
            time.sleep(0.2)

    def greet(self, meanwhile: Callable[[], None]) -> None:
        """Ask the nodes that are connected already who they are, and do something meanwhile.

        A node's process imports torch before it answers; the server has other work until then.
        Answers are kept for :meth:`meet`, which asks those again that gave none.

        Args:
            meanwhile: called once, whether or not there are nodes.
        """
        ids = self.transport.nodes()
        if not ids:
            meanwhile()
            return
        replies: dict[int, Envelope | Failure] = {}
        self.transport.exchange(
            dict.fromkeys(ids, _hello()), 0, self._patience, replies.__setitem__, meanwhile
        )
        self._early = {i: r for i, r in replies.items() if isinstance(r, Envelope)}

    @property
    def _patience(self) -> float:
        """Seconds to wait for answers to the first query."""
        return min(_HELLO_SECONDS, self.settings.round_timeout)

    def meet(self, state: State, round: int) -> list[Node]:
        """The nodes connected now; new ones are asked who they are.

        Args:
            state: which sub-FMs a new client has is noted in it.
            round: the round that the messages are booked to.

        Returns:
            The nodes, by name, without those whose answer cannot be used; these are warned of.
        """
        ids = self.transport.nodes()
        new = [i for i in ids if i not in self.known]
        hello = _hello()
        replies: dict[int, Envelope | Failure] = {i: self._early.pop(i) for i in new
                                                  if i in self._early}  # fmt: skip
        asked = dict.fromkeys([i for i in new if i not in replies], hello)
        self.transport.exchange(asked, round, self._patience, replies.__setitem__)
        for node_id in new:
            self.hear(node_id, hello, replies[node_id], state, round)
        present = self.present(ids)
        if new:
            self.announce(present)
        return present

    def hear(
        self, node_id: int, hello: Envelope, reply: Envelope | Failure, state: State, round: int
    ) -> None:
        """Note who a node is, by its answer to the first query, and book both messages.

        Args:
            node_id: Flower's, for this run.
            hello: the query.
            reply: its answer, or why there is none; a node that is left out is warned of.
            state: which sub-FMs a new client has is noted in it.
            round: the round that the messages are booked to.
        """
        name = self._introduce(node_id, reply, state, round)
        ledger.count_bytes(self.events, round, name, "down", hello)
        if isinstance(reply, Envelope):
            ledger.count_bytes(self.events, round, name, "up", reply)

    def present(self, ids: Iterable[int]) -> list[Node]:
        """Those of some nodes that are known.

        Args:
            ids: of nodes that are connected.

        Returns:
            The nodes, by name.
        """
        found = [self.known[i] for i in ids if i in self.known]
        return sorted(found, key=lambda n: n.name)

    def announce(self, present: Sequence[Node]) -> None:
        """Say in the log who is connected.

        Args:
            present: the nodes, by name.
        """
        names = [n.name for n in present]
        self.events.emit(ev.Nodes(count=len(names), names=names))

    def _introduce(self, node_id: int, reply: Envelope | Failure, state: State, round: int) -> str:
        """Note who a node is; its name, or `?` when it is left out."""
        try:
            if isinstance(reply, Failure):
                raise ReplyError(reply.reason)
            check_size(reply, HELLO_BYTES)
            message = open_envelope(reply)
            if isinstance(message, RefusalReply):
                raise ReplyError(message.reason)
            if not isinstance(message, HelloReply):
                raise ReplyError(f"it answered the first query with a {type(message).__name__}")
            name = usable_name(message.name)
            registered = registered_name(self.transport, node_id)
            if registered and registered != name:
                raise ReplyError(f"it says it is {name}, and its key is registered as {registered}")
            if not 1 <= message.examples < _MOST_EXAMPLES:
                raise ReplyError(f"client {name} says it has {message.examples} rows")
            if not 0 <= message.validation < _MOST_EXAMPLES:
                raise ReplyError(f"client {name} says it has {message.validation} validation rows")
            if not 0 <= message.rank < _MOST_RANK:
                raise ReplyError(f"client {name} says it trains at rank {message.rank}")
            connected = set(self.transport.nodes())
            for other_id, other in list(self.known.items()):
                if looks(other.name) == looks(name):
                    if other.name != name:
                        raise ReplyError(
                            f"its name {name} looks like that of another node, {other.name}"
                        )
                    if other_id in connected:
                        raise ReplyError(f"another connected node is already named {name}")
                    # The same client back under a new node id.
                    del self.known[other_id]
            if self.matching:
                self.matching.meet(name, message.means, state, round)
        except ReplyError as error:
            self.left_out[node_id] = printable(error)
            text = f"node {node_id} is left out: {self.left_out[node_id]}"
            self.events.emit(ev.Warned(text=text))
            return "?"
        self.left_out.pop(node_id, None)
        ranks = [r for r in (message.rank, self.ranks.get(name, 0)) if r]
        rank = min(ranks, default=0)
        self.known[node_id] = Node(node_id, name, message.examples, message.validation, rank)
        # That it has nothing at all is worth knowing, but for a client of which a checkpoint tells
        # more: in a simulation nobody says what lies on the shared disk.
        if message.have or name not in state.have:
            state.have[name] = message.have
        return name


def _hello() -> Envelope:
    """The first query."""
    return replace(seal(Hello()), answer=HELLO_BYTES)
