"""Distilled sub-FMs kept on disk, for runs that differ only in what comes after.

A grid runs the same distillation for every learning rate, alignment interval or partition. With
`run.proxy-cache` its result is found under a digest of everything that decides it: the weights of
FM and sub-FM with the adapter they start from, the public rows, the settings, the seed, threads,
device and versions, and the source of the method. A run with the cache computes the same bits as
one without; its `distilled` event, with the seconds of the run that did the work, has
`cached: true`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import fedpft_core
from fedpft_core import config as configs
from fedpft_core.disk import whole
from fedpft_core.tensors import Tensors
from fedpft_core.wire.identity import tensor_digest
from server_app.bench import Bench
from server_app.phases import distil as phases
from server_app.phases.reporting import phase
from server_app.run.events import event_of, line_of
from server_app.run.schema import Distilled, Event, WidthDistilled
from server_app.state import Events

log = logging.getLogger("fedpft")

Kept = Distilled | WidthDistilled
"""Events that say what distillation did."""

# What comes after distillation, or says where and how a run goes: no part of a result's name.
_LATER = (
    "align.", "train.", "federation.", "plug.", "wire.", "plan.ledger", "plan.disclosure-budget",
    "plan.disguise",
)  # fmt: skip
_OF_RUN = ("run.seed",)
# Files that decide nothing of what distillation computes.
_ASIDE = ("disk/",)
# Files of the server that have a part in it.
_OF_SERVER = ("bench.py", "models.py", "phases/load.py", "phases/distil.py",
              "phases/widths.py")  # fmt: skip


def distil(bench: Bench) -> None:
    """Distil the proxy, or take the result from `run.proxy-cache`.

    A cache that cannot be read or written is no reason to fail: the work is then done here.

    Args:
        bench: its proxy is changed in place; its log gets the same events either way.

    Raises:
        RunError: the distillation diverges.
    """
    folder = bench.config.run.proxy_cache
    if not folder or not phases.due(bench):
        phases.distil(bench)
        return
    before = {k: tensor_digest(t) for k, t in _weights(bench).items()}
    path = Path(folder).expanduser() / f"{_key(bench, before)}.safetensors"
    found = _read(path)
    if found is not None:
        tensors, events = found
        with phase(bench.events, "distil"):
            _put(bench, tensors)
            for event in events:
                done = replace(event, cached=True) if isinstance(event, Distilled) else event
                bench.events.emit(done)
        return
    recorder = _Recorder(bench.events)
    phases.distil(replace(bench, events=recorder))
    if recorder.kept:
        after = _weights(bench)
        changed = {k: t for k, t in after.items() if tensor_digest(t) != before[k]}
        _write(path, changed, recorder.kept)


class _Recorder:
    """Passes events on and remembers those that say what distillation did."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.kept: list[Kept] = []

    def emit(self, event: Event) -> None:
        self.events.emit(event)
        if isinstance(event, Distilled | WidthDistilled):
            self.kept.append(event)


def _weights(bench: Bench) -> Tensors:
    """The proxy's weights, and those of the other widths with the width before their names."""
    found: Tensors = bench.models.proxy.state_dict()
    for width in bench.models.others:
        found |= {f"{width.name}//{k}": t for k, t in width.proxy.state_dict().items()}
    return found


def _digests(model: torch.nn.Module) -> dict[str, str]:
    return {k: tensor_digest(t) for k, t in model.state_dict().items()}


def _key(bench: Bench, proxy: Mapping[str, str]) -> str:
    flat = configs.to_flat(bench.config)
    settings = {
        k: v for k, v in flat.items()
        if not k.startswith(_LATER) and (not k.startswith("run.") or k in _OF_RUN)
    }  # fmt: skip
    parts = {
        "fm": _digests(bench.models.fm),
        "proxy": proxy,
        "plan": bench.models.plan.to_json(),
        "public": _rows_digest(bench.rows.public),
        "settings": settings,
        "source": _source_digest(),
        "machine": [
            torch.__version__, transformers.__version__, np.__version__, str(bench.device),
            torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
        ],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _rows_digest(rows: list[Any]) -> str:
    """Over tokenised rows (arrays), texts or encoded images."""
    h = hashlib.sha256()
    for row in rows:
        if isinstance(row, np.ndarray):
            data = f"{row.dtype}".encode() + row.tobytes()
        else:
            data = row if isinstance(row, bytes) else str(row).encode()
        h.update(f"{len(data)} ".encode() + data)
    return h.hexdigest()


@lru_cache(maxsize=1)
def _source_digest() -> str:
    """Over the files that may decide what distillation computes: a changed method is another."""
    root = Path(fedpft_core.__file__).parent
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py")}
    server = Path(__file__).parents[1]
    files |= {name: server / name for name in _OF_SERVER}
    h = hashlib.sha256()
    for name in sorted(files):
        if not name.startswith(_ASIDE):
            h.update(f"{name}\n".encode() + files[name].read_bytes())
    return h.hexdigest()


@torch.no_grad()
def _put(bench: Bench, tensors: Tensors) -> None:
    live = _weights(bench)
    for name, value in tensors.items():
        live[name].copy_(value)


def _content(tensors: Tensors, events: str) -> str:
    parts = [f"{k} {tensor_digest(tensors[k])}" for k in sorted(tensors)]
    return hashlib.sha256("\n".join([*parts, events]).encode()).hexdigest()


def _read(path: Path) -> tuple[Tensors, list[Kept]] | None:
    """What a file holds; None when there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            # Copied out of the mapped file first: what is verified must be what is used.
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        if meta.get("content") != _content(tensors, meta.get("events", "")):
            raise ValueError("its content is not what was written")
        found = map(event_of, json.loads(meta["events"]))
        events = [event for event in found if isinstance(event, Distilled | WidthDistilled)]
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        log.warning("run.proxy-cache: %s is made again (%s)", path, error)
        return None
    return tensors, events


def _write(path: Path, tensors: Tensors, events: list[Kept]) -> None:
    """Whole or not at all; of two runs that write the same, either may win."""
    text = json.dumps([line_of(event) for event in events])
    kept = {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole.file(path) as part:
            save_file(kept, part, metadata={"events": text, "content": _content(kept, text)})
    except (OSError, SafetensorError) as error:
        log.warning("run.proxy-cache: %s could not be written (%s)", path, error)
