"""Memory that a client's process can hold: of a machine, a container, and below a ceiling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from client_app.memory import available_memory

MB = 10**6


def own() -> int:
    return int(psutil.Process().memory_info().rss)


def container(root: Path, version: int, limit: str, used: int, cached: int) -> Path:
    """Files as the kernel has them in a container."""
    folder = root if version == 2 else root / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 12\nfile 9\n{names[2]} {cached}\nactive_file 7\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_with_its_page_cache_and_this_process(
    tmp_path: Path, version: int
) -> None:
    root = container(tmp_path, version, str(900 * MB), 700 * MB, 50 * MB)
    found = available_memory(root)
    # This process takes some more or less memory between two looks.
    assert abs(found - (900 - 700 + 50) * MB - own()) < 20 * MB


@pytest.mark.parametrize("version", [1, 2])
def test_no_limit_is_the_machines(tmp_path: Path, version: int) -> None:
    limit = "max" if version == 2 else str(2**63 - 4096)
    root = container(tmp_path, version, limit, 700 * MB, 0)
    free = psutil.virtual_memory().available
    assert abs(available_memory(root) - free - own()) < 0.2 * free
    assert abs(available_memory(tmp_path / "none") - free - own()) < 0.2 * free


def test_a_container_that_is_over_its_limit_has_nothing(tmp_path: Path) -> None:
    assert available_memory(container(tmp_path, 2, "1000", 10**13, 0)) == 0


def test_a_ceiling_of_the_address_space_counts() -> None:
    code = (
        "import resource; from client_app.memory import available_memory; "
        f"resource.setrlimit(resource.RLIMIT_AS, ({700 * MB}, {700 * MB})); "
        "print(available_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 700 * MB
