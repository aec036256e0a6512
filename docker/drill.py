"""Break the demo federation on purpose and write down how its runs end.

    docker/demo up && python3 docker/drill.py [FAULT ...] [--times N]

Needs Python 3.11 and nothing else. For each fault: a run of four rounds is started, the fault
comes while round 2 is out at the clients, and the run is waited for; a run that failed is resumed
once the machine is whole again. One JSON line a trial goes to docker/results/drill.jsonl; the
table of all trials is printed at the end (`--table`: only that).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROUNDS = 4
PATIENCE = 1500.0  # seconds for a run to end
SERVICES = (
    "superlink", "server", "supernode-a", "supernode-b", "supernode-c",
    "client-a", "client-b", "client-c",
)  # fmt: skip


class Trouble(Exception):
    """The drill itself cannot go on."""


def demo(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        [str(HERE / "demo"), *arguments], capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise Trouble(f"demo {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Trouble(f"docker {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


def container(service: str) -> str:
    found = demo("compose", "ps", "-q", service).split()
    if not found:
        raise Trouble(f"{service} has no container; docker/demo up first")
    return found[0]


class Run:
    """One `docker/demo run` and what it has written so far."""

    def __init__(self, folder: str, *options: str) -> None:
        self.folder = RESULTS / folder
        self.log = RESULTS / f"{folder}.log"
        self.start = time.monotonic()
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                [str(HERE / "demo"), "run", *options], stdout=out, stderr=subprocess.STDOUT
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [e for e in found if e["event"] == name]

    def wait_for_round(self, round: int) -> None:
        while not any(e["round"] == round for e in self.events("round_started")):
            if self.process.poll() is not None:
                raise Trouble(f"the run ended before round {round}: {self.last_words()}")
            if time.monotonic() - self.start > PATIENCE:
                self.process.terminate()
                raise Trouble(f"round {round} did not start within {PATIENCE:.0f} s")
            time.sleep(0.5)

    def wait(self) -> int:
        """The exit status, 124 for a run that never ends."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(60)
            return 124

    def last_words(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        found = [line for line in text.splitlines() if line.startswith("fedpft: error:")]
        return found[-1].removeprefix("fedpft: error:").strip() if found else ""

    def outcome(self) -> dict[str, Any]:
        """Rounds finished, attempts, and replies by status, from the event log."""
        replies = Counter(
            f"{e['client']} {e['status']}" for e in self.events("reply") if e["status"] != "ok"
        )
        return {
            "rounds": max((e["round"] for e in self.events("round_finished")), default=0),
            "repeated": sum(e["attempt"] > 1 for e in self.events("round_started")),
            "round seconds": [round(e["seconds"]) for e in self.events("round_finished")],
            "not ok": dict(replies),
        }


# ---------------------------------------------------------------- faults


def kill_container(service: str) -> Callable[[], None]:
    """SIGKILL to the container; gone until the drill starts it again after the run."""

    def inject() -> None:
        docker("kill", container(service))

    return inject


def crash(service: str) -> Callable[[], None]:
    """SIGKILL to its processes, so that Docker's restart policy brings it back."""

    def inject() -> None:
        name = container(service)
        before = int(docker("inspect", "--format", "{{.RestartCount}}", name))
        # Process 1 itself is out of reach from within; it ends with the processes it looks after.
        subprocess.run(
            ["docker", "exec", name, "python", "-c", "import os; os.kill(-1, 9)"],
            capture_output=True, check=False,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while int(docker("inspect", "--format", "{{.RestartCount}}", name)) == before:
            if time.monotonic() > deadline:
                raise Trouble(f"{service} did not come back by itself")
            time.sleep(0.5)

    return inject


def outage(service: str, seconds: float) -> Callable[[], None]:
    """Stopped, and started again by the operator after some seconds."""

    def inject() -> None:
        name = container(service)
        docker("kill", name)
        time.sleep(seconds)
        docker("start", name)

    return inject


def fill(service: str) -> Callable[[], None]:
    """Write to the client's volume until there is no byte left."""

    def inject() -> None:
        code = (
            "import contextlib\n"
            "with contextlib.suppress(OSError), open('/store/filler', 'wb', 0) as f:\n"
            "    while True: f.write(bytes(1 << 16))\n"
            "import shutil; print(shutil.disk_usage('/store').free)"
        )
        left = docker("exec", container(service), "python", "-c", code)
        if int(left) > 1 << 16:
            raise Trouble(f"{service}: {left} bytes are still free")

    return inject


def small_store(on: bool) -> None:
    """Give clinic-b a volume that can be filled, or its usual one back; both start empty."""
    if on:
        os.environ["FEDPFT_COMPOSE"] = "drill.yaml"  # docker/demo passes it on to compose
    else:
        os.environ.pop("FEDPFT_COMPOSE", None)
    demo("compose", "rm", "-sf", "client-b")
    names = docker("volume", "ls", "-q", "--filter", "label=com.docker.compose.volume=store-b")
    project = docker("inspect", "--format", '{{index .Config.Labels "com.docker.compose.project"}}',
                     container("superlink"))  # fmt: skip
    for name in names.split():
        if name.startswith(f"{project}_"):
            docker("volume", "rm", name)
    demo("compose", "up", "-d", "--no-build", "--no-deps", "client-b")


FAULTS: dict[str, tuple[str, Callable[[], None]]] = {
    "supernode-killed": ("`docker kill supernode-b`, left dead", kill_container("supernode-b")),
    "supernode-restarted": (
        "`docker kill supernode-b`, started again 10 s later",
        outage("supernode-b", 10),
    ),
    "supernode-crashed": (
        "SIGKILL to all processes of supernode-b, Docker restarts it",
        crash("supernode-b"),
    ),
    "client-killed": ("`docker kill client-b`, left dead", kill_container("client-b")),
    "client-crashed": (
        "SIGKILL to all processes of client-b, Docker restarts it",
        crash("client-b"),
    ),
    "superlink-30s": ("`docker kill superlink`, started again 30 s later", outage("superlink", 30)),
    "server-crashed": (
        "SIGKILL to all processes of server, Docker restarts it",
        crash("server"),
    ),
    "disk-full": ("clinic-b's volume (tmpfs, 160 MB) filled to the last byte", fill("client-b")),
}


def heal() -> None:
    """Everything started and healthy, as before the fault."""
    demo("compose", "up", "-d", "--no-build", "--no-recreate", *SERVICES)
    demo("wait", "240", *SERVICES)


def trial(fault: str) -> dict[str, Any]:
    how, inject = FAULTS[fault]
    heal()
    if fault == "disk-full":
        small_store(True)
        demo("wait", "240", "client-b")
    name = f"drill-{fault}-{time.strftime('%H%M%S')}"
    record: dict[str, Any] = {"fault": fault, "how": how, "folder": name}
    try:
        run = Run(name, "--run-dir", f"/results/{name}", "-c", f"federation.rounds={ROUNDS}")
        run.wait_for_round(2)
        time.sleep(5)
        inject()
        status = run.wait()
        record |= {"status": status, "seconds": round(time.monotonic() - run.start)}
        record |= run.outcome()
        if status:
            record["reason"] = run.last_words()
            heal()
            again = Run(name, "--resume", f"/results/{name}")
            record["resumed"] = again.wait()
            record["rounds"] = again.outcome()["rounds"]
            record["resume seconds"] = round(time.monotonic() - again.start)
            if record["resumed"]:
                record["resume reason"] = again.last_words()
    finally:
        if fault == "disk-full":
            small_store(False)
        heal()
    record["lost"] = record["rounds"] < ROUNDS
    return record


# ---------------------------------------------------------------- table


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| fault in round 2 | how | tried | finished | resumed to the end | lost |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for fault, (how, _) in FAULTS.items():
        mine = [r for r in records if r["fault"] == fault]
        if mine:
            done = sum(r["status"] == 0 for r in mine)
            resumed = sum(r["status"] != 0 and r.get("resumed") == 0 for r in mine)
            lost = sum(r["lost"] for r in mine)
            lines.append(f"| {fault} | {how} | {len(mine)} | {done} | {resumed} | {lost} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("fault", nargs="*", choices=[[], *FAULTS], help="default: all")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    args = parser.parse_args()
    path = RESULTS / "drill.jsonl"
    bad = 0
    try:
        for _ in range(0 if args.table else args.times):
            for fault in args.fault or FAULTS:
                print(f"drill: {fault}: {FAULTS[fault][0]}", flush=True)
                record = trial(fault)
                bad += record["lost"]
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"drill: {json.dumps(record)}", flush=True)
    except Trouble as error:
        print(f"drill: error: {error}", file=sys.stderr)
        return 2
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    print(table([json.loads(line) for line in lines]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
