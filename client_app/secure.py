"""A client's side of secure aggregation, and what of it must outlive a message.

In a deployment each message may meet a new process, so the session's root secret lies in the store,
readable by its owner only, until its masks have been revealed or the next session begins. Whatever
the server asks, a client goes through the steps of a session once and in order, and never gives
both shares of one neighbour.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpft_core.disk import whole
from fedpft_core.errors import ReplyError
from fedpft_core.secure import keys, masks, ring
from fedpft_core.tensors import Tensors
from fedpft_core.wire.messages import (
    KeysReply,
    KeysRequest,
    RevealReply,
    RevealRequest,
    SecureStatisticsRequest,
    SecureTrainRequest,
    SharesReply,
    SharesRequest,
)

FEWEST_PEERS = 2  # of two clients each could tell the other's change from the sum
_MOST_VARIANCE = 2.0**62  # more would not fit whole numbers of 64 bits
_MOST_DIGITS = 63
_STEPS = ("keys", "shares", "masked", "revealed")


@dataclass
class Session:
    """A session as far as it has come; `step` is the last that was done."""

    name: str
    root: str  # hex
    step: str = "keys"
    index: int = 0
    threshold: int = 0
    peers: dict[str, list[str]] = field(default_factory=dict)  # two public keys, by number
    alive: list[int] = field(default_factory=list)

    @property
    def keys(self) -> keys.Keys:
        """The client's keys."""
        return keys.Keys.of(bytes.fromhex(self.root))

    @property
    def id(self) -> bytes:
        """The session's name, as keys are bound to it."""
        return bytes.fromhex(self.name)


class Secure:
    """The sessions of the client `name`, of which the last one counts."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.path = root / "secure" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"

    def show_keys(self, request: KeysRequest) -> KeysReply:
        """Begin a session; the one before is forgotten.

        Args:
            request: names it.

        Returns:
            The public keys.
        """
        session = Session(request.session, os.urandom(keys.ROOT).hex())
        self._keep(session)
        public = session.keys.public
        return KeysReply(
            self.name, request.session, public.sealing.hex(), public.masking.hex(),
            public.own.hex(),
        )  # fmt: skip

    def share(self, request: SharesRequest) -> SharesReply:
        """Share the session's secrets among the neighbours.

        Args:
            request: says who they are.

        Returns:
            A sealed share for each.

        Raises:
            ReplyError: the session is another or further on, or the neighbours are too few, have
                the same keys, or could rebuild a secret with half of them.
        """
        session = self._at(request.session, "keys")
        count = len(request.peers)
        if count < FEWEST_PEERS:
            raise ReplyError(f"secure aggregation with {count} neighbours hides nothing")
        if not count // 2 < request.threshold <= count:
            raise ReplyError(f"{request.threshold} of {count} shares must not rebuild a secret")
        public = session.keys.public
        shown = [k for pair in request.peers.values() for k in pair]
        shown += [public.sealing.hex(), public.masking.hex()]
        if str(request.index) in request.peers or len(set(shown)) < len(shown):
            raise ReplyError("the neighbours' numbers or keys are not all different")
        session.index, session.threshold = request.index, request.threshold
        session.peers = {p: list(k) for p, k in request.peers.items()}
        order = sorted(int(p) for p in request.peers)
        parts = keys.share_out(session.keys, count, request.threshold)
        try:
            sealed = {
                str(p): keys.seal(
                    session.keys.sealing, bytes.fromhex(session.peers[str(p)][0]), part,
                    session.id, (session.index, p),
                ).hex()
                for p, part in zip(order, parts, strict=True)
            }  # fmt: skip
        except ValueError as error:
            raise ReplyError("a neighbour's key is no key") from error
        self._advance(session, "shares")
        return SharesReply(self.name, request.session, sealed)

    def ready(self, request: SecureTrainRequest | SecureStatisticsRequest) -> Session:
        """Whether what a request asks for can be masked, before any work is done.

        Args:
            request: for training or for statistics.

        Returns:
            The session.

        Raises:
            ReplyError: the session is another or not there yet, numbers do not fit the ring, or
                too few neighbours have shared their secrets.
        """
        session = self._at(request.session, "shares")
        if isinstance(request, SecureTrainRequest):
            _check_change(request)
        elif not 2 <= request.modulus_bits <= ring.WIDEST:
            raise ReplyError("there is no ring of so many bits")
        self._known(session, request.alive, [int(p) for p in session.peers])
        if len(request.alive) < session.threshold:
            raise ReplyError("too few neighbours have shared their secrets")
        return session

    def mask(
        self, request: SecureTrainRequest | SecureStatisticsRequest, values: np.ndarray
    ) -> Tensors:
        """Put the session's masks on a client's numbers, once.

        Args:
            request: for training or for statistics; `ready` has been asked.
            values: int64 [n].

        Returns:
            The one tensor `masked`, uint8: the numbers, packed.

        Raises:
            ReplyError: as `ready`, or a neighbour's key is none.
        """
        session = self.ready(request)
        session.alive = list(request.alive)
        # Noted first: other numbers under the same masks would give away their difference.
        self._advance(session, "masked")
        peers = {p: bytes.fromhex(session.peers[str(p)][1]) for p in request.alive}
        k = request.modulus_bits
        try:
            found = masks.masked(values, k, session.keys, session.index, peers, session.id)
        except ValueError as error:
            raise ReplyError("a neighbour's key is no key") from error
        sent = np.frombuffer(ring.pack(found, k), np.uint8)
        return {"masked": torch.from_numpy(sent.copy())}

    def reveal(self, request: RevealRequest) -> RevealReply:
        """Give what takes the masks off the sum, and of no neighbour both shares.

        Args:
            request: says which neighbours are in the sum and which are gone.

        Returns:
            The shares.

        Raises:
            ReplyError: the session is another or at another step, a neighbour is in both lists or
                in none of the session, too few are in the sum, or a share is not from its sender.
        """
        session = self._at(request.session, "masked")
        both = [*request.answered, *request.dropped]
        self._known(session, both, session.alive)
        if len(request.answered) < session.threshold:
            raise ReplyError("too few neighbours are in the sum")
        if {str(p) for p in both} != request.shares.keys():
            raise ReplyError("the shares are not those of the neighbours")
        mine = session.keys.sealing
        found = {}
        for p in both:
            sender = bytes.fromhex(session.peers[str(p)][0])
            sealed = bytes.fromhex(request.shares[str(p)])
            try:
                found[p] = keys.unseal(mine, sender, sealed, session.id, (p, session.index))
            except ValueError as error:
                raise ReplyError(str(error)) from error
        self._advance(session, "revealed")
        half = keys.SECRET
        return RevealReply(
            self.name, request.session,
            {str(p): found[p][:half].hex() for p in request.answered},
            {str(p): found[p][half:].hex() for p in request.dropped},
        )  # fmt: skip

    def _known(self, session: Session, numbers: Sequence[int], known: Sequence[int]) -> None:
        if len(set(numbers)) < len(numbers) or not set(numbers) <= set(known):
            raise ReplyError("the neighbours named are not this session's, or named twice")

    def _at(self, name: str, step: str) -> Session:
        try:
            raw: Any = json.loads(self.path.read_text(encoding="utf-8"))
            session = Session(**raw)
        except (OSError, ValueError, TypeError):
            raise ReplyError("this client knows no such session") from None
        if session.name != name or session.step != step:
            raise ReplyError("this client knows no such session, or has done this step of it")
        return session

    def _advance(self, session: Session, step: str) -> None:
        session.step = step
        if step == _STEPS[-1]:
            session.root, session.peers, session.alive = "", {}, []  # nobody needs them any more
        self._keep(session)

    def _keep(self, session: Session) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole.write(self.path, json.dumps(session.__dict__).encode())


def _check_change(request: SecureTrainRequest) -> None:
    """Refuse what no change can be quantised by."""
    if request.count_rule and (request.variance or not 1 <= request.digits <= _MOST_DIGITS):
        raise ReplyError("counts of inactive neurons have no noise, or not so many digits")
    if not 2 <= request.bits <= request.modulus_bits <= ring.MOST_BITS:
        raise ReplyError("the bits of a value and of the ring do not fit each other")
    if not 0 < request.reach < math.inf:
        raise ReplyError("the reach of a value is no number above 0")
    if not (0 <= request.longest < math.inf and 0 <= request.variance <= _MOST_VARIANCE):
        raise ReplyError("the bound or the noise is no number of at least 0")
