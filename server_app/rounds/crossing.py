"""From one width to another: what a client lacks of one sub-FM when it has another."""

from __future__ import annotations

from collections.abc import Sequence

from fedpft_core.proxy.recut import make_recut
from fedpft_core.wire.package import Patch
from server_app.delivery import delivery
from server_app.state import State, Version


class Crossing:
    """The ways from the sub-FMs of other widths to that of one view.

    Patches between widths are made when a client first needs one: few ever move.

    Args:
        state: a view of one width (`State.at`).
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._made: dict[str, Patch] = {}

    def __call__(self, have: Sequence[str], package_bytes: int) -> tuple[bool, tuple[Patch, ...]]:
        """The shortest way, if any is shorter than the package.

        Args:
            have: digests of the sub-FMs that the client has.
            package_bytes: size of the package, bytes.

        Returns:
            Whether it gets the package, and the patches it gets, in the order in which they apply.
        """
        best: tuple[Patch, ...] = ()
        least = package_bytes
        for version in self.state.beside.values():
            whole, chain = delivery(have, version.digest, package_bytes, version.patches)
            if whole or version.package.weights.keys() != self.state.package.weights.keys():
                continue
            chain = (*chain, self._recut(version))
            size = sum(len(patch.to_bytes()) for patch in chain)
            if size < least:
                best, least = chain, size
        return not best, best

    def _recut(self, version: Version) -> Patch:
        if version.digest not in self._made:
            self._made[version.digest] = make_recut(
                version.package, version.digest, self.state.package, self.state.digest
            )
        return self._made[version.digest]


__all__ = ["Crossing"]
