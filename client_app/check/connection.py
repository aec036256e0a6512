"""The way to a SuperLink: connection, certificate, and the key a node signs with.

Nothing here needs Flower: a SuperLink is reached as any HTTP server is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedpft_core.disk import plain
from fedpft_core.errors import UserError

_SOON_DAYS = 14


@dataclass(frozen=True)
class Address:
    """Host and port of a SuperLink."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    """Read HOST:PORT, IPv6 in brackets.

    Args:
        text: what was given as --superlink.

    Returns:
        Host, without brackets, and port.

    Raises:
        UserError: it is anything else.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    good = bool(colon and host and port.isdecimal() and len(port) < 6 and 0 < int(port) < 2**16)
    if not good or (":" in host and not bracketed) or "/" in host:
        raise UserError(f"--superlink {text}: expected HOST:PORT without http://.")
    return Address(host, int(port))


def reach(at: Address, timeout: float) -> str:
    """Open a TCP connection, and close it.

    Args:
        at: the SuperLink.
        timeout: the longest wait, seconds.

    Returns:
        A sentence with the milliseconds it took.

    Raises:
        UserError: saying what stands in the way.
    """
    start = time.perf_counter()
    with _connected(at, timeout):
        seconds = time.perf_counter() - start
    return f"{at} accepts connections ({1000 * seconds:.0f} ms)."


def _connected(at: Address, timeout: float) -> socket.socket:
    try:
        return socket.create_connection((at.host, at.port), timeout)
    except socket.gaierror as error:
        raise UserError(f"the host name {at.host} cannot be resolved ({error.strerror}).") from None
    except TimeoutError:
        raise UserError(
            f"{at} does not answer within {timeout:g} s: a firewall, or the wrong address."
        ) from None
    except ConnectionRefusedError:
        raise UserError(
            f"{at} refuses connections: no SuperLink listens there, or on another interface only."
        ) from None
    except OSError as error:
        raise UserError(f"{at} cannot be reached ({error.strerror or error}).") from None
    except ValueError:
        raise UserError(f"{at.host!r} is a name that no host can have.") from None


_REQUEST = b"GET / HTTP/1.1\r\nHost: superlink\r\nConnection: close\r\n\r\n"


def speak_plainly(at: Address, timeout: float) -> str:
    """With --insecure: whether the port speaks HTTP.

    Args:
        at: the SuperLink.
        timeout: the longest wait, seconds.

    Returns:
        A sentence that says so.

    Raises:
        UserError: it does not, or cannot be reached.
    """
    if not _answer(_connected(at, timeout), timeout).startswith(b"HTTP/"):
        raise UserError(
            f"{at} does not answer plain HTTP: it is a SuperLink with TLS (leave out --insecure), "
            "or something else."
        )
    return "the connection is not encrypted, as --insecure says."


def _answer(connection: socket.socket, timeout: float) -> bytes:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(timeout)
        connection.sendall(_REQUEST)
        return connection.recv(64)
    return b""


def certificate(at: Address, roots: Path | None, timeout: float) -> str:
    """Check chain, name and dates as Flower will.

    Args:
        at: the SuperLink.
        roots: file with the authorities' certificates in PEM form; None for those of the system.
        timeout: the longest wait for each step, seconds.

    Returns:
        A sentence with the days the certificate and its authority are valid for.

    Raises:
        UserError: with the fault in words.
    """
    context = _context(roots)
    connection = _connected(at, timeout)
    try:
        with connection, context.wrap_socket(connection, server_hostname=at.host) as secured:
            found: Any = secured.getpeercert() or {}
            secured.sendall(_REQUEST)
            with contextlib.suppress(OSError):
                if not secured.recv(64).startswith(b"HTTP/"):
                    raise UserError(f"{at} has a good certificate but does not answer HTTP.")
    except ssl.SSLCertVerificationError as error:
        raise UserError(_fault(error, at, roots, timeout)) from None
    except ssl.SSLError as error:
        raise UserError(
            f"{at} does not speak TLS as expected ({error.reason or error}): a SuperLink without "
            "TLS (then give --insecure), or something else."
        ) from None
    except TimeoutError:
        raise UserError(f"{at} does not finish the TLS handshake within {timeout:g} s.") from None
    except OSError as error:
        raise UserError(
            f"{at} ends the TLS handshake ({error.strerror or error}): a SuperLink without TLS "
            "(then give --insecure), or something else."
        ) from None
    days = _days(ssl.cert_time_to_seconds(found["notAfter"]))
    ends = [days]
    with contextlib.suppress(KeyError, ValueError):
        ends += [_days(ssl.cert_time_to_seconds(str(ca["notAfter"]))) for ca in _authorities(roots)]
    text = f"the certificate of {at} is valid for {days:.0f} more days"
    if len(ends) > 1:
        text += f", its authority for {min(ends[1:]):.0f}"
    return text + (": renew soon." if min(ends) < _SOON_DAYS else ".")


def _context(roots: Path | None) -> ssl.SSLContext:
    if roots is None:
        return ssl.create_default_context()
    try:
        plain.read(roots)
        return ssl.create_default_context(cafile=str(roots))
    except ssl.SSLError:
        raise UserError(f"--root-certificates {roots}: holds no certificate in PEM form.") from None
    except OSError as error:
        raise UserError(
            f"--root-certificates {roots}: cannot be read ({error.strerror or error})."
        ) from None


def _authorities(roots: Path | None) -> list[Any]:
    # Of the system's hundreds none is of interest.
    return [] if roots is None else list(_context(roots).get_ca_certs())


def _days(seconds: float) -> float:
    return (seconds - time.time()) / 86400


# OpenSSL's numbers for the results of verification (openssl-verification-options(1)).
_NOT_YET, _EXPIRED, _WRONG_NAME, _WRONG_ADDRESS = 9, 10, 62, 64
_UNKNOWN_AUTHORITY = (7, 18, 19, 20, 21, 24, 30)


def _fault(
    error: ssl.SSLCertVerificationError, at: Address, roots: Path | None, timeout: float
) -> str:
    code, shown = error.verify_code, _presented(at, timeout)
    if code in (_NOT_YET, _EXPIRED):
        limits = ""
        if shown is not None:
            now = datetime.now(UTC)
            if not shown.not_valid_before_utc <= now <= shown.not_valid_after_utc:
                first, last = (
                    t.date() for t in (shown.not_valid_before_utc, shown.not_valid_after_utc)
                )
                limits = f" (it is valid from {first} to {last})"
            else:
                limits = " (or that of its authority)"
        what = "has expired" if code == _EXPIRED else "is not valid yet: check this clock"
        return f"the certificate of {at}{limits} {what}."
    if code in (_WRONG_NAME, _WRONG_ADDRESS):
        names = ", ".join(_names(shown)) or "no name at all"
        return f"the certificate of {at} is for {names}, not for {at.host}."
    if code in _UNKNOWN_AUTHORITY:
        given = f"that in {roots}" if roots else "one that this system trusts"
        hint = "" if roots else " (give the authority's certificate by --root-certificates)"
        return f"the certificate of {at} was signed by another authority than {given}{hint}."
    return f"the certificate of {at} does not verify ({error.verify_message})."


def _presented(at: Address, timeout: float) -> Any:
    """The certificate the server shows, not verified: only to say what is wrong with it."""
    from cryptography import x509  # comes with Flower

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError, UserError, ValueError):
        connection = _connected(at, timeout)
        with connection, context.wrap_socket(connection, server_hostname=at.host) as secured:
            return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    return None


def _names(shown: Any) -> list[str]:
    from cryptography import x509

    if shown is None:
        return []
    try:
        found = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value) for name in found][:8]


def private_key(path: Path) -> str:
    """Whether Flower can sign with this key.

    Args:
        path: the file, in OpenSSH form.

    Returns:
        A sentence with the key's curve, and a hint where others can read the file.

    Raises:
        UserError: saying why not.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    where = f"--auth-supernode-private-key {path}"
    make = "make one with `ssh-keygen -t ecdsa -b 384 -N '' -f KEY`"
    try:
        data = plain.read(path)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error}).") from None
    if data.startswith((b"ecdsa-sha2", b"ssh-")):
        raise UserError(f"{where}: is a public key; the private one has no .pub at its end.")
    try:
        key = load_ssh_private_key(data, None)
    except TypeError:
        raise UserError(
            f"{where}: is locked with a passphrase, which no SuperNode can type."
        ) from (None)
    except (ValueError, IndexError, OverflowError, UnsupportedAlgorithm):
        raise UserError(f"{where}: is no private key in OpenSSH form; {make}.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        kind = type(key).__name__.removeprefix("_").removesuffix("PrivateKey")
        raise UserError(f"{where}: is of kind {kind}, not an elliptic-curve (ECDSA) key; {make}.")
    loose = os.name == "posix" and path.stat().st_mode & 0o077
    open_to_others = " Others on this machine can read it: chmod 600." if loose else ""
    return f"an ECDSA key on the curve {key.curve.name}.{open_to_others}"
