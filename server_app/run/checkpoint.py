"""Checkpoints: after every round, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpft_core.disk import evict, whole
from fedpft_core.errors import ReplyError, RunError
from fedpft_core.tensors import Tensors
from fedpft_core.train.inactivity import Counts
from fedpft_core.wire import codec
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.package import Package, Patch
from server_app.state import Best, Flight, Given, Pending, State, Version

if TYPE_CHECKING:
    from server_app.models import Models


@dataclass(frozen=True)
class SavedWidth:
    """The sub-FM of one of the other widths, as a checkpoint keeps it."""

    name: str
    digest: str
    frozen: Tensors
    patches: list[Patch]


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back."""

    round: int
    digest: str
    events_offset: int
    adapter: Tensors
    frozen: Tensors  # the proxy's weights that differ from what pruning the FM gives
    patches: list[Patch]
    have: dict[str, tuple[str, ...]]
    memory: Tensors
    run: str
    flights: list[Flight]
    bases: dict[int, Tensors]
    clock: float
    identity: dict[str, Any]  # see `server_app.run.identity`; empty in checkpoints of before
    events_digest: str = ""  # sha256 of the event log up to `events_offset`
    spent: list[list[float]] = field(default_factory=list)
    bound: float = 0.0
    best: Best | None = None
    width: str = ""
    others: list[SavedWidth] = field(default_factory=list)
    given: dict[str, Given] = field(default_factory=dict)
    pending: Pending | None = None

    def restore(
        self, models: Models, package: Package, others: Mapping[str, Package] | None = None
    ) -> State:
        """Put the state back on FM and proxy.

        Args:
            models: as built, with the proxy pruned and not distilled; they get the run's weights.
            package: the freshly pruned proxy.
            others: the freshly pruned proxies of the other widths, by name.

        Returns:
            The state after the round of the checkpoint.

        Raises:
            RunError: the FM or the plan is not the one the run began with.
        """
        own = _rebuilt(package, self.frozen, self.digest, self.patches)
        others = others or {}
        if [w.name for w in self.others] != list(others):
            raise RunError("the checkpoint is of a run with other plan.widths")
        every = {
            w.name: _rebuilt(others[w.name], w.frozen, w.digest, w.patches) for w in self.others
        }
        models.load_frozen(self.frozen)
        if every:
            for saved, width in zip(self.others, models.others, strict=True):
                width.load_frozen(saved.frozen)
        models.plug(self.adapter)
        return State(
            self.round, self.adapter, own.package, own.digests, own.digest, own.patches,
            dict(self.have), self.memory, list(self.flights), dict(self.bases), self.clock,
            self.run, [list(s) for s in self.spent], self.bound, self.best, self.pending,
            self.width, every, dict(self.given),
        )  # fmt: skip


def _rebuilt(package: Package, frozen: Tensors, digest: str, patches: list[Patch]) -> Version:
    """A sub-FM with the weights of a checkpoint; fails where FM or plan is another one."""
    if not frozen.keys() <= package.weights.keys():
        raise RunError("the checkpoint does not fit this model and plan")
    weights = package.weights | frozen
    after = Package(package.meta, package.files, weights)
    if after.digest() != digest:
        raise RunError(
            "the checkpoint's sub-FM cannot be rebuilt: model, data, plan or library "
            "versions are not those the run began with"
        )
    return Version(after, {k: tensor_digest(t) for k, t in weights.items()}, digest, list(patches))


class Checkpoints:
    """A folder of checkpoints `round-NNNN`, the last `keep` of them; each says of what run."""

    def __init__(self, root: Path, keep: int, identity: dict[str, Any] | None = None) -> None:
        self.root = root
        self.keep = keep
        self.identity = identity or {}

    def save(
        self, state: State, models: Models, events_offset: int, events_digest: str = ""
    ) -> None:
        """Write the state after a round; a checkpoint of this round that is there is replaced.

        Args:
            state: what is written, but for what pruning the FM gives again.
            models: say which of the proxy's weights alignment may have moved.
            events_offset: length of the event log after this round, bytes.
            events_digest: sha256 of the log so far.

        Raises:
            OSError: the disk is full, or the folder cannot be written; older checkpoints stay.
        """
        frozen = {k: state.package.weights[k] for k in models.trained_names()}
        blobs = {
            "adapter.safetensors": codec.pack(state.adapter),
            "frozen.safetensors": codec.pack(frozen),
            "memory.safetensors": codec.pack(state.memory),
        }
        for i, patch in enumerate(state.patches):
            blobs[f"patch-{i:04d}.safetensors"] = patch.to_bytes()
        widths = {w.name: w for w in models.others} if state.others else {}
        for i, (name, own) in enumerate(state.others.items()):
            trained = widths[name].trained_names()
            blobs[f"width-{i}.safetensors"] = codec.pack(
                {k: own.package.weights[k] for k in trained}
            )
            for j, patch in enumerate(own.patches):
                blobs[f"width-{i}-patch-{j:04d}.safetensors"] = patch.to_bytes()
        for version, tensors in state.bases.items():
            blobs[f"base-{version:04d}.safetensors"] = codec.pack(tensors)
        if state.best:
            blobs["best.safetensors"] = codec.pack(state.best.adapter)
        counts = state.pending.counts if state.pending else None
        if counts:
            blobs["counts.safetensors"] = codec.pack(
                {f"{b}": t for b, t in counts.inactive.items()}
            )
        meta = {
            "round": state.round,
            "digest": state.digest,
            "events_offset": events_offset,
            "patches": [[p.source, p.target, p.fmt] for p in state.patches],
            "run": state.run,
            "identity": self.identity,
            "events_digest": events_digest,
            "flights": [[f.client, f.version, f.due] for f in state.flights],
            "bases": list(state.bases),
            "clock": state.clock,
            "spent": state.spent,
            "bound": state.bound,
            "width": state.width,
            "others": [
                [name, own.digest, [[p.source, p.target, p.fmt] for p in own.patches]]
                for name, own in state.others.items()
            ],
            "given": {k: asdict(v) for k, v in state.given.items()},
            "best": [state.best.round, state.best.value] if state.best else None,
            "pending": {"tokens": counts.tokens if counts else None} if state.pending else None,
            "have": {k: list(v) for k, v in state.have.items()},
            "sha256": {k: hashlib.sha256(v).hexdigest() for k, v in blobs.items()},
        }
        text = json.dumps(meta)
        blobs["state.json"] = json.dumps(
            {"state": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        ).encode()
        self.root.mkdir(parents=True, exist_ok=True)
        whole.sweep(self.root, 0.0)  # nobody else writes here: the run folder is locked
        final = self.root / f"round-{state.round:04d}"
        with whole.folder(final, replace=True, sync=True) as temp:
            for name, data in blobs.items():
                (temp / name).write_bytes(data)
        # Later ones can only be those that were corrupt when the run was resumed.
        for folder in evict.superseded(self.root, state.round, self.keep):
            shutil.rmtree(folder, ignore_errors=True)

    def all(self) -> list[Path]:
        """The checkpoints there are, whole or corrupt.

        Returns:
            Their folders, oldest round first.
        """
        return list(evict.rounds(self.root).values())

    def latest(self) -> Saved | None:
        """The newest checkpoint that reads back whole.

        Returns:
            The checkpoint; None when there is none at all.

        Raises:
            RunError: there are checkpoints but every one is corrupt.
        """
        folders = self.all()
        for folder in reversed(folders):
            try:
                return _read(folder)
            except (OSError, ReplyError, ValueError, KeyError, TypeError, AttributeError):
                continue
        if folders:
            raise RunError(f"{self.root}: every checkpoint is corrupt, the run cannot be resumed")
        return None


def _read(folder: Path) -> Saved:
    outer = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if hashlib.sha256(outer["state"].encode()).hexdigest() != outer["sha256"]:
        raise ValueError("state.json is corrupt")
    meta: dict[str, Any] = json.loads(outer["state"])
    blobs = {}
    for name, digest in meta["sha256"].items():
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} is corrupt")
        blobs[name] = codec.unpack(data)
    return Saved(
        round=meta["round"],
        digest=meta["digest"],
        events_offset=meta["events_offset"],
        adapter=blobs["adapter.safetensors"],
        frozen=blobs["frozen.safetensors"],
        patches=[
            Patch(source, target, fmt, blobs[f"patch-{i:04d}.safetensors"])
            for i, (source, target, fmt) in enumerate(meta["patches"])
        ],
        have={k: tuple(v) for k, v in meta["have"].items()},
        memory=blobs["memory.safetensors"],
        run=meta["run"],
        identity=meta.get("identity", {}),
        events_digest=meta.get("events_digest", ""),
        # Absent from older checkpoints.
        flights=[Flight(*f) for f in meta.get("flights", [])],
        bases={v: blobs[f"base-{v:04d}.safetensors"] for v in meta.get("bases", [])},
        clock=meta.get("clock", 0.0),
        spent=meta.get("spent", []),
        bound=meta.get("bound", 0.0),
        width=meta.get("width", ""),
        others=[
            SavedWidth(
                name, digest, blobs[f"width-{i}.safetensors"],
                [
                    Patch(source, target, fmt, blobs[f"width-{i}-patch-{j:04d}.safetensors"])
                    for j, (source, target, fmt) in enumerate(patches)
                ],
            )
            for i, (name, digest, patches) in enumerate(meta.get("others", []))
        ],
        given={k: Given(**v) for k, v in meta.get("given", {}).items()},
        best=_best(meta.get("best"), blobs.get("best.safetensors")),
        pending=_pending(meta.get("pending"), blobs.get("counts.safetensors")),
    )  # fmt: skip


def _best(kept: list[Any] | None, adapter: Tensors | None) -> Best | None:
    if kept is None or adapter is None:
        return None
    round, value = kept
    return Best(int(round), float(value), adapter)


def _pending(kept: dict[str, Any] | None, inactive: Tensors | None) -> Pending | None:
    if kept is None or inactive is None:
        return None if kept is None else Pending()
    tokens = {int(b): int(n) for b, n in kept["tokens"].items()}
    return Pending(Counts({int(b): inactive[b] for b in sorted(inactive, key=int)}, tokens))
