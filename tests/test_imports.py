"""The layering: imports point one way, and the method runs without Flower."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ROOT / "fedpft_core"
# Composition roots may import anything, inside functions.
ROOTS = {"cli.py", "launch.py", "compare/run.py"}


def imported(path: Path, top_only: bool) -> set[str]:
    """Absolute dotted names a file imports; relative ones are resolved to fedpft_core."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    out = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ["fedpft_core", *path.relative_to(CORE).parent.parts]
                base = base[: len(base) - node.level + 1]
                out |= {".".join([*base, *(node.module or a.name).split(".")]) for a in node.names}
            else:
                out.add(node.module or "")
    return out


def core_files() -> list[Path]:
    return sorted(CORE.rglob("*.py"))


def test_only_wire_imports_flower() -> None:
    for path in core_files():
        flower = {m for m in imported(path, top_only=False) if m.split(".")[0] == "flwr"}
        assert not flower or path.name == "wire.py", f"{path}: {flower}"


def test_flower_is_imported_from_its_public_modules_only() -> None:
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    for folder in ("fedpft_core", "server_app", "client_app"):
        for path in (ROOT / folder).rglob("*.py"):
            flower = {m for m in imported(path, top_only=False) if m.split(".")[0] == "flwr"}
            assert flower <= public, f"{path}: {flower - public}"


def test_core_does_not_import_the_apps() -> None:
    for path in core_files():
        apps = {m for m in imported(path, top_only=False) if m.startswith(("server_", "client_"))}
        assert not apps or path.relative_to(CORE).as_posix() in ROOTS, f"{path}: {apps}"
        top = {m for m in imported(path, top_only=True) if m.startswith(("server_", "client_"))}
        assert not top, f"{path} imports an app at its top: {top}"


def test_client_does_not_import_the_server() -> None:
    for path in (ROOT / "client_app").rglob("*.py"):
        assert not {m for m in imported(path, False) if m.startswith("server_app")}, path


# Lower layers must not know the upper ones.
LAYERS = [
    {"errors", "seeds", "events", "registry"},
    {"config", "families"},
    {"sub_fm", "models"},
    {"adapters"},
    {"training"},
    {"distill", "measure", "baselines", "codec"},
    {"exchange"},
    {"proxy", "wire", "store"},
    {"client"},
]


def test_layers_point_one_way() -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for name, level in rank.items():
        for module in imported(CORE / f"{name}.py", top_only=False):
            parts = module.split(".")
            if parts[0] == "fedpft_core" and len(parts) > 1 and parts[1] in rank:
                assert rank[parts[1]] <= level, f"{name} imports {parts[1]}, which is above it"


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
from fedpft_core.wire import messages
fm, proxy, plan, spec = tiny.pair("bert")
data = tiny.encoded("bert", 12)
settings = training.LocalSettings(1e-3, 4, 1, 0, 0.0, 1.0, 1)
assert training.fine_tune(proxy, data, settings, 0).steps == 3
print("ran")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip().endswith("ran"), done.stderr[-2000:]
