"""The processes of a run are found and ended, and no others."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from fedpft_console.launch import processes


def test_processes_of_others_are_never_taken_for_ours() -> None:
    ours = {processes.MARKER: "mark-a"}
    other = {processes.MARKER: "mark-b"}
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    # The parent of the orphan ends at once, so only the marker can find it.
    orphan = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=-3).pid)"
    made = subprocess.run(
        [sys.executable, "-c", orphan, *sleep], env=os.environ | ours,
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    orphaned = psutil.Process(int(made.stdout))
    child = subprocess.Popen(sleep, env=os.environ | ours)
    started = psutil.Process(child.pid)
    foreign = subprocess.Popen(sleep, env=os.environ | other)
    try:
        brood = processes.Brood("mark-a")
        assert {p.pid for p in brood.scan()} == {orphaned.pid, child.pid}
        assert brood.end() == []
        assert not processes.alive(orphaned) and not processes.alive(started)
        assert foreign.poll() is None
    finally:
        for process in (child, foreign):
            process.kill()
            process.wait()


def test_a_process_that_ignores_the_request_is_forced() -> None:
    code = """if True:
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {processes.MARKER: "stubborn"},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    started = psutil.Process(child.pid)
    assert processes.Brood("stubborn").end(patience=0.5) == []
    assert not processes.alive(started)
