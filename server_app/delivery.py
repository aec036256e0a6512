"""What brings a client to the sub-FM it is to train on: nothing, patches, or the package."""

from __future__ import annotations

from collections.abc import Sequence

from fedpft_core.wire.package import Patch


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
