"""What brings a client to a sub-FM: nothing, patches, or what it lacks of the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedpft_core.wire.coded import Coded
from fedpft_core.wire.package import Patch
from fedpft_core.wire.parcel import Parcel
from server_app.state import State


@dataclass(frozen=True)
class Holds:
    """What the server knows of a client's store.

    Attributes:
        have: digests of the sub-FMs that are in it; None where nobody knows.
        lacks: digests of the tensors and files of the round's sub-FM that are not; None where the
            client has not seen its manifest.
    """

    have: tuple[str, ...] | None = None
    lacks: tuple[str, ...] | None = None

    @property
    def open(self) -> float:
        """How much a client may lack: it is served again only if that becomes less."""
        return float("inf") if self.lacks is None else len(self.lacks)


NOTHING = Holds(())
"""What the server knows of a client that has no sub-FM: it is sent all of one."""
SERVINGS = 3
"""How often a client is served again in a round: the manifest, what it lacks, everything."""


def servings(parcel: Parcel, most: int) -> int:
    """How often a client may be served again in a round.

    Args:
        parcel: the whole package.
        most: bytes of weights and files in one message; 0 = no limit.

    Returns:
        A number that also lets a package in parts come through, whatever its parts.
    """
    return SERVINGS + (2 * math.ceil(parcel.size / most) if most else 0)


class Shelf:
    """Packages that clients get in the form they travel in, made once for each version."""

    def __init__(self) -> None:
        self._parcels: dict[str, Parcel] = {}  # by digest

    def parcel(self, state: State) -> Parcel:
        """The parcel of a state's sub-FM.

        Args:
            state: or a view of one width.

        Returns:
            The parcel with all that belongs to it. Forms of weights that another width or the
            version before has as well are not sought again.
        """
        if state.digest not in self._parcels:
            known: dict[str, Coded] = {}
            for parcel in self._parcels.values():
                known |= parcel.coded
            package = state.package
            manifest = package.manifest(state.digests)
            made = Parcel.of(manifest, package.files, package.weights, known)
            now = {v.digest for v in (*state.beside.values(), *state.others.values())}
            kept = {d: parcel for d, parcel in self._parcels.items() if d in now}
            self._parcels = kept | {state.digest: made}
        return self._parcels[state.digest]


def share(parcel: Parcel, holds: Holds, most: int = 0) -> Parcel:
    """What of a package a client is sent that patches do not bring to it.

    Args:
        parcel: the whole package.
        holds: what is known of the client's store.
        most: bytes of weights and files in one message; 0 = no limit.

    Returns:
        What the client lacks: all of it where it has no sub-FM at all; the manifest alone, for it
        to say, where that is not known.
    """
    if holds.lacks is not None:
        return parcel.only(holds.lacks, most)
    return parcel.only(parcel.manifest.contents if holds.have == () else (), most)


def useful(patches: Sequence[Patch], package_bytes: int) -> list[Patch]:
    """The newest patches that together are smaller than the package; older ones are never sent.

    Args:
        patches: in the order in which they were made.
        package_bytes: size of the whole package, bytes.

    Returns:
        The patches that are left, in the same order.
    """
    out: list[Patch] = []
    size = 0
    for patch in reversed(patches):
        size += len(patch.to_bytes())
        if size >= package_bytes:
            break
        out.insert(0, patch)
    return out


def delivery(
    have: Sequence[str], target: str, package_bytes: int, patches: Sequence[Patch]
) -> tuple[bool, tuple[Patch, ...]]:
    """What brings a client with the sub-FMs `have` to `target`.

    Nothing when it is there already; the chain of patches when it starts at something the
    client has and is smaller than the package; the package otherwise.

    Args:
        have: digests of the sub-FMs that the client has.
        target: digest of the sub-FM it is to train on.
        package_bytes: size of the whole package, bytes.
        patches: in the order in which they were made.

    Returns:
        Whether it gets the package, and the patches it gets, in the order in which they apply.
    """
    if target in have:
        return False, ()
    chain: list[Patch] = []
    want = target
    for patch in reversed(patches):
        if patch.target != want:
            continue
        chain.insert(0, patch)
        want = patch.source
        if want in have:
            small = sum(len(p.to_bytes()) for p in chain) < package_bytes
            return (False, tuple(chain)) if small else (True, ())
    return True, ()
