"""Keys of one client for one session: all follow from a root of 32 random bytes.

X25519 agrees on secrets, HKDF (SHA-256) makes keys of them, AES-GCM seals shares on their
way through the server, AES-CTR draws masks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpft_core.secure.ring import kind, reduced

ROOT = 32  # bytes
SECRET = 16  # bytes of what is shared out
SHARE = 2 * SECRET  # of the own mask's seed and of the pairs' seed
_NONCE = 12
SEALED = _NONCE + SHARE + 16  # with AES-GCM's tag


@dataclass(frozen=True)
class Public:
    """What a client shows of its keys, 32 bytes each.

    `sealing` is for shares on their way, `masking` for the pairs' masks; `own` is a digest of the
    own mask's seed, by which wrong shares of it are noticed.
    """

    sealing: bytes
    masking: bytes
    own: bytes

    @property
    def usable(self) -> bool:
        """Whether secrets can be agreed on with these keys."""
        probe = X25519PrivateKey.generate()
        try:
            return all(_agree(probe, key) for key in (self.sealing, self.masking))
        except ValueError:
            return False


@dataclass(frozen=True)
class Keys:
    """The secrets of a client; `own` and `pairs` are shared out among its neighbours."""

    sealing: X25519PrivateKey
    own: bytes
    pairs: bytes

    @staticmethod
    def of(root: bytes) -> Keys:
        """The keys that follow from a root.

        Args:
            root: 32 random bytes that only the client has.

        Returns:
            The keys.
        """
        sealing = X25519PrivateKey.from_private_bytes(_derive(root, b"sealing", 32))
        return Keys(sealing, _derive(root, b"own", SECRET), _derive(root, b"pairs", SECRET))

    @property
    def public(self) -> Public:
        """The public halves."""
        return Public(
            self.sealing.public_key().public_bytes_raw(),
            masking_key(self.pairs).public_key().public_bytes_raw(),
            commitment(self.own),
        )


def commitment(own: bytes) -> bytes:
    """The digest that an own mask's seed is known by.

    Args:
        own: 16 random bytes.

    Returns:
        32 bytes.
    """
    return _derive(own, b"commitment", 32)


def masking_key(pairs: bytes) -> X25519PrivateKey:
    """The private key of a client's pairs' masks, from the seed that is shared out.

    Args:
        pairs: 16 bytes.

    Returns:
        The key.
    """
    return X25519PrivateKey.from_private_bytes(_derive(pairs, b"masking", 32))


def pair_seed(mine: X25519PrivateKey, theirs: bytes, session: bytes) -> bytes:
    """The seed of the mask of a pair, the same from either side.

    Args:
        mine: one's masking key.
        theirs: the other's public masking key.
        session: names the session.

    Returns:
        16 bytes.

    Raises:
        ValueError: the public key is none.
    """
    return _derive(_agree(mine, theirs), b"pair" + session, SECRET)


def stream(seed: bytes, count: int, k: int) -> np.ndarray:
    """The mask that a seed stands for.

    Args:
        seed: 16 bytes, used for one mask only.
        count: n.
        k: bits of the ring.

    Returns:
        Residues [n] below 2^k, uniform.
    """
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    own = np.dtype(kind(k))
    drawn = np.frombuffer(encryptor.update(bytes(own.itemsize * count)), own.newbyteorder("<"))
    return reduced(drawn.astype(own), k)


def share_out(keys: Keys, count: int, threshold: int) -> list[bytes]:
    """Shares of a client's two secrets, one for each neighbour.

    Args:
        keys: the client's.
        count: neighbours.
        threshold: shares that rebuild a secret.

    Returns:
        32 bytes each: a share of `own`, then one of `pairs`.
    """
    both = [dict(Shamir.split(threshold, count, s, False)) for s in (keys.own, keys.pairs)]
    return [both[0][i] + both[1][i] for i in range(1, count + 1)]


def rebuild(shares: dict[int, bytes], threshold: int) -> bytes:
    """A secret from its shares.

    Args:
        shares: 16 bytes each, by the place of the holder among the neighbours, from 1.
        threshold: how many are needed.

    Returns:
        16 bytes; wrong ones where a share is wrong.

    Raises:
        ValueError: there are too few.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares of the {threshold} needed")
    return Shamir.combine([(i, shares[i]) for i in sorted(shares)[:threshold]], False)


def seal(
    mine: X25519PrivateKey, theirs: bytes, share: bytes, session: bytes, way: tuple[int, int]
) -> bytes:
    """Encrypt a share for a neighbour.

    Args:
        mine: one's sealing key.
        theirs: the neighbour's public sealing key.
        share: 32 bytes.
        session: names the session.
        way: from whom to whom; the share cannot be passed off as another's.

    Returns:
        60 bytes.

    Raises:
        ValueError: the public key is none.
    """
    nonce = os.urandom(_NONCE)
    return nonce + _box(mine, theirs, session).encrypt(nonce, share, _label(way))


def unseal(
    mine: X25519PrivateKey, theirs: bytes, sealed: bytes, session: bytes, way: tuple[int, int]
) -> bytes:
    """The inverse of `seal`.

    Args:
        mine: one's sealing key.
        theirs: the sender's public sealing key.
        sealed: 60 bytes.
        session: names the session.
        way: from whom to whom.

    Returns:
        The share, 32 bytes.

    Raises:
        ValueError: it was not sealed so, or the public key is none.
    """
    try:
        box = _box(mine, theirs, session)
        found = box.decrypt(sealed[:_NONCE], sealed[_NONCE:], _label(way))
    except InvalidTag as error:
        raise ValueError("a share was not sealed for this client") from error
    if len(found) != SHARE:
        raise ValueError("a share has the wrong length")
    return found


def _box(mine: X25519PrivateKey, theirs: bytes, session: bytes) -> AESGCM:
    return AESGCM(_derive(_agree(mine, theirs), b"share" + session, 32))


def _label(way: tuple[int, int]) -> bytes:
    return f"{way[0]}>{way[1]}".encode()


def _agree(mine: X25519PrivateKey, theirs: bytes) -> bytes:
    return mine.exchange(X25519PublicKey.from_public_bytes(theirs))


def _derive(secret: bytes, purpose: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt=None, info=b"fedpft " + purpose).derive(secret)
