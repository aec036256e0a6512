"""Real Flower processes on loopback for tests: a SuperLink, SuperNodes, and what they need.

Everything is started by and ended with the fixture-like context manager `deployment`. With TLS
the SuperLink also asks its nodes for keys that were registered before.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client_app.node import client_for
from client_app.process import ProcessCache
from fedpft_core import config as configs
from fedpft_core.wire.envelope import Envelope
from server_app.app import run as server_run
from server_app.run.events import EventLog
from server_app.transport import LocalTransport

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(home: Path, **more: str) -> dict[str, str]:
    """A clean environment: own FLWR_HOME, no dependency installation, no network chatter."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FEDPFT_HOME": str(home / "fedpft"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **more,
    }


# ---------------------------------------------------------------- certificates and keys


def _key(
    path: Path, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8
) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP384R1())
    none = serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
    return key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificates(folder: Path, days: int = 1) -> Path:
    """`ca.pem`, `server.pem` and `server.key` for 127.0.0.1; negative days = expired."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    start, day = now - datetime.timedelta(days=30), datetime.timedelta(days=1)

    def sign(subject: str, public: ec.EllipticCurvePublicKey, end: datetime.datetime, ca: bool):
        builder = (
            x509.CertificateBuilder().subject_name(_name(subject)).issuer_name(_name("test CA"))
            .public_key(public).serial_number(x509.random_serial_number())
            .not_valid_before(start).not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(public), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
        )  # fmt: skip
        if ca:
            no = dict.fromkeys(
                ("digital_signature", "content_commitment", "key_encipherment", "encipher_only",
                 "data_encipherment", "key_agreement", "decipher_only"), False,
            )  # fmt: skip
            usage = x509.KeyUsage(key_cert_sign=True, crl_sign=True, **no)
            builder = builder.add_extension(usage, critical=True)
        else:
            here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            names = x509.SubjectAlternativeName([x509.DNSName("localhost"), here])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(ca_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)

    ca_key, server_key = _key(folder / "ca.key"), _key(folder / "server.key")
    (folder / "ca.pem").write_bytes(sign("test CA", ca_key.public_key(), now + 30 * day, True))
    (folder / "server.pem").write_bytes(
        sign("127.0.0.1", server_key.public_key(), now + days * day, False)
    )
    return folder


def node_key(path: Path) -> Path:
    """A node's private key at `path` and its public half at `path`.pub."""
    public = _key(path, serialization.PrivateFormat.OpenSSH).public_key()
    path.with_suffix(".pub").write_bytes(
        public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    return path


# ---------------------------------------------------------------- processes


def _limit(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


@dataclass
class Deployment:
    """A running SuperLink and its SuperNodes; with `tls`, a folder made by `certificates`."""

    folder: Path
    port: int
    tls: Path | None = None
    superlink: subprocess.Popen[bytes] | None = None
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ceilings: dict[str, int] = field(default_factory=dict)  # bytes of memory, as `ulimit -v`

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115  # the child keeps it
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment(self.folder / "flwr"),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(_limit, self.ceilings[name]) if name in self.ceilings else None,
        )
        log.close()
        self.processes.append(process)
        return process

    def start_superlink(self) -> None:
        """Start it, or start it again on the same port and database."""
        how = ["--insecure"]
        if self.tls:
            how = [
                "--ssl-ca-certfile", str(self.tls / "ca.pem"), "--ssl-certfile",
                str(self.tls / "server.pem"), "--ssl-keyfile", str(self.tls / "server.key"),
                "--enable-supernode-auth",
            ]  # fmt: skip
        self.superlink = self.start(
            "superlink", "flower-superlink", *how, "--host", "127.0.0.1",
            "--port", str(self.port), "--database", str(self.folder / "state.db"),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        _wait_until_up(self.port)

    def start_node(
        self, name: str, data: Path, *more: str, ca: Path | None = None, **config: str | int
    ) -> subprocess.Popen[bytes]:
        """One SuperNode with its own data file; `ca` in place of the deployment's."""
        pairs: Mapping[str, str | int] = {"name": name, "data-path": str(data), **config}
        text = " ".join(
            f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in pairs.items()
        )
        root = ca or (self.tls / "ca.pem" if self.tls else None)
        how = ["--root-certificates", str(root)] if root else ["--insecure"]
        self.nodes[name] = self.start(
            name, "flower-supernode", *how, *more, "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", str(free_port()), "--node-config", text,
        )  # fmt: skip
        return self.nodes[name]

    def run(self, run_dir: Path, config: Path, *more: str) -> subprocess.Popen[bytes]:
        """Start `fedpft run` against this SuperLink."""
        return self.start(
            "cli", "fedpft", "run", "--superlink", "test", "--config", str(config),
            "--run-dir", str(run_dir), *more,
        )  # fmt: skip

    def resume(self, run_dir: Path) -> subprocess.Popen[bytes]:
        return self.start("cli", "fedpft", "run", "--superlink", "test", "--resume", str(run_dir))

    def flwr(self, *arguments: str) -> str:
        """What a `flwr` command prints."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments], env=environment(self.folder / "flwr"),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def last_run(self) -> dict[str, object]:
        """What Flower says of the newest run."""
        runs = json.loads(self.flwr("list", "test", "--format", "json"))["runs"]
        return max(runs, key=lambda run: run["pending-at"])

    def client_process(self, name: str, since: float, seconds: float = 60) -> psutil.Process:
        """The process node `name` answers a message with, begun after the time `since`."""
        return self._find(self.nodes[name], "flwr-clientapp", since, seconds)

    def worker_process(self, name: str) -> psutil.Process:
        """The process that stays between the messages of node `name`."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "client_app.warm.worker" in words and str(self.folder / f"cache-{name}") in words:
                return process
        raise AssertionError(f"{name} has no worker")

    def server_process(self) -> psutil.Process:
        """The ServerApp of the run that is on."""
        assert self.superlink is not None
        return self._find(self.superlink, "flwr-serverapp", 0.0, 60)

    def crash_server(self) -> None:
        """What a power cut does to the server's machine: SuperLink and ServerApp at once."""
        assert self.superlink is not None
        caused = psutil.Process(self.superlink.pid).children(recursive=True)
        kill(self.superlink)
        for process in caused:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.superlink.wait(10)

    @staticmethod
    def _find(
        parent: subprocess.Popen[bytes], program: str, since: float, seconds: float
    ) -> psutil.Process:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for process in psutil.Process(parent.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = [Path(word).name for word in process.cmdline()[:3]]
                    # The start of a process is known to a second; a message takes longer.
                    if program in words and process.create_time() > since - 2.0:
                        return process
            time.sleep(0.1)
        raise AssertionError(f"no {program} within {seconds:g} s")

    def stop_node(self, name: str) -> None:
        """Let a node leave in order."""
        process = self.nodes.pop(name)
        kill(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        kill(process)

    def logs(self) -> str:
        return "\n".join(
            f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}"
            for p in sorted(self.folder.glob("*.log"))
        )


def kill(process: subprocess.Popen[bytes], how: int = signal.SIGKILL) -> None:
    """Signal a process we started and everything in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


@contextlib.contextmanager
def deployment(folder: Path, tls: Path | None = None) -> Iterator[Deployment]:
    """A SuperLink on a free port; everything started through it ends with the block."""
    (folder / "flwr").mkdir(parents=True, exist_ok=True)
    d = Deployment(folder, free_port(), tls)
    how = f'root-certificates = "{tls / "ca.pem"}"' if tls else "insecure = true"
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{d.port}"\n{how}\n'
    )
    try:
        d.start_superlink()
        yield d
    finally:
        for process in reversed(d.processes):
            kill(process, signal.SIGTERM)
        deadline = time.monotonic() + 10
        for process in d.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            kill(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        for left in processes_of(folder / "flwr"):
            with contextlib.suppress(psutil.Error):
                left.kill()


def processes_of(home: Path) -> list[psutil.Process]:
    """Flower starts some processes in sessions of their own; they carry our FLWR_HOME."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
    return found


def _wait_until_up(port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"the SuperLink did not open port {port} within {seconds:g} s")


def events(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]


def wait_for(
    run_dir: Path,
    event: str,
    seconds: float,
    alive: subprocess.Popen[bytes] | None = None,
    **fields: object,
) -> dict[str, object]:
    """The first matching event; fails the test when it does not come in time, or when the
    process `alive`, which should bring it about, has ended without it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended = alive is not None and alive.poll() is not None
        for e in events(run_dir):
            if e["event"] == event and all(e.get(k) == v for k, v in fields.items()):
                return e
        assert not ended, f"no {event} {fields}: the run has ended"
        time.sleep(0.1)
    raise AssertionError(f"no {event} {fields} within {seconds:g} s")


def in_process(
    conf: Path, rows: Mapping[str, Path], folder: Path, nodes: Mapping[str, Mapping[str, str]] = {}
) -> None:
    """The run of a configuration without Flower's processes, in `folder`: the bits it is to have.

    `rows` are the nodes' data files by name, `nodes` what else their node configs say.
    """
    flat = configs.to_flat(configs.from_flat(configs.read_file(conf)))

    def answer(name: str, cache: ProcessCache, envelope: Envelope) -> Envelope:
        own = {"name": name, "data-path": str(rows[name]), "cache-dir": str(folder / name)}
        client = client_for({**own, **nodes.get(name, {})}, flat)
        client.cache = cache
        return client.handle(envelope)

    clients = {i + 1: partial(answer, name, ProcessCache()) for i, name in enumerate(sorted(rows))}
    log = EventLog(folder / "events.jsonl")
    server_run(configs.from_flat(flat | {"run.dir": str(folder)}), LocalTransport(clients), log)
    log.close()


def write_config(path: Path, tree: Mapping[str, object]) -> Path:
    path.write_text(yaml.safe_dump(dict(tree)), encoding="utf-8")
    return path


def job(folder: Path, **federation: Any) -> dict[str, Any]:
    """A tiny FM, data and settings on disk, as a config tree."""
    tiny.folder("bert", folder / "fm")
    tiny.write_csv(folder / "train.csv", tiny.sentences(120, 0))
    tiny.write_csv(folder / "test.csv", tiny.sentences(30, 1))
    (folder / "public.txt").write_text("\n".join(t for t, _ in tiny.sentences(100, 2)))
    return {
        "model": {"name": str(folder / "fm")},
        "data": {
            "train": str(folder / "train.csv"),
            "test": str(folder / "test.csv"),
            "public": str(folder / "public.txt"),
            "max-length": 16,
        },
        "distill": {"steps": 4, "length": 16, "batch-size": 4},
        "align": {"interval": 1, "steps": 2, "proportion": 0.5},
        "lora": {"rank": 2},
        "train": {"lr": 5e-3},
        "federation": {"rounds": 3, "clients": 3, "clients-per-round": 2} | federation,
        "run": {"undistilled": False},
    }
