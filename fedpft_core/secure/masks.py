"""Putting masks on at a client, and taking off at the server those that do not cancel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedpft_core.secure.keys import (
    Keys,
    Public,
    commitment,
    masking_key,
    pair_seed,
    rebuild,
    stream,
)
from fedpft_core.secure.ring import reduced, wrap


def masked(
    values: np.ndarray,
    k: int,
    keys: Keys,
    index: int,
    peers: Mapping[int, bytes],
    session: bytes,
) -> np.ndarray:
    """A client's numbers under its masks.

    Args:
        values: int64 [n].
        k: bits of the ring.
        keys: the client's.
        index: its number in the session.
        peers: public masking keys of the neighbours that have shared their secrets, by number.
        session: names the session.

    Returns:
        Residues [n] below 2^k; to whom lacks the secrets uniform random numbers.
    """
    total = wrap(values, k) + stream(keys.own, len(values), k)
    mine = masking_key(keys.pairs)
    for peer, key in sorted(peers.items()):
        mask = stream(pair_seed(mine, key, session), len(values), k)
        total = total + mask if index < peer else total - mask
    return reduced(total, k)


def unmasked(
    total: np.ndarray,
    k: int,
    answered: Mapping[int, Mapping[int, bytes]],
    dropped: Mapping[int, Mapping[int, bytes]],
    graph: Mapping[int, Iterable[int]],
    public: Mapping[int, Public],
    threshold: Mapping[int, int],
    session: bytes,
) -> np.ndarray:
    """The sum of the numbers of all who answered.

    Args:
        total: residues [n], the sum of what they sent, modulo 2^k.
        k: bits of the ring.
        answered: by client that answered, shares of its own mask's seed by their holder.
        dropped: by client that shared its secrets and did not answer, shares of its pairs' seed.
        graph: the neighbours of each client, ascending, among all that showed their keys.
        public: the clients' public keys.
        threshold: by client the shares that rebuild its secrets.
        session: names the session.

    Returns:
        Residues [n] below 2^k.

    Raises:
        ValueError: too few shares of a secret, or one is wrong; the client is named by number.
    """
    total = total.copy()
    for client, shares in answered.items():
        seed = _secret(client, shares, graph, threshold)
        if commitment(seed) != public[client].own:
            raise ValueError(f"shares of client {client}'s secret are wrong")
        total = total - stream(seed, len(total), k)
    for client, shares in dropped.items():
        key = masking_key(_secret(client, shares, graph, threshold))
        if key.public_key().public_bytes_raw() != public[client].masking:
            raise ValueError(f"shares of client {client}'s secret are wrong")
        for peer in graph[client]:
            if peer not in answered:
                continue
            mask = stream(pair_seed(key, public[peer].masking, session), len(total), k)
            # The peer added it where its number is the smaller one.
            total = total - mask if peer < client else total + mask
    return reduced(total, k)


def _secret(
    client: int,
    shares: Mapping[int, bytes],
    graph: Mapping[int, Iterable[int]],
    threshold: Mapping[int, int],
) -> bytes:
    places = {holder: i for i, holder in enumerate(graph[client], start=1)}
    try:
        return rebuild({places[h]: s for h, s in shares.items()}, threshold[client])
    except ValueError as error:
        raise ValueError(f"client {client}: {error}") from error
