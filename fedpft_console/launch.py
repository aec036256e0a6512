"""Run the Flower app: on a SuperLink of our own for simulation, or on one the user names.

`run_simulation` starts a SuperLink as a child, submits the app, waits, and leaves nothing behind
however it ends. Flower and Ray start daemons that outlive their parents, so every process we
cause carries a marker in its environment and is also remembered while it is still in our tree;
the end of a run is the end of all of them. A small guard process does the same when this process
itself is killed.

Only Flower's command line is used: `flwr run --stream` submits, copies the log and returns when
the run is over, and `flwr list` tells how it ended (the former exits 0 on failure too).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from fedpft_core.config import Scalar, keys
from fedpft_core.errors import RunError

MARKER = "FEDPFT_RUN"
PACKAGES = ("fedpft_core", "server_app", "client_app")
CONNECTION = "fedpft"
COMPLETED = "finished:completed"

# Ray puts sockets of up to 66 characters below its folder, and a socket path holds 107.
_LONGEST_RAY_TMPDIR = 40
_START_SECONDS = 60.0
_CLI_SECONDS = 30.0
_SILENT_SECONDS = 120.0  # how long a SuperLink that is not ours may be away before we give up
# Ordered by who must end for the run to be hopeless: the first starts the second.
_WATCHED = ("flower-superexec", "flwr-simulation")


@dataclass(frozen=True)
class Result:
    """How Flower says a run ended.

    `peak_bytes` is the largest sum of resident memory over all processes of the run, looked at
    every two seconds; memory that processes share is counted in each. 0 = not ours to measure.
    """

    status: str
    details: str
    run_id: str
    log: Path
    peak_bytes: int = 0

    @property
    def completed(self) -> bool:
        return self.status == COMPLETED


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; a BaseException so that no `except Exception` swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


# ---------------------------------------------------------------- processes


class Brood:
    """The processes a run has caused, found by tree and by marker, and remembered.

    Remembering matters because Ray's workers overwrite their environment with a process title
    and are re-parented when the raylet dies. A remembered process is its pid *and* start time,
    so a recycled pid is never taken for it.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._known: set[psutil.Process] = set()
        self._foreign: set[psutil.Process] = set()

    def scan(self) -> list[psutil.Process]:
        """All living processes of the run."""
        me = os.getpid()
        parents: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                parents.setdefault(process.ppid(), []).append(process)
                if process.pid != me and process not in self._known | self._foreign:
                    self._sort(process)
        self._known = {p for p in self._known if _alive(p)}
        self._foreign = {p for p in self._foreign if p.is_running()}
        queue = list(self._known)
        while queue:
            for child in parents.get(queue.pop().pid, ()):
                if child not in self._known and child.pid != me and _alive(child):
                    self._known.add(child)
                    queue.append(child)
        return list(self._known)

    def _sort(self, process: psutil.Process) -> None:
        try:
            ours = process.environ().get(MARKER) == self.mark
        except (psutil.Error, OSError):
            return  # another user's, or gone: looked at again, should it become readable
        (self._known if ours else self._foreign).add(process)

    def names(self) -> set[str]:
        """Program names seen among the living, such as `flwr-simulation`."""
        found: set[str] = set()
        for process in self._known:
            with contextlib.suppress(psutil.Error):
                found |= {Path(word).name for word in process.cmdline()[:3]}
        return found

    def memory(self) -> int:
        """Resident memory of the living, bytes."""
        total = 0
        for process in self._known:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def end(self, patience: float = 5.0) -> list[psutil.Process]:
        """End them all: asked first, forced after `patience` seconds. Returns survivors."""
        asked: set[psutil.Process] = set()
        start = time.monotonic()
        while living := self.scan():
            waited = time.monotonic() - start
            if waited > patience + 10.0:
                return living
            for process in living:
                with contextlib.suppress(psutil.Error):
                    if waited > patience:
                        process.kill()
                    elif process not in asked:
                        process.terminate()
            asked.update(living)
            psutil.wait_procs(living, timeout=0.2)
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def guard(mark: str, ray_tmpdir: str) -> None:
    """Wait for the end of standard input, then end what is left of the run.

    The other end of the pipe is held by the process that started the run; it closes however
    that process ends, SIGKILL included.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    sys.stdin.buffer.read()
    Brood(mark).end()
    if ray_tmpdir:
        shutil.rmtree(ray_tmpdir, ignore_errors=True)


def _start_guard(mark: str, ray_tmpdir: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parent.parent)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from fedpft_console.launch import guard; guard(*sys.argv[2:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, root, mark, ray_tmpdir],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise Terminated, while inside.

    SIGINT is taken even where a shell has set it to be ignored (a script's background job):
    otherwise the job would outlive the script that was interrupted.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(signum)

    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
        wanted.append(signal.SIGHUP)
    before = {s: signal.signal(s, stop) for s in wanted}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """No signal interrupts the clean-up inside, which is bounded in time."""
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        before = {s: signal.signal(s, signal.SIG_IGN) for s in wanted}
    except ValueError:  # not the main thread: no handler of ours is installed either
        before = {}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------- the app folder


def assemble_app(folder: Path) -> Path:
    """Write the Flower app into `folder`: pyproject.toml and the Python files of the packages.

    Works from a checkout and from an installed wheel alike, never bundles anything else that
    lies around in a checkout, and leaves in the run folder the code that ran.
    """
    root = Path(__file__).resolve().parent.parent
    missing = [p for p in PACKAGES if not (root / p / "__init__.py").is_file()
               and not (root / p).is_dir()]  # fmt: skip
    if missing:
        raise RunError(f"{root}: package {missing[0]} is missing; install fedpft again.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for package in PACKAGES:
        for source in sorted((root / package).rglob("*.py")):
            target = folder / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    own = root / "pyproject.toml"
    if own.is_file() and "[tool.flwr.app.components]" in own.read_text(encoding="utf-8"):
        shutil.copyfile(own, folder / "pyproject.toml")
    else:
        (folder / "pyproject.toml").write_text(_pyproject(), encoding="utf-8")
    return folder


def _pyproject() -> str:
    """The app's pyproject.toml, from the metadata of the installed distribution."""
    from importlib import metadata

    from fedpft_core import __version__

    try:
        requires = [r for r in metadata.requires("fedpft") or [] if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        requires = []
    include = ", ".join(f'"{p}/**/*.py"' for p in PACKAGES)
    return (
        "[project]\n"
        'name = "fedpft"\n'
        f'version = "{__version__}"\n'
        'description = "Federated fine-tuning through a compressed proxy"\n'
        'license = "Apache-2.0"\n'
        f"dependencies = {json.dumps(requires)}\n\n"
        "[tool.flwr.app]\n"
        'publisher = "fedpft"\n'
        f"fab-include = [{include}]\n\n"
        "[tool.flwr.app.components]\n"
        'serverapp = "server_app.app:app"\n'
        'clientapp = "client_app.app:app"\n\n'
        "[tool.flwr.app.config]\n" + toml({k: info.default for k, info in keys().items()})
    )


def toml(flat: Mapping[str, Scalar]) -> str:
    """Dotted keys as TOML lines, the form Flower takes as run config."""
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in flat.items())


def toml_value(value: Scalar) -> str:
    """One scalar in TOML; JSON's text escapes are valid TOML once DEL is escaped too."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


# ---------------------------------------------------------------- Flower's commands


def _command(name: str) -> str:
    """Flower's program beside this interpreter, so that an inactive environment works too."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.is_file() else shutil.which(name)
    if found is None:
        raise RunError(
            f"{name} is not installed beside {sys.executable}; install flwr[simulation]."
        )
    return found


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    env = dict(os.environ)
    # A cluster the user works with must not be joined; ours is started and ended with the run.
    env.pop("RAY_ADDRESS", None)
    local = "127.0.0.1,localhost"
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = f"{env[name]},{local}" if env.get(name) else local
    return env | {
        # SuperLink, SuperExec and Flower start one another by bare name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


class Flower:
    """Flower's command line against one SuperLink connection."""

    def __init__(self, connection: str, env: dict[str, str], log: Path) -> None:
        self.connection, self.env, self.log = connection, env, log
        self._stream: subprocess.Popen[bytes] | None = None
        self._offset = 0

    def submit(self, app: Path, run_config: Path, federation: str = "") -> None:
        """Start `flwr run --stream`, whose output becomes the run's log."""
        command = [_command("flwr"), "run", str(app), self.connection, "--stream"]
        command += ["--run-config", str(run_config)]
        if federation:
            command += ["--federation-config", federation]
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as out:
            self._stream = self._popen(command, out)

    def streaming(self) -> bool:
        """Whether the submitting command still follows the run."""
        return self._stream is not None and self._stream.poll() is None

    def text(self) -> str:
        """What this submission has written to the log so far, colours removed."""
        with open(self.log, "rb") as file:
            file.seek(self._offset)
            return re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode(errors="replace"))

    def run_id(self) -> str:
        """The id of the submitted run, empty while it is unknown."""
        match = re.search(r"Successfully started run (\d+)", self.text())
        return match.group(1) if match else ""

    def status(self, run_id: str) -> tuple[str, str]:
        """(status, details) of a run, both empty when Flower cannot be asked."""
        answer = self._ask("list", self.connection, "--run-id", run_id, "--format", "json")
        try:
            run = json.loads(answer)["runs"][0]
            details = run["status-details"]
            return run["status"], "" if details == "N/A" else details
        except (ValueError, LookupError, TypeError):
            return "", ""

    def stop(self, run_id: str) -> None:
        """Ask Flower to end a run; harmless when it has ended."""
        self._ask("stop", run_id, self.connection)

    def end(self) -> None:
        """End the submitting command."""
        if self._stream is not None and self._stream.poll() is None:
            self._stream.terminate()
            try:
                self._stream.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._stream.kill()
                self._stream.wait()

    def _ask(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [_command("flwr"), *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CLI_SECONDS,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout

    def _popen(self, command: list[str], out: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C at the terminal reaches us alone, and we end the rest
            # in order.
            start_new_session=True,
        )


def last_error(text: str) -> str:
    """The line of a log that best says what went wrong, empty when there is none."""
    # Flower's commands frame their errors in a box and wrap them there.
    box = re.findall(r"╭─ Error ─+╮\n((?:│.*│\n)+)", text)
    if box:
        return " ".join(line.strip("│ ") for line in box[-1].splitlines())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for pattern in (r"^(?:\S*Error|\S*Exception|RunError): ", r"\bError\b|\bERROR\b"):
        for line in reversed(lines):
            if re.search(pattern, line):
                return re.sub(r"^ERROR\s*:\s*", "", line)
    return lines[-1] if lines else ""


# ---------------------------------------------------------------- simulation


def cpu_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def federation_config(clients: int, at_once: int, threads: int, cores: int) -> str:
    """Flower's federation options: how many clients there are and how many run at once.

    Every client that runs at once is a worker process with the libraries and a model in memory,
    so no more are started than a round samples, however many cores there are.
    """
    each = max(1, min(threads, cores))
    total = max(each, min(cores, at_once * each))
    return (
        f"num-supernodes={clients} client-resources-num-cpus={each} "
        f"client-resources-num-gpus=0.0 init-args-num-cpus={total}"
    )


def run_simulation(
    run_dir: Path,
    flat: Mapping[str, Scalar],
    *,
    federation: str,
    app: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run the app in simulation on a SuperLink of our own, which has ended on return.

    Args:
        run_dir: absolute run folder; logs and Flower's files go to its `flower` folder.
        flat: the run config by dotted key.
        federation: Flower's federation options, see `federation_config`.
        app: a Flower app folder in place of this package's.
        tick: called about five times a second while the run is on.
        note: told in words what is being started, for the impatient.

    Raises:
        RunError: Flower's programs cannot be started, or one of them died.
    """
    folder = run_dir / "flower"
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    ray_tmpdir = _ray_tmpdir()
    extra = {MARKER: mark, "FLWR_HOME": str(home)}
    if ray_tmpdir:
        extra |= {"RAY_TMPDIR": ray_tmpdir}
    env = _environment(extra)
    brood = Brood(mark)
    flower = Flower(CONNECTION, env, folder / "run.log")
    result: Result | None = None
    watch = _start_guard(mark, ray_tmpdir)
    try:
        note("starting Flower")
        process, port = _start_superlink(env, folder / "superlink.log", folder, tick)
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
        with _signals_held():
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


def _start_superlink(
    env: dict[str, str], log: Path, cwd: Path, tick: Callable[[], None]
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a SuperLink on a free port and wait until it answers."""
    text = ""
    for _attempt in range(3):  # the port may be taken between choosing and binding it
        port = _free_port()
        command = [
            _command("flower-superlink"), "--insecure", "--simulation",
            "--isolation", "subprocess", "--disable-runtime-dependency-installation",
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        with open(log, "ab") as out:
            process = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if _listens(process.pid, port) and _healthy(port):
                return process, port
            tick()
            time.sleep(0.1)
        if process.poll() is None:
            raise RunError(f"the SuperLink did not answer within {_START_SECONDS:.0f} s; see {log}")
        text = last_error(log.read_text(encoding="utf-8", errors="replace"))
    raise RunError(f"the SuperLink could not be started: {text} (log: {log})")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(pid: int, port: int) -> bool:
    """Whether it is really our process that answers on the port."""
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid).net_connections("tcp")
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found)
    return False


def _healthy(port: int) -> bool:
    with contextlib.suppress(OSError, HTTPException):
        connection = HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        finally:
            connection.close()
    return False


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


# ---------------------------------------------------------------- deployment


def run_deployed(
    connection: str,
    flat: Mapping[str, Scalar],
    folder: Path,
    *,
    app: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Submit the app to a SuperLink named in the user's own Flower configuration and follow it.

    Interrupting this stops the run; the SuperLink and its nodes are not ours and are left alone.

    Raises:
        RunError: Flower refuses the run, or the SuperLink does not answer any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flower = Flower(connection, _environment({}), folder / "run.log")
    run_config = folder / "run-config.toml"
    run_config.write_text(toml(flat), encoding="utf-8")
    over = False
    silent_since: float | None = None
    try:
        note(f"submitting the run to {connection}")
        flower.submit(app or assemble_app(folder / "app"), run_config)
        while True:
            while flower.streaming():
                tick()
                time.sleep(0.2)
            run_id = flower.run_id()
            if not run_id:
                raise RunError(
                    f"Flower refused the run: {last_error(flower.text())} (log: {flower.log})"
                )
            status, details = flower.status(run_id)
            if status.startswith("finished"):
                over = True
                return Result(status, details, run_id, flower.log)
            # The log stream broke off while the run goes on: keep asking, seldom.
            if status:
                silent_since = None
            elif silent_since is None:
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > _SILENT_SECONDS:
                over = True  # it cannot be asked to stop the run either
                raise RunError(
                    f"the SuperLink {connection} has not answered for {_SILENT_SECONDS:.0f} s, "
                    f"so the end of run {run_id} is not known (log: {flower.log})"
                )
            for _ in range(50):
                tick()
                time.sleep(0.2)
    finally:
        with _signals_held():
            run_id = flower.run_id()
            flower.end()
            if run_id and not over:
                flower.stop(run_id)


__all__ = [
    "Brood", "Flower", "Result", "Terminated", "assemble_app", "cpu_count", "federation_config",
    "guard", "last_error", "run_deployed", "run_simulation", "signals_as_exceptions", "toml",
    "toml_value",
]  # fmt: skip
