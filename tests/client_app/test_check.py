"""`fedpft node check` against real sockets, certificates, keys, files and models on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import tiny
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from client_app.check import node as node_check
from client_app.check import probes as nodecheck
from client_app.check.node import Options, check, parse
from client_app.check.probes import FAIL, PASS, SKIPPED, Finding
from client_app.store import Store
from fedpft_console import cli
from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.errors import UserError
from fedpft_core.model.families import family_of
from fedpft_core.proxy import size as plansize
from fedpft_core.proxy.build import build
from fedpft_core.proxy.package import make_package

DAY = timedelta(days=1)


# --- what is needed -----------------------------------------------------------------------


def authority(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP384R1())
    return signed(name, key, name, key, [], -1, 400, True), key


def signed(
    subject: str, key: Any, issuer: str, by: Any, names: list[str], first: int, last: int, ca: bool
) -> x509.Certificate:
    """A certificate valid from `first` to `last` days from now."""

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + first * DAY)
        .not_valid_after(now + last * DAY + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False
        )
    )
    if ca:
        usage = dict.fromkeys(
            ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
             "key_agreement", "encipher_only", "decipher_only"], False,
        )  # fmt: skip
        made = made.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), True)
    if names:
        alternatives: list[x509.GeneralName] = [
            x509.IPAddress(ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names
        ]
        made = made.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return made.sign(by, hashes.SHA384())


def pem(path: Path, *things: Any) -> Path:
    out = b""
    for thing in things:
        if isinstance(thing, x509.Certificate):
            out += thing.public_bytes(serialization.Encoding.PEM)
        else:
            out += thing.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
    path.write_bytes(out)
    return path


@contextlib.contextmanager
def server(
    context: ssl.SSLContext | None, answer: bytes = b"HTTP/1.1 404 No\r\n\r\n"
) -> Iterator[int]:
    """A server on loopback that answers each request; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stop = threading.Event()

    def one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(5)
            if context:
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.recv(1000)
                    secured.sendall(answer)
            else:
                got = connection.recv(1000)
                if got.startswith(b"GET "):
                    connection.sendall(answer)

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                one(listener.accept()[0])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        stop.set()
        thread.join()
        listener.close()


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


def certificate(port: int, roots: Path | None, host: str = "127.0.0.1") -> Finding:
    at = nodecheck.Address(host, port)
    return nodecheck.guarded("certificate", lambda: nodecheck.certificate(at, roots, 5))


# --- the SuperLink ------------------------------------------------------------------------


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
        plain = nodecheck.speak_plainly(nodecheck.Address("127.0.0.1", port), 5)
        assert "not encrypted" in plain
    with tls() as port, pytest.raises(UserError, match=r"with TLS \(leave out --insecure"):
        nodecheck.speak_plainly(nodecheck.Address("127.0.0.1", port), 5)
    with server(None, b"220 mail\r\n") as port, pytest.raises(UserError, match="plain HTTP"):
        nodecheck.speak_plainly(nodecheck.Address("127.0.0.1", port), 5)


def test_a_server_that_says_nothing_ends_in_time(tmp_path: Path) -> None:
    roots = pem(tmp_path / "ca.pem", authority("any")[0])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = nodecheck.Address("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(UserError, match=r"TLS handshake within 0\.3 s"):
            nodecheck.certificate(at, roots, 0.3)


def test_reaching(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(None) as port:
        assert "accepts connections" in nodecheck.reach(nodecheck.Address("127.0.0.1", port), 5)
    with pytest.raises(UserError, match="refuses connections"):
        nodecheck.reach(nodecheck.Address("127.0.0.1", port), 5)

    def fail(error: OSError) -> Any:
        def connect(*_: Any) -> Any:
            raise error

        return connect

    at = nodecheck.Address("superlink.invalid", 8000)
    for error, words in (
        (socket.gaierror(-2, "Name or service not known"), "cannot be resolved"),
        (TimeoutError(), "does not answer within 1 s: a firewall"),
        (OSError(101, "Network is unreachable"), "Network is unreachable"),
    ):
        monkeypatch.setattr(socket, "create_connection", fail(error))
        with pytest.raises(UserError, match=words):
            nodecheck.reach(at, 1)


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":80", "host:0", "host:99999", "http://h:80", "::1:80", "h:80/x"],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="expected HOST:PORT"):
        nodecheck.address(text)


def test_addresses() -> None:
    assert nodecheck.address("[::1]:80") == nodecheck.Address("::1", 80)
    assert str(nodecheck.address("[::1]:80")) == "[::1]:80"
    assert nodecheck.address("a.b:8000") == nodecheck.Address("a.b", 8000)


# --- the key ------------------------------------------------------------------------------


def openssh(path: Path, key: Any) -> Path:
    form, lock = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, lock))
    path.chmod(0o600)
    return path


def test_keys(tmp_path: Path) -> None:
    good = ec.generate_private_key(ec.SECP384R1())
    path = openssh(tmp_path / "key", good)
    assert nodecheck.private_key(path) == "an ECDSA key on the curve secp384r1."
    path.chmod(0o644)
    assert "chmod 600" in nodecheck.private_key(path)
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
            nodecheck.private_key(file)


# --- room ---------------------------------------------------------------------------------


def test_folders(tmp_path: Path) -> None:
    assert "is writable" in nodecheck.folder(tmp_path / "new" / "cache", 10)
    assert not list((tmp_path / "new" / "cache").iterdir())
    with pytest.raises(UserError, match=r"free, but 4 sub-FMs .* need 10000000\.0 GB"):
        nodecheck.folder(tmp_path, 10**16)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        nodecheck.folder(tmp_path / "file", 0)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodecheck.available_memory() > 10**6
    assert "a message needs about 1 MB" in nodecheck.memory(10**6)
    with pytest.raises(UserError, match="of memory are free, but a message needs about"):
        nodecheck.memory(10**16)


# --- the whole ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fedpft inspect --json` prints for a tiny model."""
    folder = tmp_path_factory.mktemp("fm")
    flat = {
        "model.name": str(tiny.folder("bert", folder / "fm")), "plan.keep-share": 0.5,
        "data.labels": ",".join(tiny.LABELS), "data.max-length": 16,
    }  # fmt: skip
    path = folder / "plan.json"
    path.write_text(plansize.describe(config.from_flat(flat)).to_json())
    return path


def findings(options: Options) -> dict[str, Finding]:
    return {f.name: f for f in check(options)}


def node_config(tmp_path: Path, **more: Any) -> str:
    keys = {
        "name": "a", "data-path": str(tmp_path / "rows.csv"), "cache-dir": str(tmp_path / "cache"),
    } | more  # fmt: skip
    return " ".join(f"{k}={json.dumps(v)}" for k, v in keys.items())


def test_a_machine_that_is_ready(tls: Any, plan: Path, tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(60))
    key = openssh(tmp_path / "key", ec.generate_private_key(ec.SECP384R1()))
    with tls() as port:
        found = findings(
            Options(
                node_config(tmp_path, **{"validation-share": 0.2}),
                f"127.0.0.1:{port}",
                root_certificates=tmp_path / "ca.pem",
                key=key,
                plan=plan,
            )
        )
    assert {f.status for f in found.values()} == {PASS}, found
    assert list(found) == [
        "node config", "plan", "data", "labels", "cache-dir", "memory", "training step",
        "SuperLink", "certificate", "node key",
    ]  # fmt: skip
    text = found["data"].text
    assert "60 rows" in text and "kept for validation" in text
    assert all(f"{label} 20" in text for label in tiny.LABELS)
    assert "s for 12 rows on cpu with 1 threads (a random model" in found["training step"].text
    assert "the 3 known." in found["labels"].text


def test_the_plans_description_tells_no_secret(plan: Path) -> None:
    size = plansize.read(plan)
    made = size.client_model()
    kept = [b.kept for b in made.plan.blocks if b.kept]
    assert kept and all(k == tuple(range(len(k))) for k in kept)
    fm = tiny.model("bert")
    real = build(fm, tiny.plan_for(fm, keep_share=0.5))
    assert size.sub_fm_bytes == sum(4 * p.numel() for p in real.parameters())
    assert size.package_bytes > size.sub_fm_bytes - size.adapter_bytes > 0
    assert plan.stat().st_size < 10_000


def test_each_fault_of_the_data_is_named(plan: Path, tmp_path: Path) -> None:
    def status(row: str, words: str, text: str | None = None, **more: Any) -> dict[str, Finding]:
        if text is not None:
            (tmp_path / "rows.csv").write_text(text)
        found = findings(Options(node_config(tmp_path, **more), plan=plan))
        assert found[row].status == FAIL and words in found[row].text, found
        return found

    found = status("data", "there is no such file")
    assert found["labels"].status == SKIPPED
    status("data", "has no text", "text,label\n,animal\n")
    found = status(
        "labels", "row 2 has the unknown label 'ghost'", "text,label\na,animal\nb,ghost\n"
    )
    assert found["data"].status == PASS and "ghost 1" in found["data"].text
    assert found["training step"].status == PASS  # random rows do not need these
    status("data", "label", "text,kind\na,animal\n")
    status("node config", "no such key 'nmae'", "text,label\na,animal\n", nmae="x")
    found = status("node config", "name and data-path", name="")
    assert found["data"].status == found["training step"].status == SKIPPED
    status("node config", "max-threads expects int", **{"max-threads": "2"})
    status("node config", "validation-share", **{"validation-share": 1.5})


def test_no_room(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    monkeypatch.setattr(nodecheck, "available_memory", lambda: 10**6)
    found = findings(Options(node_config(tmp_path), plan=plan))
    assert found["memory"].status == FAIL and found["training step"].status == SKIPPED
    (tmp_path / "file").write_text("")
    found = findings(Options(node_config(tmp_path, **{"cache-dir": str(tmp_path / "file")})))
    assert found["cache-dir"].status == FAIL


def test_sizes_alone_and_nothing_at_all(tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    found = findings(Options(node_config(tmp_path), sub_fm_mb=1e9))
    assert found["memory"].status == found["cache-dir"].status == FAIL
    found = findings(Options(node_config(tmp_path), sub_fm_mb=1, labels="animal,number"))
    assert found["memory"].status == PASS and found["training step"].status == SKIPPED
    assert found["labels"].status == FAIL and "'place'" in found["labels"].text
    found = findings(Options(node_config(tmp_path)))
    assert [n for n, f in found.items() if f.status == PASS] == ["node config", "data", "cache-dir"]
    assert not [f for f in found.values() if f.status == FAIL]


def test_the_sub_fm_in_the_store_tells_labels_and_speed(tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    fm = tiny.model("bert")
    plan = tiny.plan_for(fm, keep_share=0.5)
    spec = adapters.make_spec(
        family_of("bert"), plan, (), config.LoraConfig(rank=2, alpha=4.0, dropout=0.1)
    )
    package = make_package(
        build(fm, plan), plan, spec, tiny.tokenizer("bert"), "text", tiny.LABELS, 16
    )
    Store(tmp_path / "cache" / "store").put(package.digest(), package)
    found = findings(Options(node_config(tmp_path)))
    assert found["labels"].status == PASS
    assert "the sub-FM in the store, own rows" in found["training step"].text, found
    assert found["memory"].status == PASS
    for text in ("text,label\na,ghost\n", "text\na\n"):
        (tmp_path / "rows.csv").write_text(text)
        found = findings(Options(node_config(tmp_path)))
        assert found["training step"].status == SKIPPED, found
        assert FAIL in (found["labels"].status, found["data"].status)


def test_images(tmp_path: Path) -> None:
    flat = {"model.name": str(tiny.folder("vit", tmp_path / "fm")), "data.image-column": "image"}
    path = tmp_path / "plan.json"
    path.write_text(plansize.describe(config.from_flat(flat)).to_json())
    tiny.write_images(tmp_path / "rows.parquet", "vit", 12, 0)
    text = node_config(
        tmp_path, **{"image-column": "image", "data-path": str(tmp_path / "rows.parquet")}
    )
    found = findings(Options(text, plan=path))
    assert found["training step"].status == PASS, found
    assert found["data"].status == PASS and found["labels"].status == SKIPPED


def test_plans_that_are_none(plan: Path, tmp_path: Path) -> None:
    good = json.loads(plan.read_text())
    cases = {
        "is not JSON": "{",
        "was not made by": "[]",
        "was not made": json.dumps(good | {"format": "x"}),
        "another version": json.dumps({k: v for k, v in good.items() if k != "threads"}),
        "by another version": json.dumps(good | {"threads": "1"}),
    }
    for words, text in cases.items():
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(UserError, match=words):
            plansize.read(tmp_path / "plan.json")
    with pytest.raises(UserError, match="cannot be read"):
        plansize.read(tmp_path / "missing.json")
    (tmp_path / "plan.json").write_text(json.dumps(good | {"meta": {}}))
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    found = findings(Options(node_config(tmp_path), plan=tmp_path / "plan.json"))
    assert found["plan"].status == FAIL and "another version" in found["plan"].text
    odd = good["meta"] | {"architecture": "x", "plan": good["meta"]["plan"] | {"blocks": []}}
    (tmp_path / "plan.json").write_text(json.dumps(good | {"meta": odd}))
    found = findings(Options(node_config(tmp_path), plan=tmp_path / "plan.json"))
    step = found["training step"]
    assert step.status == FAIL and "makes no model" in step.text


def test_node_configs_as_flower_reads_them(tmp_path: Path) -> None:
    text = "name=\"a b\" max-threads=2 validation-share=0.5 data-path='/x y'"
    assert parse(text) == {
        "name": "a b", "max-threads": 2, "validation-share": 0.5, "data-path": "/x y",
    }  # fmt: skip
    from flwr.common.config import parse_config_args

    assert parse(text) == parse_config_args([text])
    for bad, words in (
        ("name=a", "texts are quoted"),
        ('name="a" stray', "'stray' is no KEY=VALUE"),
        ('name="a" name="b"', "node config"),
        ("/missing.toml", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            parse(bad)
    (tmp_path / "node.toml").write_text('name = "a"\n')
    assert parse(str(tmp_path / "node.toml")) == {"name": "a"}


def test_key_without_tls_and_bad_address(tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    key = openssh(tmp_path / "key", ec.generate_private_key(ec.SECP384R1()))
    found = findings(Options(node_config(tmp_path), "http://x", insecure=True, key=key))
    assert found["SuperLink"].status == FAIL and found["certificate"].status == SKIPPED
    assert found["node key"].status == FAIL and "TLS only" in found["node key"].text


def test_the_command(
    tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(30))
    args = ["node", "check", "--node-config", node_config(tmp_path), "--plan", str(plan)]
    with server(None) as port:
        args += ["--superlink", f"127.0.0.1:{port}", "--insecure"]
        assert cli.main([*args, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] and {c["status"] for c in told["checks"]} == {PASS, SKIPPED}
    # The server is gone now.
    assert cli.main(args) == 1
    out = capsys.readouterr().out
    assert "refuses connections" in out and "Traceback" not in out
    assert cli.main([*args, "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]
    assert cli.main([*args, "--root-certificates", "x"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert {f.status for f in node_check.check(Options("x"))} == {FAIL, SKIPPED}
