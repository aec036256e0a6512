"""Run the app in simulation, on a SuperLink that is started and ended with the run.

`run_simulation` starts a SuperLink as a child, submits the app, waits, and leaves nothing behind
however it ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from fedpft_console.launch.app import assemble_app, toml
from fedpft_console.launch.flower import Flower, Result, environment, last_error
from fedpft_console.launch.processes import MARKER, Brood, start_guard
from fedpft_console.launch.signals import signals_held
from fedpft_console.launch.superlink import start_superlink
from fedpft_core.config import Scalar
from fedpft_core.errors import RunError
from server_app import SIMULATION

CONNECTION = "fedpft"

# Ray puts sockets of up to 66 characters below its folder, and a socket path holds 107.
_LONGEST_RAY_TMPDIR = 40
# Ordered by who must end for the run to be hopeless: the first starts the second.
_WATCHED = ("flower-superexec", "flwr-simulation")


def cpu_count() -> int:
    """Cores this process may use.

    Returns:
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def federation_config(
    clients: int, at_once: int, threads: int, cores: int, cluster: bool = False
) -> str:
    """Flower's federation options: how many clients there are and how many run at once.

    Every client that runs at once is a worker process with the libraries and a model in memory,
    so no more are started than a round samples, however many cores there are.

    Args:
        clients: clients of the federation, each a node.
        at_once: clients that a round samples.
        threads: threads that a client trains with, at most `cores` of which are counted.
        cores: cores that all clients may use together.
        cluster: whether they run on a Ray cluster that is there already, all of whose cores are
            theirs then.

    Returns:
        Options in the form of `flwr run --federation-config`.
    """
    each = max(1, min(threads, cores))
    total = max(each, min(cores, at_once * each))
    options = (
        f"num-supernodes={clients} client-resources-num-cpus={each} client-resources-num-gpus=0.0"
    )
    # Ray refuses to be told of cores where it is not started here.
    return options if cluster else f"{options} init-args-num-cpus={total}"


def run_simulation(
    run_dir: Path,
    flat: Mapping[str, Scalar],
    *,
    federation: str,
    app: Path | None = None,
    ray: str = "",
    tick: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run the app in simulation on a SuperLink of our own, which has ended on return.

    Args:
        run_dir: absolute run folder; logs and Flower's files go to its `flower` folder.
        flat: the run config by dotted key.
        federation: Flower's federation options, see `federation_config`.
        app: a Flower app folder in place of this package's.
        ray: address of a Ray cluster on which the clients run, with the token that this
            environment has; empty for a Ray of our own.
        tick: called about five times a second while the run is on.
        note: told in words what is being started, for the impatient.

    Returns:
        How the run ended, with the peak memory of its processes.

    Raises:
        RunError: Flower's programs cannot be started, one of them died, or Flower refuses the run.
    """
    folder = run_dir / "flower"
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    ray_tmpdir = "" if ray else _ray_tmpdir()
    # Ray listens on every interface; with a token only what knows it may run code there.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    of_ray = {"RAY_ADDRESS": ray} if ray else token
    extra = {MARKER: mark, "FLWR_HOME": str(home), SIMULATION: "1"} | of_ray
    if ray_tmpdir:
        extra |= {"RAY_TMPDIR": ray_tmpdir}
    env = environment(extra)
    brood = Brood(mark)
    flower = Flower(CONNECTION, env, folder / "run.log")
    result: Result | None = None
    watch = start_guard(mark, ray_tmpdir)
    try:
        note("starting Flower")
        process, port = start_superlink(env, folder / "superlink.log", folder, tick)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        bundle = app or assemble_app(folder / "app")
        run_config = folder / "run-config.toml"
        run_config.write_text(toml(flat), encoding="utf-8")
        note("submitting the run")
        flower.submit(bundle, run_config, federation)
        result = _wait(flower, brood, process, tick)
        return result
    finally:
        with signals_held():
            flower.end()
            left = brood.end()
            if ray_tmpdir:
                if result is None or not result.completed:
                    _keep_ray_logs(Path(ray_tmpdir), folder / "ray-logs")
                shutil.rmtree(ray_tmpdir, ignore_errors=True)
            shutil.rmtree(home, ignore_errors=True)
            assert watch.stdin is not None
            watch.stdin.close()
            try:
                watch.wait(timeout=30)
            except subprocess.TimeoutExpired:
                watch.kill()
            if left:
                pids = ", ".join(str(p.pid) for p in left)
                print(f"fedpft: warning: could not end processes {pids}", file=sys.stderr)


def _ray_tmpdir() -> str:
    """A folder of our own for Ray, short enough for its sockets; empty = Ray's default."""
    for base in (tempfile.gettempdir(), "/tmp"):
        if len(base) + len("/fedpft-12345678") <= _LONGEST_RAY_TMPDIR:
            with contextlib.suppress(OSError):
                return tempfile.mkdtemp(prefix="fedpft-", dir=base)
    return ""


def _keep_ray_logs(source: Path, target: Path) -> None:
    for logs in source.glob("ray/session_2*/logs"):
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(logs, target, dirs_exist_ok=True, symlinks=True)
            for path in (target, *target.rglob("*")):
                if not path.is_symlink():
                    path.chmod(0o700 if path.is_dir() else 0o600)  # Ray lets everybody write


def _wait(
    flower: Flower, brood: Brood, superlink: subprocess.Popen[bytes], tick: Callable[[], None]
) -> Result:
    """Wait until the run is over, or until a process it cannot do without has died."""
    seen: set[str] = set()
    peak = 0
    gone_since: float | None = None
    next_scan = 0.0
    while flower.streaming():
        tick()
        time.sleep(0.2)
        if superlink.poll() is not None:
            raise RunError(f"the SuperLink ended with status {superlink.returncode} during the run")
        if time.monotonic() < next_scan:
            continue
        next_scan = time.monotonic() + 2.0
        brood.scan()
        peak = max(peak, brood.memory())
        now = brood.names().intersection(_WATCHED)
        seen |= now
        # Flower notices a dead process only when its heartbeat has been missing for a minute.
        if seen <= now:
            gone_since = None
        elif gone_since is None:
            gone_since = time.monotonic()
        elif time.monotonic() - gone_since > 5.0:
            lost = sorted(seen - now)[0]
            raise RunError(f"the process {lost} ended without a word (killed, or out of memory?)")
    tick()
    run_id = flower.run_id()
    if not run_id:
        raise RunError(f"Flower refused the run: {last_error(flower.text())} (log: {flower.log})")
    deadline = time.monotonic() + 20.0
    status, details = flower.status(run_id)
    while not status.startswith("finished") and time.monotonic() < deadline:
        tick()
        time.sleep(0.5)
        status, details = flower.status(run_id)
    return Result(status or "unknown", details, run_id, flower.log, peak)
