"""What a client of secure aggregation never does, whatever the server asks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest

from client_app.secure import Secure
from fedpft_core.errors import ReplyError
from fedpft_core.secure import keys
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire.envelope import Envelope, checksum, open_envelope, seal
from fedpft_core.wire.messages import (
    KeysRequest,
    RevealRequest,
    SecureStatisticsRequest,
    SecureTrainRequest,
    SharesRequest,
)

SESSION = "ab" * 16
VALUES = np.arange(5)


class Others:
    """Three neighbours 1, 2, 3 of the client 0, and what they seal for it."""

    def __init__(self) -> None:
        self.keys = {i: keys.Keys.of(os.urandom(32)) for i in (1, 2, 3)}

    @property
    def shown(self) -> dict[str, list[str]]:
        public = {i: k.public for i, k in self.keys.items()}
        return {str(i): [p.sealing.hex(), p.masking.hex()] for i, p in public.items()}

    def sealed(self, i: int, to: bytes) -> str:
        share = bytes([i]) * 16 + bytes([i + 100]) * 16
        session = bytes.fromhex(SESSION)
        return keys.seal(self.keys[i].sealing, to, share, session, (i, 0)).hex()


def train(**changes: Any) -> SecureTrainRequest:
    settings = LocalSettings(1e-3, 4, 1, 0, 0.0, 1.0, 1)
    made = SecureTrainRequest(
        round=1, digest="0" * 64, adapter=fabricate.adapter(), fmt="fp32", settings=settings,
        seed=0, session=SESSION, bits=8, reach=0.1, modulus_bits=10, alive=(1, 2, 3),
    )  # fmt: skip
    return replace(made, **changes)


SUMS = SecureStatisticsRequest(
    0, "0" * 64, fabricate.adapter(), "fp32", 0, 8, 4, 1, session=SESSION, clients=4, rows=16,
    longest=3.0, label=1.5, alive=(1, 2, 3),
)  # fmt: skip


def to(step: str, root: Path) -> tuple[Secure, Others, RevealRequest]:
    """A client that has done the steps up to this one, and a good request for the last one."""
    client, others = Secure(root, "me"), Others()
    mine = bytes.fromhex(client.show_keys(KeysRequest(SESSION, 1)).sealing)
    shares = {str(i): others.sealed(i, mine) for i in others.keys}
    if step in ("shares", "masked", "revealed"):
        client.share(SharesRequest(SESSION, 1, 0, 2, others.shown))
    if step in ("masked", "revealed"):
        client.mask(train(), VALUES)
    request = RevealRequest(SESSION, 1, (1, 2), (3,), shares)
    if step == "revealed":
        client.reveal(request)
    return client, others, request


def test_what_it_reveals_is_one_share_of_each(tmp_path: Path) -> None:
    client, _, request = to("masked", tmp_path)
    found = client.reveal(request)
    assert found.own_shares == {"1": "01" * 16, "2": "02" * 16}
    assert found.pair_shares == {"3": "67" * 16}


def test_nobody_else_reads_the_sessions_secrets(tmp_path: Path) -> None:
    client, _, _ = to("keys", tmp_path)
    assert client.path.parent.stat().st_mode & 0o777 == 0o700
    client, _, _ = to("revealed", tmp_path)
    assert b'"root": ""' in client.path.read_bytes()


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "revealed"])
def test_each_step_is_done_once_and_in_order(tmp_path: Path, step: str) -> None:
    order = ["keys", "shares", "masked", "revealed"]
    for wanted in order[1:]:
        client, others, request = to(step, tmp_path)
        asks = {
            "shares": lambda c=client, o=others: c.share(SharesRequest(SESSION, 1, 0, 2, o.shown)),
            "masked": lambda c=client: c.mask(train(), VALUES),
            "revealed": lambda c=client, r=request: c.reveal(r),
        }
        if order.index(wanted) == order.index(step) + 1:
            asks[wanted]()
            continue
        with pytest.raises(ReplyError, match="no such session"):
            asks[wanted]()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"threshold": 1}, "must not rebuild"),
        ({"threshold": 4}, "must not rebuild"),
        ({"index": 2}, "not all different"),
        ({"peers": {}}, "hides nothing"),
        ({"peers": "two"}, "hides nothing"),
        ({"peers": "twice"}, "not all different"),
        ({"peers": "zero"}, "no key"),
        ({"session": "cd" * 16}, "no such session"),
    ],
)
def test_neighbours_that_protect_nothing_are_refused(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    client, others, _ = to("keys", tmp_path)
    shown = others.shown
    peers = {
        "two": {"1": shown["1"]},
        "twice": {**shown, "3": shown["1"]},
        "zero": {**shown, "3": ["00" * 32, shown["3"][1]]},
    }
    if isinstance(change.get("peers"), str):
        change = {"peers": peers[change["peers"]]}
    with pytest.raises(ReplyError, match=why):
        client.share(replace(SharesRequest(SESSION, 1, 0, 2, shown), **change))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"alive": (1,)}, "too few"),
        ({"alive": (1, 1, 2)}, "named twice"),
        ({"alive": (1, 2, 9)}, "not this session's"),
        ({"bits": 1}, "do not fit"),
        ({"bits": 11}, "do not fit"),
        ({"modulus_bits": 33}, "do not fit"),
        ({"reach": 0.0}, "no number above 0"),
        ({"reach": float("nan")}, "no number above 0"),
        ({"count_rule": "nonpositive"}, "not so many digits"),
        ({"count_rule": "nonpositive", "digits": 2, "variance": 1.0}, "have no noise"),
    ],
)
def test_what_cannot_be_masked_well_is_refused_before_training(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    client, _, _ = to("shares", tmp_path)
    with pytest.raises(ReplyError, match=why):
        client.ready(train(**change))
    client.ready(train())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answered": (1, 2, 3)}, "named twice"),  # both shares of 3
        ({"answered": (1,), "dropped": (2, 3)}, "too few neighbours are in the sum"),
        ({"answered": (1, 2), "dropped": ()}, "not those of the neighbours"),
        ({"answered": (1, 2), "dropped": (4,)}, "not this session's"),
        ({"shares": "swapped"}, "not sealed for this client"),
    ],
)
def test_it_does_not_reveal_what_would_unmask_a_neighbour(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    client, _, request = to("masked", tmp_path)
    if change.get("shares") == "swapped":
        change = {"shares": {**request.shares, "1": request.shares["2"]}}
    with pytest.raises(ReplyError, match=why):
        client.reveal(replace(request, **change))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"alive": (1,)}, "too few"),
        ({"alive": (1, 2, 9)}, "not this session's"),
        ({"modulus_bits": 1}, "no ring"),
        ({"modulus_bits": 63}, "no ring"),
        ({"session": "cd" * 16}, "no such session"),
    ],
)
def test_statistics_that_cannot_be_masked_well_are_refused_before_the_pass(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    client, _, _ = to("shares", tmp_path)
    with pytest.raises(ReplyError, match=why):
        client.ready(replace(SUMS, **change))
    client.ready(SUMS)


def test_no_session_masks_both_a_change_and_statistics(tmp_path: Path) -> None:
    """The difference of two vectors under one mask would be in clear."""
    client, _, _ = to("masked", tmp_path)
    with pytest.raises(ReplyError, match="has done this step"):
        client.mask(SUMS, VALUES)
    client, _, _ = to("shares", tmp_path)
    client.mask(SUMS, VALUES)
    with pytest.raises(ReplyError, match="has done this step"):
        client.mask(train(), VALUES)


def test_messages_survive_the_wire_and_bad_fields_do_not(tmp_path: Path) -> None:
    _, others, request = to("masked", tmp_path)
    shares = SharesRequest(SESSION, 1, 0, 2, others.shown)
    for message in (KeysRequest(SESSION, 1), shares, request):
        assert open_envelope(seal(message)) == message
    found = open_envelope(seal(train()))
    assert isinstance(found, SecureTrainRequest) and found.alive == (1, 2, 3)
    sums = open_envelope(seal(SUMS))
    assert isinstance(sums, SecureStatisticsRequest)
    assert replace(sums, adapter={}) == replace(SUMS, adapter={})
    for message, old, new in (
        (KeysRequest(SESSION, 1), SESSION, SESSION.upper()),
        (shares, '"peers":{"1"', '"peers":{"01"'),
        (shares, '"index":0', '"index":-1'),
        (shares, others.shown["1"][0], "00"),
        (request, '"answered":[1,2]', '"answered":[1,true]'),
        (request, request.shares["1"], "zz" * 60),
    ):
        good = seal(message)  # type: ignore[arg-type]
        head = good.head.replace(old, new, 1)
        assert head != good.head
        bad = Envelope(good.kind, head, good.parts, checksum(good.kind, head, good.parts))
        with pytest.raises(ReplyError, match="malformed"):
            open_envelope(bad)
