"""Threads that wait for each other do not spin for long, however the program is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOW = "import os, sys; import {}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize("package", ["server_app", "client_app", "fedpft_console"])
def test_the_limit_is_set_before_torch_is_loaded(package: str) -> None:
    code = SHOW.format(package)
    clean = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    for given, want in ((None, "10000"), ("7", "7")):
        env = clean | ({"GOMP_SPINCOUNT": given} if given else {})
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
        )
        assert done.stdout.split() == [want, "False"]
