"""How much memory a client's process can hold on this machine."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_memory(cgroup: Path = CGROUP) -> int:
    """What a process of this machine can hold, this one's own memory counted as free.

    Files in the page cache count as free too, since the kernel drops them before it kills anything.

    Args:
        cgroup: where the container's limits are, of either version of control groups.

    Returns:
        Bytes: of the machine, of its container, or below `ulimit -v`, whichever is least.
    """
    import psutil

    own = psutil.Process().memory_info().rss
    bounds = [int(psutil.virtual_memory().available) + own]
    bounds += [max(0, free + own) for free in _container(cgroup)]
    ceiling, _ = resource.getrlimit(resource.RLIMIT_AS)
    if ceiling != resource.RLIM_INFINITY:
        bounds.append(ceiling)
    return min(bounds)


def _container(root: Path) -> Iterator[int]:
    """What is left below the limits of control groups of version 2 and of version 1."""
    for folder, limit, used, cached in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        # "max" is no limit; and where there are no such files, there is none either.
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text())
            held = int((folder / used).read_text())
            yield most - held + _of(folder / "memory.stat", cached)


def _of(path: Path, key: str) -> int:
    """One figure of a file of names and figures; 0 where it is not there."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0
