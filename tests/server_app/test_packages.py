"""Whole runs whose packages travel in few bits, to nodes that keep what they have had."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file
from torch import Tensor

from client_app.client import Client, ProcessCache
from client_app.store import Store
from fedpft_core.errors import RunError
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import Plan
from fedpft_core.wire.coded import rounded
from fedpft_core.wire.envelope import Envelope, open_envelope
from fedpft_core.wire.messages import NeedReply, TrainRequest
from fedpft_core.wire.parcel import Parcel

NODES = 2
KEYS = {
    "federation.rounds": 4, "federation.clients": NODES, "federation.clients-per-round": NODES,
    "federation.min-clients": NODES, "distill.steps": 4, "align.interval": 1, "align.steps": 2,
    "train.local-epochs": 1, "run.gradient-rows": 0, "run.baselines": False,
    "run.evaluate-every": 100,
}  # fmt: skip


class Deployed(tiny.Federation):
    """Nodes with disks of their own; each message meets a new process."""

    def __init__(self, flat: dict[str, Any], disks: Path) -> None:
        super().__init__(flat)
        self.disks = disks
        self.before: Callable[[int, Envelope], None] | None = None

    def client(self, index: int) -> Client:
        made = super().client(index)
        made.store, made.shared_store = Store(self.disks / f"node-{index}"), False
        made.cache = ProcessCache()
        return made

    def _answer(self, index: int, envelope: Envelope) -> Envelope:
        if self.before:
            self.before(index, envelope)
        return super()._answer(index, envelope)

    def parcels(self) -> list[tuple[int, Parcel]]:
        """What was sent of packages, by node."""
        out = []
        for node, envelope in self.sent:
            if "package" in envelope.parts:
                out.append((node, Parcel.from_bytes(envelope.parts["package"])))
        return out


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_task("bert", tmp_path_factory.mktemp("task")) | KEYS


def statuses(events: list[dict[str, Any]]) -> set[str]:
    return {e["status"] for e in events if e["event"] == "reply"}


def end(folder: Path) -> dict[str, bytes]:
    last = sorted((folder / "checkpoints").glob("round-*"))[-1]
    return {p.name: p.read_bytes() for p in last.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("fmt", "embeddings", "patch", "most"),
    [
        ("bf16", "same", "same", 0.6), ("fp16", "same", "fp16", 0.6), ("int8", "same", "same", 0.4),
        ("int8", "int4", "same", 0.35), ("int8", "same", "fp16", 0.4),
        ("fp32", "int4", "bf16", 1.0),
    ],
)  # fmt: skip
def test_a_run_in_fewer_bits(
    flat: dict[str, Any], tmp_path: Path, fmt: str, embeddings: str, patch: str, most: float
) -> None:
    """Server and clients hold the same bits in every version, or nobody would train on them."""
    sizes = []
    for name, keys in {
        "plain": {},
        "small": {"wire.package": fmt, "wire.embeddings": embeddings, "wire.patch": patch},
    }.items():
        federation = Deployed(flat, tmp_path / f"{name}-disks")
        events = tiny.run(flat | keys, tmp_path / name, federation, federation__rounds=2)
        assert statuses(events) == {"ok"}
        assert events[-1]["event"] == "run_finished"
        assert len(federation.parcels()) == NODES, "the next round needs a patch, no package"
        (first, *_) = federation.parcels()
        sizes.append(first[1].size - sum(map(len, first[1].files.values())))
    assert sizes[1] < most * sizes[0], sizes


@pytest.mark.parametrize("fmt", ["fp32", "int8"])
def test_another_task_on_the_same_fm_gets_what_is_new(
    flat: dict[str, Any], tmp_path: Path, fmt: str
) -> None:
    flat = flat | {"wire.package": fmt, "wire.patch": "same"}
    federation = Deployed(flat, tmp_path / "disks")
    tiny.run(flat, tmp_path / "first", federation)
    had = [Store(tmp_path / f"disks/node-{i}")._contents() for i in range(NODES)]
    again = Deployed(flat, tmp_path / "disks")
    second = tiny.run(flat, tmp_path / "second", again, run__seed=1, data__max_length=12)
    assert statuses(second) == {"ok", "need"}
    sent = [(node, k) for node, p in again.parcels() for k in p.sizes]
    assert sent and not any(k in had[node] for node, k in sent), "what a node has travels again"
    assert len(set(sent)) == len(sent)
    # Without the manifests, which are long beside a tiny model's weights.
    new, all_of_it = (sum(p.size for _, p in f.parcels()) for f in (again, federation))
    assert 0 < new < 0.5 * all_of_it, (new, all_of_it)
    # Bits are those of a run on nodes that had nothing.
    fresh = Deployed(flat, tmp_path / "other-disks")
    tiny.run(flat, tmp_path / "fresh", fresh, run__seed=1, data__max_length=12)
    assert end(tmp_path / "second") == end(tmp_path / "fresh")


def test_a_resumed_run_ends_with_the_same_bits(flat: dict[str, Any], tmp_path: Path) -> None:
    flat = flat | {"wire.package": "int8", "wire.embeddings": "int4", "wire.patch": "same"}
    tiny.run(flat, tmp_path / "through", Deployed(flat, tmp_path / "a"))
    with pytest.raises(RunError, match="stopped after round 2"):
        tiny.run(flat, tmp_path / "cut", Deployed(flat, tmp_path / "b"), run__stop_after=2)
    tiny.run(flat, tmp_path / "cut", Deployed(flat, tmp_path / "b"), run__resume=True)
    assert end(tmp_path / "cut") == end(tmp_path / "through")


def test_two_runs_of_different_fms_at_once_on_the_same_nodes(
    flat: dict[str, Any], tmp_path: Path
) -> None:
    """The second runs while the first waits for a node, and pushes its sub-FM off the disks."""
    other = tiny.write_task("roberta", tmp_path / "task") | KEYS
    alone = tiny.run(flat, tmp_path / "alone", Deployed(flat, tmp_path / "own-disks"))
    federation = Deployed(flat, tmp_path / "disks")
    inside: list[list[dict[str, Any]]] = []

    def meanwhile(index: int, envelope: Envelope) -> None:
        if envelope.kind != "train" or inside or federation.sent[-1][1].kind == "hello":
            return
        message = open_envelope(envelope)
        if isinstance(message, TrainRequest) and message.round == 3:
            inside.append([])
            run = tiny.run(other, tmp_path / "other", Deployed(other, tmp_path / "disks"))
            inside[0].extend(run)

    federation.before = meanwhile
    events = tiny.run(flat, tmp_path / "run", federation)
    assert inside and inside[0][-1]["event"] == "run_finished"
    assert statuses(events) <= {"ok", "need"} and events[-1]["event"] == "run_finished"
    assert alone[-1]["event"] == "run_finished"
    assert end(tmp_path / "run") == end(tmp_path / "alone")


def test_a_damaged_tensor_is_fetched_by_itself(flat: dict[str, Any], tmp_path: Path) -> None:
    federation = Deployed(flat, tmp_path / "disks")
    done: list[str] = []

    def spoil(index: int, envelope: Envelope) -> None:
        if envelope.kind != "train" or done or index != 1:
            return
        if open_envelope(envelope).round == 2:  # type: ignore[union-attr]
            path = max(
                (tmp_path / "disks/node-1/tensors").iterdir(), key=lambda p: p.stat().st_size
            )
            path.write_bytes(path.read_bytes()[:-1] + b"\x77")
            done.append(path.name.partition(".")[0])

    federation.before = spoil
    # With patches that are larger than what is damaged, were they sent.
    events = tiny.run(flat, tmp_path / "run", federation, align__interval=0)
    assert statuses(events) == {"ok", "need"} and done
    last = federation.parcels()[-1]
    assert (last[0], list(last[1].sizes)) == (1, done)
    needs = [
        m for _, e in federation.received if isinstance(m := open_envelope(e), NeedReply)
    ]  # fmt: skip
    assert [m.lacks for m in needs] == [(done[0],)]


@pytest.mark.parametrize("fmt", ["bf16", "int8"])
def test_no_message_holds_a_rounded_row_of_what_was_pruned(
    flat: dict[str, Any], tmp_path: Path, fmt: str
) -> None:
    """Decoded, no line of any tensor is a pruned neuron of the FM as the format would leave it."""
    federation = Deployed(flat, tmp_path / "disks")
    tiny.run(flat | {"wire.package": fmt, "wire.patch": "same"}, tmp_path / "run", federation)
    fm = load_file(f"{flat['model.name']}/model.safetensors")
    plan = Plan.from_json((tmp_path / "run/plan.json").read_text())
    family = family_of("bert")

    def neurons(block: int, which: Iterable[int]) -> set[bytes]:
        path = f"{family.blocks.removeprefix('bert.')}.{block}."
        ins = rounded(fm[f"{path}{family.ffn_in[0]}.weight"], fmt, 0)
        outs = rounded(fm[f"{path}{family.ffn_out}.weight"], fmt, 1).T
        return {line(t[j]) for j in which for t in (ins, outs)}

    seen: set[bytes] = set()
    tensors = [t for _, p in federation.parcels() for t in p.tensors().values()]
    for _, envelope in federation.sent:
        message = open_envelope(envelope)
        if isinstance(message, TrainRequest):
            tensors += [
                t for patch in message.patches
                for _, parts in patch.decoded().values() for t in parts.values()
            ]  # fmt: skip
    for t in tensors:
        if t.is_floating_point() and t.dim():
            seen |= {line(row) for row in t.reshape(-1, t.shape[-1])}
            seen |= {line(column) for column in t.reshape(t.shape[0], -1).T}
    for block in plan.pruned:
        kept = set(plan.blocks[block].kept)
        assert not seen & neurons(block, set(range(plan.fm_neurons)) - kept)
    # It would be noticed: that part of a whole block travels whose scales lie along its neurons.
    assert plan.blocks[0].state == "whole"
    ins = rounded(fm[f"encoder.layer.0.{family.ffn_in[0]}.weight"], fmt, 0)
    assert {line(row) for row in ins} <= seen


def line(t: Tensor) -> bytes:
    return t.contiguous().numpy().tobytes()
