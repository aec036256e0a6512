"""The layering: imports point one way, and the method runs without Flower."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedpft_core", "server_app", "client_app", "fedpft_console")

# From the ground up: a room may import from the rooms before it, and from its own, wherever in a
# file the import stands. Rooms on one line know nothing of one another.
FLOORS: list[set[str]] = [
    {"fedpft_core.errors"},
    {"fedpft_core.seeds", "fedpft_core.tensors", "fedpft_core.registry", "fedpft_core.disk"},
    {"fedpft_core.data"},
    {"fedpft_core.config"},
    {"fedpft_core.privacy", "fedpft_core.secure"},
    {"fedpft_core.model"},
    {"fedpft_core.task"},
    {"fedpft_core.adapter"},
    {"fedpft_core.head"},
    {"fedpft_core.train"},
    {"fedpft_core.aggregation", "fedpft_core.wire"},
    {"fedpft_core.proxy"},
    {"fedpft_core.align"},
    {"fedpft_core.api"},
    {"client_app", "server_app"},
    {"fedpft_console"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at its top or inside a function."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute here"
            out |= {f"{node.module}.{a.name}" for a in node.names}
    return out


def room_of(name: str) -> str | None:
    """The room a dotted name lies in; None for what is not ours, or only the version."""
    parts = name.split(".")
    if parts[0] not in PACKAGES or parts[1:] in ([], ["__version__"]):
        return None
    return ".".join(parts[:2]) if parts[0] == "fedpft_core" else parts[0]


def sources() -> list[tuple[str, Path]]:
    """(room, file) of every source file."""
    out = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            out.append((room_of(name) or name, path))
    return out


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda v: str(v).rpartition("main/")[2])
def test_imports_point_down(room: str, path: Path) -> None:
    if room == "fedpft_core.__init__":
        return  # the library's face may show anything of the method
    for name in sorted(imported(path)):
        other = room_of(name)
        if other is None or other == room:
            continue
        assert other in FLOOR, f"{path}: {name} is in no room of the house"
        assert FLOOR[other] < FLOOR[room], f"{path} ({room}) imports {name}, which is not below it"


def test_only_one_file_of_the_method_imports_flower() -> None:
    for room, path in sources():
        flower = {m for m in imported(path) if m.split(".")[0] == "flwr"}
        if flower and room.startswith("fedpft_core"):
            assert path.relative_to(ROOT).as_posix() == "fedpft_core/wire/flower.py", path


def test_flower_is_imported_from_its_public_modules_only() -> None:
    public = ("flwr.app.", "flwr.clientapp.", "flwr.serverapp.")
    for _, path in sources():
        flower = {m for m in imported(path) if m.split(".")[0] == "flwr"}
        assert all(f"{m}.".startswith(public) for m in flower), f"{path}: {flower}"


def test_a_higher_room_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "low.py"
    path.write_text("def f():\n    from fedpft_core.align.distill import distil\n")
    (name,) = imported(path)
    assert FLOOR[room_of(name) or ""] > FLOOR["fedpft_core.model"]


def test_the_method_runs_where_flower_is_missing() -> None:
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flwr":
            raise ImportError("flwr is not here")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, "tests")
import tiny, torch
import client_app.client, client_app.store
from fedpft_core.align import distill
from fedpft_core.train import agreement
from fedpft_core.train import tune as training
from fedpft_core.wire import validate
fm, proxy, plan, spec = tiny.pair("bert")
data = tiny.encoded("bert", 12)
settings = training.LocalSettings(1e-3, 4, 1, 0, 0.0, 1.0, 1)
assert training.fine_tune(proxy, tiny.TASK, data, settings, 0).steps == 3
print("ran")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip().endswith("ran"), done.stderr[-2000:]
