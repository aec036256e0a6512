"""A Ray cluster that is there already: what must be so before this program uses it."""

from __future__ import annotations

import os
import re

from fedpft_core.errors import UserError


def check(option: str, address: str) -> None:
    """Refuse an address that is none, and a Ray cluster on which anybody may run code.

    Args:
        option: named in the error.
        address: the cluster's.

    Raises:
        UserError: it is no address, or this environment has no token for the cluster.
    """
    if not re.fullmatch(r"auto|[\w.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", address):
        raise UserError(f"{option} {address}: expected HOST:PORT, or auto.")
    token = any(os.environ.get(f"RAY_AUTH_{name}") for name in ("TOKEN", "TOKEN_PATH"))
    if os.environ.get("RAY_AUTH_MODE") != "token" or not token:
        raise UserError(
            f"{option}: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN must be set here as they are on the "
            "cluster: without them, whoever reaches a Ray cluster runs code on it."
        )
