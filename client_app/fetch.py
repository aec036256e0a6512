"""How a client comes to the sub-FM it is asked to train on: from its disk and from the message."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from client_app.policy import Policy
from client_app.store import Store
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.proxy.patch import apply_patch
from fedpft_core.wire.identity import is_digest
from fedpft_core.wire.messages import NeedReply, StatisticsRequest, TrainRequest
from fedpft_core.wire.package import Package
from fedpft_core.wire.parcel import Parcel

log = logging.getLogger("fedpft")


def fetch(
    name: str, store: Store, policy: Policy, request: TrainRequest | StatisticsRequest
) -> Package | NeedReply:
    """The sub-FM with the digest asked for, which is then in the store.

    Args:
        name: the client's.
        store: what it has; gets what the message brings.
        policy: what its owner lets a server ask for.
        request: names the sub-FM, and may bring some of it.

    Returns:
        The sub-FM, every byte of it verified; or what is lacking of it.

    Raises:
        ReplyError: what the message brings is not what it promises.
        UserError: the owner's policy refuses the sub-FM, or the disk is full and the sub-FM comes
            in parts.
    """
    if request.package:
        return _from_parcel(name, store, policy, request)
    found = store.read(request.digest)
    if found and found.package:
        return found.package
    package = _patched(name, store, request) if request.patches else None
    return package or _need(name, store, request.digest, found.lacking if found else None)


def _need(name: str, store: Store, digest: str, lacking: tuple[str, ...] | None) -> NeedReply:
    # Not what was asked for, even if a damaged copy of it cannot be removed.
    have = tuple(d for d in store.digests() if d != digest)
    return NeedReply(name, digest, have, lacking)


def _from_parcel(
    name: str, store: Store, policy: Policy, request: TrainRequest | StatisticsRequest
) -> Package | NeedReply:
    parcel = Parcel.from_bytes(request.package)
    manifest = parcel.manifest
    if manifest.digest != request.digest:
        raise ReplyError("the package received does not have the digest it was sent under")
    policy.check_package(manifest.meta)
    found = store.fill(manifest, parcel)
    if found.package:
        _keep(name, store, request.digest, found.package, manifest.digests, parcel)
        return found.package
    try:
        store.keep_parts(parcel)
    except OSError as error:
        text = f"the store cannot take a part of the sub-FM ({error.strerror or error})"
        public = "this node's store is full, and the sub-FM came in parts"
        raise UserError(f"client {name}: {text}.", public=public) from error
    return _need(name, store, request.digest, found.lacking)


def _patched(name: str, store: Store, request: TrainRequest | StatisticsRequest) -> Package | None:
    if request.patches[-1].target != request.digest:
        raise ReplyError("the patches received do not lead to the sub-FM to train on")
    base: Package | None = None
    digests: dict[str, str] = {}
    for patch in request.patches:
        if base is None:
            # The chain may start before what this client has.
            if not is_digest(patch.source):
                raise ReplyError("a patch received starts from what is no digest")
            found = store.read(patch.source)
            if found is None or found.package is None:
                continue
            # Reading has verified them; each patch changes those of what it moves.
            base, digests = found.package, dict(found.manifest.digests)
        base = apply_patch(base, patch, digests)
    if base is not None:
        _keep(name, store, request.digest, base, digests)
    return base


def _keep(
    name: str, store: Store, digest: str, package: Package, digests: Mapping[str, str],
    parcel: Parcel | None = None,
) -> None:  # fmt: skip
    """Store a verified package; on a full disk train from memory and be served again."""
    try:
        store.put(digest, package, digests, parcel)
    except OSError as error:
        log.warning("client %s: sub-FM not kept on disk: %s", name, error)


__all__ = ["fetch"]
