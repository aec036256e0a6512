"""A TLS server for the checks of a node."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from superlinks import authority, pem, server, signed


@pytest.fixture(scope="module")
def ca() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    return authority("good authority")


@pytest.fixture
def tls(tmp_path: Path, ca: Any) -> Callable[..., Any]:
    """A TLS server whose certificate has these names and days, and the file of its authority."""
    pem(tmp_path / "ca.pem", ca[0])

    def make(names: list[str] | None = None, first: int = -1, last: int = 90) -> Any:
        key = ec.generate_private_key(ec.SECP384R1())
        names = ["127.0.0.1", "localhost"] if names is None else names
        leaf = signed("superlink", key, "good authority", ca[1], names, first, last, False)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem(tmp_path / "server.pem", leaf, key))
        return server(context)

    return make
