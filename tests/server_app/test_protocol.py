"""Whole runs of tiny models: every byte booked, every message read, any order, disks lost."""

from __future__ import annotations

import json
import pickletools
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import corrupt
import pytest
import tiny
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from torch import Tensor

from client_app.store import Store
from fedpft_core.config import from_flat
from fedpft_core.model.families import FFN, family_of
from fedpft_core.model.names import PatchedWeights
from fedpft_core.model.plan import Plan
from fedpft_core.wire import codec
from fedpft_core.wire import flower as wire
from fedpft_core.wire.envelope import Envelope, open_envelope
from fedpft_core.wire.messages import Failure, TrainRequest
from fedpft_core.wire.package import Package
from server_app.app import run as server_run
from server_app.run.events import EventLog, read_events
from server_app.transport import LocalTransport, Meanwhile, OnReply

# What Flower adds to a message: metadata and a node of its object tree, the same for each array,
# and for each chunk of 5 MB an array is cut into.
FRAME, FRAME_PER_PART, FRAME_PER_CHUNK, CHUNK = 450, 620, 100, 5_000_000
CLIENTS = 4
Files = dict[str, Any]


class Tap(LocalTransport):
    """A transport that notes every record that crosses it, and can shuffle and disturb."""

    def __init__(self, flat: Files, rng: random.Random | None = None) -> None:
        self.federation = tiny.Federation(flat)
        super().__init__(self.federation.transport().clients)
        self.rng = rng
        self.records: list[tuple[str, int, RecordDict]] = []  # (down | up, node, content)
        self.before: Any = None  # called with (node, envelope) before a client sees a message

    def exchange(
        self,
        messages: Mapping[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        if meanwhile:
            meanwhile()
        replies: dict[int, Envelope | Failure] = {}
        order = list(messages)
        if self.rng:
            self.rng.shuffle(order)
        for node in order:
            sent = wire.to_record(messages[node])
            self.records.append(("down", node, sent))
            if self.before:
                self.before(node, messages[node])
            back = wire.to_record(self.clients[node](wire.from_record(sent)))
            self.records.append(("up", node, back))
            replies[node] = wire.from_record(back)
        if self.rng:
            self.rng.shuffle(order)
        for node in order:
            on_reply(node, replies[node])

    def envelopes(self, way: str = "") -> list[tuple[int, Envelope]]:
        found = [(n, wire.from_record(r)) for w, n, r in self.records if way in ("", w)]
        return found


def go(flat: Files, folder: Path, tap: Tap | None = None, **keys: Any) -> tuple[Tap, list[Any]]:
    """A whole run below `folder`; returns its transport and its events."""
    flat = flat | {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
    flat["run.dir"] = str(folder)
    tap = tap or Tap(flat)
    tap.federation.flat = flat
    log = EventLog(folder / "events.jsonl")
    try:
        server_run(from_flat(flat), tap, log)
    finally:
        log.close()
    return tap, [e for _, e in read_events(folder / "events.jsonl")]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("task") / "owner-of-the-model"
    folder.mkdir()
    return tiny.write_task("bert", folder) | {
        "federation.rounds": 5,
        "federation.clients": CLIENTS,
        "distill.steps": 10,
        "align.steps": 3,
        "train.local-epochs": 1,
        "run.gradient-rows": 0,
    }


@pytest.fixture(scope="module")
def plain(flat: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tap, list[Any], Path]:
    folder = tmp_path_factory.mktemp("plain")
    return (*go(flat, folder), folder)


def end(folder: Path) -> dict[str, bytes]:
    """Adapter, sub-FM and patches at the end of a run, and the exported adapter."""
    last = sorted((folder / "checkpoints").glob("round-*"))[-1]
    out = {p.name: p.read_bytes() for p in last.glob("*.safetensors")}
    return out | {"export": (folder / "adapter" / "adapter_model.safetensors").read_bytes()}


def metrics(events: list[Any]) -> list[Any]:
    names = ("round_finished", "evaluation", "alignment", "adapter", "distilled")
    return [
        {k: v for k, v in e.items() if k != "t" and "seconds" not in k}
        for e in events
        if e["event"] in names
    ]


# --- the ledger ---------------------------------------------------------------------------


def crossed(record: RecordDict) -> Counter[str]:
    """Bytes of a record by ledger kind, read off Flower's own objects."""
    out: Counter[str] = Counter()
    for config in record.config_records.values():
        out["control"] += sum(len(str(config[k]).encode()) for k in ("head", "check"))
    for arrays in record.array_records.values():
        for name, array in arrays.items():
            out[name.partition(".")[0]] += array.numpy().nbytes
    return out


def test_the_ledger_is_what_crosses_the_network(plain: tuple[Tap, list[Any], Path]) -> None:
    tap, events, _ = plain
    want: Counter[Any] = Counter()
    round = 1
    for way, node, record in tap.records:
        envelope = wire.from_record(record)
        if envelope.kind in ("train", "train-reply"):
            round = json.loads(envelope.head)["round"]
        elif envelope.kind == "hello":
            round = 1
        for kind, size in crossed(record).items():
            want[f"client-{node - 1}", way, round, kind] += size
    got: Counter[Any] = Counter()
    for e in events:
        if e["event"] == "bytes":
            got[e["client"], e["direction"], e["round"], e["kind"]] += e["bytes"]
    assert got == want
    assert {k for _, _, _, k in got} == {"control", "package", "patch", "adapter", "counts"}
    # In a simulation the clients share one disk; each is still sent what it would have to be.
    assert sum(1 for (_, _, _, k) in got if k == "package") == len({c for c, *_ in got})


def test_flower_adds_little_to_what_the_ledger_says(
    plain: tuple[Tap, list[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the objects Flower stores, moves and counts for a message."""
    tap, _, _ = plain
    monkeypatch.setattr(TaskIdentity, "_run_id", 2**63)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1, raising=False)
    monkeypatch.setattr(TaskIdentity, "_task_id", 2**62, raising=False)
    for way, node, record in tap.records:
        message = Message(record, dst_node_id=node, message_type="train", ttl=60.0, group_id="1")
        objects = get_all_nested_objects(message).values()
        total = sum(len(o.deflate()) for o in objects)
        booked = sum(crossed(record).values())
        parts = [a for arrays in record.array_records.values() for a in arrays.values()]
        chunks = sum(a.numpy().nbytes // CHUNK + 1 for a in parts)
        bound = FRAME + FRAME_PER_PART * len(parts) + FRAME_PER_CHUNK * chunks
        assert 0 <= total - booked <= bound, (way, total - booked, bound)


# --- the audit ----------------------------------------------------------------------------


def fm_tensors(flat: Files) -> dict[str, Tensor]:
    """The FM's own tensors, named as in the task model."""
    return {f"bert.{k}": t for k, t in load_file(f"{flat['model.name']}/model.safetensors").items()}


def all_tensors(tap: Tap) -> list[tuple[str, str, Tensor]]:
    """(part, name, float tensor) of everything that was sent either way, patches decoded."""
    out = []
    for _, envelope in tap.envelopes():
        for part, data in envelope.parts.items():
            tensors = codec.unpack(data)
            assert codec.pack(tensors) == data, "a part holds more than its tensors"
            # What fits into fewer bits travels in these.
            out += [
                (part, k, t.float() if t.is_floating_point() else t) for k, t in tensors.items()
            ]
    return out


def test_no_message_holds_what_only_the_owner_may_have(
    flat: Files, plain: tuple[Tap, list[Any], Path]
) -> None:
    tap, _, folder = plain
    fm = fm_tensors(flat)
    plan = Plan.from_json((folder / "plan.json").read_text())
    family = family_of("bert")
    assert len(plan.pruned) == 2
    secret: dict[bytes, str] = {}
    for block in plan.pruned:
        dropped = sorted(set(range(plan.fm_neurons)) - set(plan.blocks[block].kept))
        assert dropped
        w1 = fm[f"{family.blocks}.{block}.{family.ffn_in[0]}.weight"]
        w2 = fm[f"{family.blocks}.{block}.{family.ffn_out}.weight"]
        for j in dropped:
            secret[w1[j].contiguous().numpy().tobytes()] = f"block {block} row {j}"
            secret[w2[:, j].contiguous().numpy().tobytes()] = f"block {block} column {j}"
        whole_bias = fm[f"{family.blocks}.{block}.{family.ffn_in[0]}.bias"].numpy().tobytes()
        secret[whole_bias] = f"block {block} bias"
    width = len(next(iter(secret)))
    found = 0
    for part, name, t in all_tensors(tap):
        if not t.is_floating_point() or t.numel() < 2:
            continue
        for lines in (t.reshape(-1, t.shape[-1]), t.reshape(t.shape[0], -1).T):
            raw = lines.contiguous().numpy().tobytes()
            step = lines.shape[1] * 4
            for at in range(0, len(raw), step):
                assert raw[at : at + step] not in secret, (part, name, secret[raw[at : at + step]])
                found += 1
    assert found > 1000 and width == 64
    # Nor anywhere in the bytes, whatever they claim to be.
    for _, envelope in tap.envelopes():
        for part, data in envelope.parts.items():
            for row, what in secret.items():
                assert row not in data, (part, what)


def test_the_audit_would_notice(flat: Files, plain: tuple[Tap, list[Any], Path]) -> None:
    """The rows of kept neurons, before distillation the FM's own, can be found this way."""
    tap, _, folder = plain
    fm, plan, family = fm_tensors(flat), plan_of(folder), family_of("bert")
    packages = [e.parts["package"] for _, e in tap.envelopes("down") if "package" in e.parts]
    whole = fm[f"{family.blocks}.0.{family.ffn_in[0]}.weight"]
    assert plan.blocks[0].state == "whole"
    for data in packages:
        assert all(row.contiguous().numpy().tobytes() in data for row in whole)


def plan_of(folder: Path) -> Plan:
    return Plan.from_json((folder / "plan.json").read_text())


def test_packages_and_patches_have_the_shapes_of_the_plan(
    flat: Files, plain: tuple[Tap, list[Any], Path]
) -> None:
    tap, _, folder = plain
    fm, plan = fm_tensors(flat), plan_of(folder)
    names = PatchedWeights(plan)
    package = next(e.parts["package"] for _, e in tap.envelopes("down") if "package" in e.parts)
    weights = Package.from_bytes(package).weights
    for name, t in weights.items():
        if name in fm:
            assert t.numel() <= fm[name].numel()
    for block in plan.pruned:
        kept = len(plan.blocks[block].kept)
        assert weights[names.name(block, "in0.weight")].shape[0] == kept < plan.fm_neurons
        assert weights[names.name(block, "out.weight")].shape[1] == kept
    patches = [p for _, e in tap.envelopes("down") if e.kind == "train" for p in opened(e).patches]
    assert patches
    for patch in patches:
        assert {b for b in patch.decoded()} == set(plan.pruned)
        for block, (index, parts) in patch.decoded().items():
            assert int(index.max()) < len(plan.blocks[block].kept)
            for part, t in parts.items():
                axis = FFN.neuron_axis(part)
                assert axis is None or t.shape[axis] == len(index)


def opened(envelope: Envelope) -> TrainRequest:
    message = open_envelope(envelope)
    assert isinstance(message, TrainRequest)
    return message


def test_no_message_holds_a_sample_a_path_or_a_pickle(
    flat: Files, plain: tuple[Tap, list[Any], Path]
) -> None:
    tap, _, folder = plain
    texts = [t.encode() for t, _ in tiny.sentences(240, 0) + tiny.sentences(90, 1)]
    texts = [t for t in texts if t.count(b" ") >= 2]
    assert len(texts) > 200
    owner = str(flat["model.name"])
    names = [owner, Path(owner).parent.name, str(folder), "test.csv", "train.csv"]
    for _, envelope in tap.envelopes():
        blobs = [envelope.head.encode(), *envelope.parts.values()]
        if "package" in envelope.parts:
            package = Package.from_bytes(envelope.parts["package"])
            blobs += [package.meta.to_json().encode(), *package.files.values()]
        for blob in blobs:
            assert not any(t in blob for t in texts)
            assert not any(n.encode() in blob for n in names)
            assert not blob.startswith((b"\x80", b"PK", b"\x93NUMPY")) and not is_pickle(blob)
        assert isinstance(json.loads(envelope.head), dict)


def is_pickle(data: bytes) -> bool:
    try:
        return bool(list(pickletools.genops(data)))
    except Exception:
        return False


def test_clients_send_adapters_and_counts_only(plain: tuple[Tap, list[Any], Path]) -> None:
    tap, _, _ = plain
    kinds = {e.kind: set(e.parts) for _, e in tap.envelopes("up")}
    assert set(kinds) == {"hello-reply", "train-reply"}
    for _, e in tap.envelopes("up"):
        assert set(e.parts) <= {"adapter", "counts"}
        for name in codec.unpack(e.parts["adapter"]) if "adapter" in e.parts else ():
            # All scales of int8 travel as one.
            assert ".lora_" in name or name.startswith(("classifier.", "bert.pooler.", "//scale"))


# --- order, disks and formats -------------------------------------------------------------


def test_any_order_and_any_lost_disk_gives_the_same_bits(
    flat: Files, plain: tuple[Tap, list[Any], Path], tmp_path: Path
) -> None:
    """Shuffled replies, a wiped store, flipped bytes: only the traffic shows it."""
    _, events, folder = plain
    tap = Tap(flat, rng=random.Random(1))
    chance = random.Random(2)
    done = []

    def disturb(node: int, envelope: Envelope) -> None:
        store = Store(tmp_path / "clients")
        if envelope.kind != "train" or not store.digests() or chance.random() < 0.5:
            return
        if chance.random() < 0.6:
            shutil.rmtree(store.root)
            done.append("wiped")
            return
        for path in chance.sample(sorted((store.root / "tensors").iterdir()), 3):
            path.write_bytes(corrupt.flip(path.read_bytes(), path.stat().st_size - 1, 1))
            done.append("flipped")
        if chance.random() < 0.5:
            for cache in tap.federation.caches.values():
                cache.models.clear()  # as after a restart of the node

    tap.before = disturb
    _, disturbed = go(flat, tmp_path, tap)
    assert {"wiped", "flipped"} <= set(done)
    assert end(tmp_path) == end(folder)
    assert metrics(disturbed) == metrics(events)
    statuses = Counter(e["status"] for e in disturbed if e["event"] == "reply")
    assert statuses["need"] >= 2 and set(statuses) == {"ok", "need"}


def test_a_run_stopped_and_resumed_ends_with_the_same_bits(
    flat: Files, plain: tuple[Tap, list[Any], Path], tmp_path: Path
) -> None:
    from fedpft_core.errors import RunError

    _, events, folder = plain
    with pytest.raises(RunError, match="stopped after round 3"):
        go(flat, tmp_path, run__stop_after=3)
    _, resumed = go(flat, tmp_path, run__resume=True)
    assert end(tmp_path) == end(folder)
    assert metrics(resumed) == metrics(events)


def test_a_corrupt_newest_checkpoint_costs_a_round_and_no_bit(
    flat: Files, plain: tuple[Tap, list[Any], Path], tmp_path: Path
) -> None:
    from fedpft_core.errors import RunError

    _, events, folder = plain
    with pytest.raises(RunError, match="stopped after round 4"):
        go(flat, tmp_path, run__stop_after=4)
    newest = sorted((tmp_path / "checkpoints").glob("round-*"))[-1] / "adapter.safetensors"
    newest.write_bytes(corrupt.flip(newest.read_bytes(), 300, 0))
    _, resumed = go(flat, tmp_path, run__resume=True)
    assert [e["resumed_from"] for e in resumed if e["event"] == "run_started"] == [None, 3]
    assert end(tmp_path) == end(folder)
    assert metrics(resumed) == metrics(events)


@pytest.mark.parametrize(
    ("down", "up"), [("bf16", "same"), ("fp16", "same"), ("int8", "same"), ("fp32", "ternary")]
)
def test_every_format_runs_and_costs_what_its_layout_says(
    flat: Files, tmp_path: Path, down: str, up: str
) -> None:
    tap, events = go(
        flat, tmp_path, wire__adapter=down, wire__adapter_up=up, federation__rounds=2,
        align__interval=1, wire__patch="bf16" if down == "bf16" else "fp32", distill__steps=2,
    )  # fmt: skip
    assert {e["status"] for e in events if e["event"] == "reply"} == {"ok"}
    for way, fmt in (("down", down), ("up", down if up == "same" else up)):
        for _, e in tap.envelopes(way):
            if "adapter" in e.parts:
                size = sum(
                    t.numel() * t.element_size() for t in codec.unpack(e.parts["adapter"]).values()
                )
                base = {k: t for k, t in adapter_shapes(tap).items()}
                assert size == codec.layout_bytes(codec.update_layout(base, fmt))


def adapter_shapes(tap: Tap) -> dict[str, Tensor]:
    """The adapter's tensors as first sent, in float32."""
    first = next(e for _, e in tap.envelopes("down") if e.kind == "train")
    request = opened(first)
    return {k: torch.zeros(t.shape) for k, t in codec.decode(request.adapter, request.fmt).items()}
