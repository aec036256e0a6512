"""Connection, certificate and key, against real sockets on loopback."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from superlinks import authority, openssh, pem, server, signed

from client_app.check import connection, findings
from client_app.check.findings import FAIL, PASS, Finding
from fedpft_core.errors import UserError


def certificate(port: int, roots: Path | None, host: str = "127.0.0.1") -> Finding:
    at = connection.Address(host, port)
    return findings.guarded("certificate", lambda: connection.certificate(at, roots, 5))


def test_a_good_certificate_says_how_long(tls: Any, tmp_path: Path) -> None:
    with tls() as port:
        found = certificate(port, tmp_path / "ca.pem")
        assert found.status == PASS and "valid for 90 more days" in found.text, found
        assert "authority for 400" in found.text and "renew" not in found.text
        assert certificate(port, tmp_path / "ca.pem", "localhost").status == PASS
    with tls(last=5) as port:
        found = certificate(port, tmp_path / "ca.pem")
        assert found.status == PASS and "5 more days" in found.text and "renew soon" in found.text


def test_a_certificate_of_another_authority(tls: Any, tmp_path: Path) -> None:
    # One that only has the same name, too.
    for name in ("other authority", "good authority"):
        other = pem(tmp_path / "other.pem", authority(name)[0])
        with tls() as port:
            found = certificate(port, other)
        assert found.status == FAIL
        assert f"signed by another authority than that in {other}" in found.text, found
    with tls() as port:
        found = certificate(port, None)
    assert found.status == FAIL and "give the authority's certificate" in found.text


def test_a_certificate_out_of_its_time(tls: Any, tmp_path: Path) -> None:
    with tls(first=-30, last=-2) as port:
        found = certificate(port, tmp_path / "ca.pem")
    assert found.status == FAIL and "has expired" in found.text and "valid from 20" in found.text
    with tls(first=3) as port:
        found = certificate(port, tmp_path / "ca.pem")
    assert found.status == FAIL and "is not valid yet: check this clock" in found.text


def test_an_expired_authority(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    old = signed("old", key, "old", key, [], -30, -2, True)
    own = ec.generate_private_key(ec.SECP384R1())
    leaf = signed("superlink", own, "old", key, ["127.0.0.1"], -1, 90, False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem(tmp_path / "server.pem", leaf, own))
    with server(context) as port:
        found = certificate(port, pem(tmp_path / "old.pem", old))
    assert found.status == FAIL
    assert "(or that of its authority) has expired" in found.text


def test_a_certificate_for_another_name(tls: Any, tmp_path: Path) -> None:
    with tls(["superlink.example", "10.0.0.1"]) as port:
        for host in ("127.0.0.1", "localhost"):
            found = certificate(port, tmp_path / "ca.pem", host)
            assert found.status == FAIL
            assert f"is for superlink.example, 10.0.0.1, not for {host}." in found.text, found
    with tls([]) as port:
        assert "no name at all" in certificate(port, tmp_path / "ca.pem").text


def test_roots_that_are_none(tls: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    (tmp_path / "text.pem").write_text("not a certificate")
    with tls() as port:
        for name in ("empty.pem", "text.pem"):
            found = certificate(port, tmp_path / name)
            assert found.status == FAIL and "holds no certificate" in found.text
        found = certificate(port, tmp_path / "missing.pem")
        assert found.status == FAIL and "No such file" in found.text


def test_a_server_without_tls_and_one_with(tls: Any, tmp_path: Path) -> None:
    pem(tmp_path / "ca.pem", authority("any")[0])
    with server(None) as port:
        found = certificate(port, tmp_path / "ca.pem")
        assert found.status == FAIL and "--insecure" in found.text, found
        plain = connection.speak_plainly(connection.Address("127.0.0.1", port), 5)
        assert "not encrypted" in plain
    with tls() as port, pytest.raises(UserError, match=r"with TLS \(leave out --insecure"):
        connection.speak_plainly(connection.Address("127.0.0.1", port), 5)
    with server(None, b"220 mail\r\n") as port, pytest.raises(UserError, match="plain HTTP"):
        connection.speak_plainly(connection.Address("127.0.0.1", port), 5)


def test_a_server_that_says_nothing_ends_in_time(tmp_path: Path) -> None:
    roots = pem(tmp_path / "ca.pem", authority("any")[0])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = connection.Address("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(UserError, match=r"TLS handshake within 0\.3 s"):
            connection.certificate(at, roots, 0.3)


def test_reaching(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(None) as port:
        assert "accepts connections" in connection.reach(connection.Address("127.0.0.1", port), 5)
    with pytest.raises(UserError, match="refuses connections"):
        connection.reach(connection.Address("127.0.0.1", port), 5)

    def fail(error: OSError) -> Any:
        def connect(*_: Any) -> Any:
            raise error

        return connect

    at = connection.Address("superlink.invalid", 8000)
    for error, words in (
        (socket.gaierror(-2, "Name or service not known"), "cannot be resolved"),
        (TimeoutError(), "does not answer within 1 s: a firewall"),
        (OSError(101, "Network is unreachable"), "Network is unreachable"),
    ):
        monkeypatch.setattr(socket, "create_connection", fail(error))
        with pytest.raises(UserError, match=words):
            connection.reach(at, 1)


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":80", "host:0", "host:99999", "http://h:80", "::1:80", "h:80/x"],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="expected HOST:PORT"):
        connection.address(text)


def test_addresses() -> None:
    assert connection.address("[::1]:80") == connection.Address("::1", 80)
    assert str(connection.address("[::1]:80")) == "[::1]:80"
    assert connection.address("a.b:8000") == connection.Address("a.b", 8000)


def test_keys(tmp_path: Path) -> None:
    good = ec.generate_private_key(ec.SECP384R1())
    path = openssh(tmp_path / "key", good)
    assert connection.private_key(path) == "an ECDSA key on the curve secp384r1."
    path.chmod(0o644)
    assert "chmod 600" in connection.private_key(path)
    public = good.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (tmp_path / "key.pub").write_bytes(public)
    (tmp_path / "noise").write_bytes(os.urandom(500))
    bad = {
        "is of kind Ed25519": openssh(tmp_path / "ed", ed25519.Ed25519PrivateKey.generate()),
        "is a public key": tmp_path / "key.pub",
        "no private key in OpenSSH form": pem(tmp_path / "pkcs8", good),
        "is no private key": tmp_path / "noise",
        "cannot be read": tmp_path / "missing",
    }
    if shutil.which("ssh-keygen"):
        locked = ["ssh-keygen", "-q", "-t", "ecdsa", "-N", "secret", "-f", str(tmp_path / "locked")]
        subprocess.run(locked, check=True)
        bad["is locked with a passphrase"] = tmp_path / "locked"
    for words, file in bad.items():
        with pytest.raises(UserError, match=words):
            connection.private_key(file)
