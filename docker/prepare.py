"""Make what the demo mounts: certificates, node keys, secrets, the FM and data of each party.

    docker/demo prepare                     in a container
    python docker/prepare.py [--only keys]  where fedpft is installed

Everything goes below docker/state. What is there is kept, never overwritten; a half of a pair
without the other is an error.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import ipaddress
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HERE = Path(__file__).resolve().parent
NODES = ("clinic-a", "clinic-b", "clinic-c")
HOSTS = ("superlink", "localhost", "127.0.0.1", "::1")
CA_DAYS, SERVER_DAYS = 3650, 825
# Used when this runs as root: the containers never do.
APP_ID = 49999


class Refused(Exception):
    """Something is in the way; the text says what, and what to do."""


def say(text: str) -> None:
    print(f"prepare: {text}")


def once(paths: Sequence[Path], make: Callable[[], None], what: str) -> bool:
    """Call `make` unless its files are all there; refuse where only some are."""
    there = [p for p in paths if p.exists()]
    if len(there) == len(paths):
        say(f"kept {what}")
        return False
    if there:
        lacking = ", ".join(p.name for p in paths if p not in there)
        raise Refused(
            f"{there[0]} is there but {lacking} is not: put it back, or move the former away; "
            "keys are never overwritten."
        )
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    make()
    say(f"made {what}")
    return True


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """A new file, private from its first byte on where it is to be."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


# ---------------------------------------------------------------- certificates and keys


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, plain)


def _builder(
    subject: str, issuer: x509.Name | None, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer or name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def make_ca(cert: Path, key_file: Path) -> None:
    """A certificate authority of the demo's own; its key signs the SuperLink and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    signed = (
        _builder("fedpft demo CA", None, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write(key_file, _private(key, serialization.PrivateFormat.PKCS8), 0o600)
    write(cert, signed.public_bytes(serialization.Encoding.PEM))


def make_server(
    ca_cert: Path, ca_key: Path, cert: Path, key_file: Path, hosts: Iterable[str]
) -> None:
    """The SuperLink's certificate, good for every name it is reached by."""
    ca = x509.load_pem_x509_certificate(ca_cert.read_bytes())
    signer = serialization.load_pem_private_key(ca_key.read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    signed = (
        _builder("superlink", ca.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_name(h) for h in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    write(key_file, _private(key, serialization.PrivateFormat.PKCS8), 0o600)
    write(cert, signed.public_bytes(serialization.Encoding.PEM))


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def check_server(ca_cert: Path, cert: Path, hosts: Iterable[str]) -> None:
    """Refuse a kept certificate that clients would refuse."""
    ca = x509.load_pem_x509_certificate(ca_cert.read_bytes())
    own = x509.load_pem_x509_certificate(cert.read_bytes())
    again = f"move {cert} and its key away to have them made again."
    try:
        own.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        raise Refused(f"{cert} was not signed by {ca_cert}; {again}") from None
    left = own.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    if left < datetime.timedelta(days=1):
        raise Refused(f"{cert} ends on {own.not_valid_after_utc:%Y-%m-%d}; {again}")
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    lacking = [h for h in hosts if _name(h) not in names]
    if lacking:
        raise Refused(f"{cert} is not good for {', '.join(lacking)}; {again}")


def make_node_key(private: Path, public: Path) -> None:
    """A node's identity, as `ssh-keygen -t ecdsa -b 384` makes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write(private, _private(key, serialization.PrivateFormat.OpenSSH), 0o600)
    write(public, line + b"\n")


def keys(state: Path, hosts: Sequence[str]) -> None:
    """Certificates, node keys, secrets for SuperExecs, Flower settings of the command line."""
    ca, ca_key = state / "ca.crt", state / "ca.key"
    once([ca, ca_key], lambda: make_ca(ca, ca_key), "certificate authority")
    cert, key = state / "superlink" / "server.crt", state / "superlink" / "server.key"
    once(
        [cert, key],
        lambda: make_server(ca, ca_key, cert, key, hosts),
        f"certificate of the SuperLink for {', '.join(hosts)}",
    )
    check_server(ca, cert, hosts)
    for node in NODES:
        private, public = state / node / "node.key", state / node / "node.key.pub"
        once([private, public], partial(make_node_key, private, public), f"key of {node}")
    for owner in ("superlink", *NODES):
        secret = state / owner / "superexec.secret"
        text = secrets.token_hex(32).encode()
        once([secret], partial(write, secret, text, 0o600), f"SuperExec secret of {owner}")
    flower = state / "cli" / "config.toml"
    settings = (
        '[superlink]\ndefault = "demo"\n\n[superlink.demo]\naddress = "superlink:8000"\n'
        'root-certificates = "/run/fedpft/ca.crt"\n'
    )
    once([flower], lambda: write(flower, settings.encode()), "Flower settings of the command line")


# ---------------------------------------------------------------- model and data


def write_rows(path: Path, examples: Any, names: Sequence[str]) -> None:
    """Labelled texts as CSV, under another name until they are complete."""
    part = path.with_name(f".{path.name}.part")
    part.touch(0o600)
    with open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows(
            (t, names[y]) for t, y in zip(examples.inputs, examples.labels, strict=True)
        )
    part.rename(path)
    shown = ", ".join(f"{n} {sum(examples.labels == c)}" for c, n in enumerate(names))
    say(f"made {path.parent.name}/{path.name}: {len(examples)} rows ({shown})")


def data(state: Path) -> None:
    """Each clinic's own rows (skewed by label), the server's test rows, public text and FM."""
    from fedpft_core.config import DataConfig
    from fedpft_core.data import builtin
    from fedpft_core.data.partition import partition
    from fedpft_core.model.load import minilm_folder
    from fedpft_core.task import load_task

    server = state / "server"
    server.mkdir(parents=True, exist_ok=True)
    files = [state / node / "rows.csv" for node in NODES]
    tests, public, model = server / "test.csv", server / "public.txt", server / "model"
    if all(p.exists() for p in [*files, tests, public, model]):
        say("kept model and data")
        return
    say("cutting the demo's data from the docstrings of installed packages (about a minute)")
    cache = state / "cache"
    rows_of = load_task(DataConfig(), 0, cache)
    task = rows_of.task
    shares = partition(task.strata(rows_of.train), len(NODES), "dirichlet", 1.0, 0)
    for file, rows in zip(files, shares, strict=True):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_rows(file, rows_of.train.select(rows), task.labels)
    if not tests.exists():
        write_rows(tests, rows_of.test, task.labels)
    if not public.exists():
        part = server / ".public.part"
        lines = (" ".join(p.split()) for p in builtin.public_paragraphs(cache))
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.rename(public)
        say("made server/public.txt")
    if not model.exists():
        part = server / ".model.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(minilm_folder(), part)
        part.rename(model)
        say("made server/model (all-MiniLM-L6-v2)")
    shutil.rmtree(cache, ignore_errors=True)


# ---------------------------------------------------------------- all of it


def hand_over(state: Path, results: Path, uid: int, gid: int) -> None:
    """As root: give everything but the CA's key to the user the containers run as."""
    for top in (state, results):
        for path in [top, *top.rglob("*")]:
            if path.name != "ca.key":
                os.chown(path, uid, gid, follow_symlinks=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=HERE, help="default: the script's own")
    parser.add_argument("--host", action="append", default=[], help="another name of the SuperLink")
    parser.add_argument("--only", choices=("keys", "data"))
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    state, results = folder / "state", folder / "results"
    root = os.getuid() == 0
    uid = int(os.environ.get("FEDPFT_UID", APP_ID if root else os.getuid()))
    gid = int(os.environ.get("FEDPFT_GID", APP_ID if root else os.getgid()))
    try:
        state.mkdir(parents=True, exist_ok=True)
        results.mkdir(exist_ok=True)
        if args.only != "data":
            keys(state, (*HOSTS, *args.host))
        if args.only != "keys":
            data(state)
        settings = folder / ".env"
        if not settings.exists():
            text = f"COMPOSE_PROJECT_NAME=fedpft\nFEDPFT_UID={uid}\nFEDPFT_GID={gid}\n"
            write(settings, text.encode())
            say(f"made .env: containers run as user {uid}")
        if root:
            hand_over(state, results, uid, gid)
    except (Refused, OSError) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
