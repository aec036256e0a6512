"""What every test shares: its environment, and the list of skips that are allowed."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

# Helpers are found by their names; so are test modules, by the processes that tests start.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
# Tiny models run fastest on one thread, and two would fight with the processes tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ledgers of what has left, and other things that a run keeps in the user's home.
os.environ.setdefault("FEDPFT_HOME", tempfile.mkdtemp(prefix="fedpft-home-"))
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

_ALLOWED = [
    line
    for line in (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
_UNEXPECTED: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Hold every skip against the list of those that are allowed."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        text = f"{report.nodeid}: {reason}"
        if not any(re.search(pattern, text) for pattern in _ALLOWED):
            _UNEXPECTED.append(text)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _UNEXPECTED:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for text in _UNEXPECTED:
        terminalreporter.write_line(f"SKIPPED BUT NOT IN tests/allowed_skips.txt: {text}", red=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs take longer than the limit that the other tests have."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))
