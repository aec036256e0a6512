"""Threads that wait for each other do not spin, however the program is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOW = "import os, sys; import {}; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"


@pytest.mark.parametrize("package", ["server_app", "client_app", "fedpft_console"])
def test_the_policy_is_set_before_torch_is_loaded(package: str) -> None:
    code = SHOW.format(package)
    clean = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    for given, want in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        env = clean | ({"OMP_WAIT_POLICY": given} if given else {})
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
        )
        assert done.stdout.split() == [want, "False"]
