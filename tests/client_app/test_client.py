"""One client with a tiny model: what it does with packages, patches, disks and memory."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import corrupt
import fabricate
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from client_app import chain, client, rowcache
from client_app.client import Client
from client_app.node import client_for
from client_app.process import Held, ProcessCache
from client_app.rows import key_of
from client_app.store import Store
from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.errors import UserError
from fedpft_core.model.families import family_of
from fedpft_core.model.names import PatchedWeights
from fedpft_core.model.plan import pruned_ffns
from fedpft_core.proxy.build import build
from fedpft_core.proxy.package import make_package
from fedpft_core.proxy.patch import make_patch
from fedpft_core.task import row
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.manifest import Manifest
from fedpft_core.wire.messages import (
    Hello,
    HelloReply,
    Message,
    NeedReply,
    RefusalReply,
    TrainReply,
    TrainRequest,
)
from fedpft_core.wire.package import Package, Patch
from fedpft_core.wire.parcel import Parcel

RUN = "0123456789abcdef"
SETTINGS = LocalSettings(1e-2, 4, 1, 3, 0.0, 1.0, 1)


@dataclass
class Server:
    """Three versions of one sub-FM, the patches between them, and the adapter."""

    packages: list[Package]
    patches: list[Patch]
    adapter: dict[str, Tensor]

    @property
    def digests(self) -> list[str]:
        return [p.digest() for p in self.packages]

    def request(self, version: int, round: int = 1, **changes: Any) -> TrainRequest:
        return TrainRequest(
            round=round,
            digest=self.digests[version],
            adapter=self.adapter,
            fmt="fp32",
            settings=SETTINGS,
            seed=0,
            run=RUN,
            **changes,
        )

    def whole(self, version: int, **changes: Any) -> TrainRequest:
        return self.request(version, package=self.packages[version].to_bytes(), **changes)


@pytest.fixture(scope="module")
def server() -> Server:
    fm = tiny.model("bert")
    plan = tiny.plan_for(fm, keep_share=0.5)
    proxy = build(fm, plan)
    spec = adapters.make_spec(
        family_of("bert"), plan, (), config.LoraConfig(rank=2, alpha=4.0, dropout=0.1)
    )
    packages = [make_package(proxy, plan, spec, tiny.tokenizer("bert"), "text", tiny.LABELS, 16)]
    packages[0] = replace(
        packages[0], weights={k: t.clone() for k, t in packages[0].weights.items()}
    )
    digests = {k: tensor_digest(t) for k, t in packages[0].weights.items()}
    proxy = adapters.attach(proxy, spec, plan)
    patches = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for ffn in pruned_ffns(proxy, plan).values():
            for p in ffn.parts().values():
                p.data.add_(0.01 * torch.randn(p.shape, generator=generator))
        chosen = {b: torch.arange(len(plan.blocks[b].kept)) for b in plan.pruned}
        patch, package = make_patch(proxy, plan, chosen, packages[-1], digests, "fp32")
        patches.append(patch)
        packages.append(package)
    return Server(packages, patches, tiny.random_adapter(proxy, plan))


Make = Callable[[], Client]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A client of one node; each call is a new process of it, with nothing in memory."""
    rows = tiny.examples("bert", 10)
    return lambda: Client(
        "edge-1",
        lambda: (10, 0),
        lambda task: rows,
        Store(tmp_path / "store"),
        cache=ProcessCache(),
    )


def ask(node: Client, message: Message | Envelope) -> Any:
    envelope = message if isinstance(message, Envelope) else seal(message)
    return open_envelope(node.handle(envelope))


def trained(node: Client, message: Message) -> TrainReply:
    reply = ask(node, message)
    assert isinstance(reply, TrainReply), reply
    return reply


def same(a: TrainReply, b: TrainReply) -> bool:
    return (a.digest, a.loss, codec.pack(a.adapter)) == (b.digest, b.loss, codec.pack(b.adapter))


@pytest.fixture
def never_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("it trained")

    monkeypatch.setattr(chain, "fine_tune", fail)


# --- who it is ----------------------------------------------------------------------------


def test_it_says_who_it_is_and_what_it_has(server: Server, make: Make) -> None:
    node = make()
    hello = ask(node, Hello())
    assert isinstance(hello, HelloReply)
    assert (hello.name, hello.examples, hello.have) == ("edge-1", 10, ())
    trained(node, server.whole(0))
    assert ask(node, Hello()).have == (server.digests[0],)
    node.shared_store = True  # in a simulation the disk also holds what others were sent
    assert ask(node, Hello()).have == ()


def test_messages_no_client_can_answer_are_refused(make: Make) -> None:
    for message in (NeedReply("x", "0" * 64), RefusalReply("x", "y")):
        assert "cannot answer" in ask(make(), message).reason
    damaged = replace(seal(Hello()), head="{}")
    assert "damaged" in ask(make(), damaged).reason


def test_a_user_error_comes_back_as_one_sentence(server: Server, make: Make) -> None:
    node = make()

    def no_rows(task: Any) -> Any:
        raise UserError(f"train.csv: row 3: label 'x' is none of {task.labels}" + "." * 5000)

    node.load_rows = no_rows
    reply = ask(node, server.whole(0))
    assert isinstance(reply, RefusalReply) and reply.name == "edge-1"
    assert "train.csv" not in reply.reason and "own log" in reply.reason
    node.own_rows = False  # of a simulation everything is the run's
    reply = ask(node, server.whole(0))
    assert reply.reason.startswith("train.csv: row 3") and len(reply.reason) <= 1000


# --- packages and patches -----------------------------------------------------------------


def test_first_contact_then_adapter_only(server: Server, make: Make) -> None:
    node = make()
    first = trained(node, server.whole(0))
    assert first.digest == server.digests[0] and first.examples == 10 and first.steps == 3
    assert node.store.digests() == (server.digests[0],)
    # From memory, and in a new process from disk: the same bits.
    assert same(trained(node, server.request(0)), first)
    assert same(trained(make(), server.request(0)), first)


def test_patches_give_the_same_bits_as_the_whole_package(
    server: Server, make: Make, tmp_path: Path
) -> None:
    want = [trained(make(), server.whole(v)) for v in range(3)]
    assert len({codec.pack(r.adapter) for r in want}) == 3
    shutil.rmtree(tmp_path / "store")
    trained(make(), server.whole(0))
    one = trained(make(), server.request(1, patches=(server.patches[0],)))
    assert same(one, want[1])
    two = trained(make(), server.request(2, patches=(server.patches[1],)))
    assert same(two, want[2])
    shutil.rmtree(tmp_path / "store")
    trained(make(), server.whole(0))
    chain = trained(make(), server.request(2, patches=tuple(server.patches)))
    assert same(chain, want[2])
    # A chain that starts before what the client has is entered where it can be.
    shutil.rmtree(tmp_path / "store")
    trained(make(), server.whole(1))
    assert same(trained(make(), server.request(2, patches=tuple(server.patches))), want[2])


@pytest.mark.usefixtures("never_trains")
def test_without_the_weights_it_asks_for_them(server: Server, make: Make) -> None:
    for message in (server.request(0), server.request(1, patches=(server.patches[0],))):
        reply = ask(make(), message)
        assert isinstance(reply, NeedReply)
        assert (reply.name, reply.digest, reply.have) == ("edge-1", message.digest, ())


@pytest.mark.parametrize("fresh", [True, False], ids=["new process", "model in memory"])
def test_a_disk_wiped_between_rounds(
    server: Server, make: Make, tmp_path: Path, fresh: bool
) -> None:
    node = make()
    first = trained(node, server.whole(0))
    shutil.rmtree(tmp_path / "store")
    node = make() if fresh else node
    assert isinstance(ask(node, server.request(0)), NeedReply)
    assert same(trained(node, server.whole(0)), first)
    assert node.store.digests() == (server.digests[0],)


def flipped(node: Client, digest: str, name: str) -> str:
    """Damage one tensor of a sub-FM on the disk; its digest."""
    manifest = Manifest.from_bytes(node.store.path(digest).read_bytes())
    found = manifest.weights[name].digest
    path = node.store.tensor(found)
    path.write_bytes(corrupt.flip(path.read_bytes(), path.stat().st_size - 1, 3))
    return found


def parcel(server: Server, version: int) -> Parcel:
    package = server.packages[version]
    return Parcel.of(package.manifest(), package.files, package.weights)


def test_a_byte_flipped_on_disk_costs_one_tensor(server: Server, make: Make) -> None:
    first = trained(make(), server.whole(0))
    node = make()
    name = next(k for k in server.packages[0].weights if k.endswith("word_embeddings.weight"))
    lost = flipped(node, server.digests[0], name)
    reply = ask(node, server.request(0))
    assert isinstance(reply, NeedReply) and reply.lacks == (lost,)
    assert node.store.digests() == ()
    part = parcel(server, 0).only([lost])
    assert part.size < parcel(server, 0).size / 2
    mended = trained(node, server.request(0, package=part.to_bytes()))
    assert same(mended, first)
    assert same(trained(make(), server.request(0)), first)


def test_a_manifest_alone_makes_it_say_what_it_lacks(server: Server, make: Make) -> None:
    """With nothing on the disk all of it; with another version what that one does not have."""
    every = parcel(server, 1)
    asked = server.request(1, package=every.only(()).to_bytes())
    reply = ask(make(), asked)
    assert isinstance(reply, NeedReply) and set(reply.lacks) == every.manifest.contents
    trained(make(), server.whole(0))
    reply = ask(make(), asked)
    other = parcel(server, 0).manifest.contents
    assert set(reply.lacks) == every.manifest.contents - other and reply.have == (
        server.digests[0],
    )
    part = every.only(reply.lacks)
    assert part.size < every.size / 2, "embeddings are on the disk"
    got = trained(make(), server.request(1, package=part.to_bytes()))
    assert got.digest == server.digests[1]


def test_a_package_in_parts_goes_on_where_it_stopped(server: Server, make: Make) -> None:
    want = trained(make(), server.whole(0))
    shutil.rmtree(make().store.root)
    whole, lacks, sent = parcel(server, 0), None, 0
    for _ in range(100):
        part = whole.only(whole.manifest.contents if lacks is None else lacks, whole.size // 5)
        sent += part.size
        reply = ask(make(), server.request(0, package=part.to_bytes()))
        if isinstance(reply, TrainReply):
            break
        assert isinstance(reply, NeedReply)
        assert lacks is None or set(reply.lacks) < set(lacks)
        lacks = reply.lacks
    assert same(reply, want) and sent == whole.size


def test_parts_that_the_disk_cannot_take_are_refused_in_a_sentence(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedpft_core.disk.whole.write", full)
    whole = parcel(server, 0)
    part = whole.only(whole.manifest.contents, whole.size // 3)
    reply = ask(make(), server.request(0, package=part.to_bytes()))
    assert isinstance(reply, RefusalReply) and "store is full" in reply.reason
    assert trained(make(), server.whole(0)).digest == server.digests[0]  # from memory


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "int8"])
def test_a_patch_in_any_format_leads_to_the_same_bits(server: Server, make: Make, fmt: str) -> None:
    """What the server holds after rounding is what a client comes to, by patch and whole."""
    fm = tiny.model("bert")
    plan = tiny.plan_for(fm, keep_share=0.5)
    proxy = build(fm, plan)
    spec = server.packages[0].meta.adapter
    pack = partial(
        make_package, proxy, plan, spec, tiny.tokenizer("bert"), "text", tiny.LABELS, 16, fmt
    )
    before = pack()
    assert pack().digest() == before.digest(), "rounding once more changes something"
    assert before.digest() != server.digests[0]
    assert tiny.same_bits({k: proxy.state_dict()[k] for k in before.weights}, before.weights)
    digests = {k: tensor_digest(t) for k, t in before.weights.items()}
    for ffn in pruned_ffns(proxy, plan).values():
        for p in ffn.parts().values():
            p.data.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    chosen = {b: torch.arange(0, len(plan.blocks[b].kept), 2) for b in plan.pruned}
    moved = {b: i for b, i in chosen.items()}
    for block, ffn in pruned_ffns(proxy, plan).items():  # only these have moved
        rest = torch.tensor([i for i in range(ffn.neurons) if i not in moved[block].tolist()])
        names = PatchedWeights(plan)
        for part, p in ffn.parts().items():
            axis = ffn.neuron_axis(part)
            if axis is not None:
                old = before.weights[names.name(block, part)].index_select(axis, rest)
                p.data.index_copy_(axis, rest, old)
    patch, after = make_patch(proxy, plan, chosen, before, digests, fmt)
    assert tiny.same_bits({k: proxy.state_dict()[k] for k in after.weights}, after.weights)
    assert pack().digest() == after.digest(), "a patch and a package round differently"
    sizes = {p: Parcel.of(x.manifest(), x.files, x.weights).size
             for p, x in (("before", before), ("after", after))}  # fmt: skip
    assert sizes["after"] == sizes["before"], "after a patch tensors fit into no small form"
    other = replace(server, packages=[before, after], patches=[patch])
    trained(make(), other.whole(0))
    one = trained(make(), other.request(1, patches=(Patch(
        patch.source, patch.target, patch.fmt, codec.unpack(patch.to_bytes())
    ),)))  # fmt: skip
    shutil.rmtree(make().store.root)
    assert same(trained(make(), other.whole(1)), one)


def test_the_source_of_a_patch_flipped_on_disk(server: Server, make: Make) -> None:
    trained(make(), server.whole(0))
    node = make()
    flipped(node, server.digests[0], sorted(server.packages[0].weights)[0])
    reply = ask(node, server.request(1, patches=(server.patches[0],)))
    assert isinstance(reply, NeedReply) and reply.have == () and reply.lacks is None


@pytest.mark.usefixtures("never_trains")
def test_a_tampered_package_is_refused(server: Server, make: Make) -> None:
    node, good = make(), server.whole(0)
    rng = random.Random(0)
    for at in [9, 200, *(rng.randrange(len(good.package)) for _ in range(30))]:
        bad = replace(good, package=corrupt.flip(good.package, at, rng.randrange(8)))
        reply = ask(node, bad)
        assert isinstance(reply, RefusalReply), at
    other = replace(good, package=server.packages[1].to_bytes())
    assert "does not have the digest" in ask(node, other).reason
    assert node.store.digests() == () and not node.cache.models


def test_a_tampered_patch_is_refused(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(make(), server.whole(0))
    monkeypatch.setattr(chain, "fine_tune", lambda *_: pytest.fail("it trained"))
    patch, later = server.patches
    name = next(k for k in patch.tensors if k.endswith("in0.weight"))
    nudged = patch.tensors[name].clone()
    nudged[0, 0] += 1e-3
    bad = [
        (1, (replace(patch, tensors=patch.tensors | {name: nudged}),)),
        (1, (replace(patch, tensors={k: t for k, t in patch.tensors.items() if k != name}),)),
        (1, (replace(patch, fmt="bf16"),)),
        (1, (replace(patch, fmt="zip"),)),
        (2, (patch,)),  # does not lead to what is to be trained on
        (2, (replace(patch, target=server.digests[2]),)),
        (2, (patch, replace(later, target=server.digests[1]))),
        (1, (replace(patch, source="../../etc"),)),
    ]
    for version, patches in bad:
        node = make()
        reply = ask(node, server.request(version, patches=patches))
        assert isinstance(reply, RefusalReply), (version, reply)
        assert node.store.digests() == (server.digests[0],)
        assert not node.cache.models


def test_adapters_and_formats_that_do_not_fit_are_refused(server: Server, make: Make) -> None:
    node, good = make(), server.whole(0)
    name = sorted(good.adapter)[0]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"adapter": {k: t for k, t in good.adapter.items() if k != name}}, "names differ"),
        ({"adapter": good.adapter | {name: torch.zeros(1)}}, "shape"),
        ({"fmt": "bf16"}, "not the agreed bf16"),
        ({"fmt": "zip"}, "unknown format"),
        ({"reply_fmt": "zip"}, "unknown format"),
        ({"reply_fmt": "ternary", "run": "../.."}, "not a run"),
        ({"reply_fmt": "ternary", "run": ""}, "not a run"),
    ]
    for changes, reason in bad:
        reply = ask(node, replace(good, **changes))
        assert isinstance(reply, RefusalReply) and reason in reply.reason, changes
    trained(node, good)


def test_a_package_that_is_no_model_is_refused(server: Server, make: Make) -> None:
    good = server.packages[0]
    meta = json.loads(good.meta.to_json())
    plan = json.loads(json.dumps(meta["plan"]))
    plan["blocks"][1]["kept"] = plan["blocks"][1]["kept"][:-1]
    metas = [
        "{",
        "[]",
        json.dumps({k: v for k, v in meta.items() if k != "adapter"}),
        json.dumps(meta | {"plan": {}}),
        json.dumps(meta | {"plan": plan}, sort_keys=True),
        json.dumps(meta | {"model_config": {"model_type": "nothing"}}),
        json.dumps(meta | {"labels": 3}),
    ]
    for text in metas:
        digest, blob = fabricate.with_metadata(good, text)
        request = replace(server.request(0), digest=digest, package=blob)
        assert isinstance(ask(make(), request), RefusalReply), text[:100]


# --- disks --------------------------------------------------------------------------------


def test_with_a_full_disk_it_trains_from_memory_and_is_served_again(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want = trained(make(), server.whole(0))
    node = make()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "put", full)
    reply = trained(node, server.whole(1))
    assert reply.digest == server.digests[1]
    assert "No space left" in caplog.text
    assert isinstance(ask(node, server.request(1)), NeedReply)
    assert same(trained(node, server.whole(1)), reply)
    # What was on the disk before is still there.
    assert same(trained(make(), server.request(0)), want)


def test_an_eviction_while_the_model_is_in_use_does_no_harm(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = trained(make(), server.whole(0))
    node = make()
    load = client.rebuild

    def evicted(package: Package, base: str) -> Any:
        shutil.rmtree(node.store.root)
        return load(package, base)

    monkeypatch.setattr(client, "rebuild", evicted)
    assert same(trained(node, server.request(0)), want)


def test_a_bounded_store_still_serves_every_version(server: Server, make: Make) -> None:
    node = make()
    node.store.keep = 1
    want = [trained(node, server.whole(v)) for v in range(3)]
    assert node.store.digests() == (server.digests[2],)
    assert isinstance(ask(make(), server.request(0)), NeedReply)
    assert same(trained(node, server.whole(0)), want[0])


# --- ternary ------------------------------------------------------------------------------


def ternary(server: Server, round: int, adapter: dict[str, Tensor] | None = None) -> TrainRequest:
    request = replace(server.whole(0, round=round), reply_fmt="ternary")
    return replace(request, adapter=adapter or server.adapter)


def test_error_feedback_lasts_over_rounds_and_processes(
    server: Server, make: Make, tmp_path: Path
) -> None:
    exact = trained(make(), replace(server.whole(0, round=1)))
    first = trained(make(), ternary(server, 1))
    assert first.fmt == "ternary"
    arrived = codec.decode_update(first.adapter, server.adapter, "ternary")
    second = trained(make(), ternary(server, 2, arrived))
    # Written out: the second update is the second change plus what the first left behind.
    left = {k: exact.adapter[k] - arrived[k] for k in arrived}
    plain = replace(ternary(server, 2, arrived), reply_fmt="")
    new = trained(make(), plain)
    want, _ = codec.encode_update(new.adapter, arrived, left, "ternary")
    got = codec.decode_update(second.adapter, arrived, "ternary")
    wanted = codec.decode_update(want, arrived, "ternary")
    assert all(torch.allclose(got[k], wanted[k], atol=1e-6) for k in got)
    # A round asked for again starts from the same residual; another run from none.
    assert same(trained(make(), ternary(server, 2, arrived)), second)
    other = replace(ternary(server, 2, arrived), run="f" * 16)
    forgotten = trained(make(), other)
    assert not same(forgotten, second)
    # Lost on disk: as if there had been none.
    shutil.rmtree(tmp_path / "store" / "residuals")
    assert same(trained(make(), ternary(server, 2, arrived)), forgotten)
    assert set(make().store.digests()) == {server.digests[0]}


def test_a_residual_of_another_adapter_is_not_used(server: Server, make: Make) -> None:
    want = trained(make(), ternary(server, 1))
    kept = client.Residuals(make().store.root / "residuals")
    for odd in ({"x": torch.ones(1)}, {k: torch.ones(1) for k in server.adapter}):
        kept.put("a" * 16, "edge-1", 1, odd)
        other = replace(ternary(server, 2), run="a" * 16)
        assert isinstance(ask(make(), other), TrainReply)
    assert same(trained(make(), ternary(server, 1)), want)


def test_a_diverged_round_leaves_no_residual(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = adapters.read
    monkeypatch.setattr(
        chain.adapters, "read", lambda *a: {k: t * float("nan") for k, t in read(*a).items()}
    )
    reply = trained(make(), ternary(server, 1))
    monkeypatch.undo()
    assert any(bool(t.isnan().any()) for t in reply.adapter.values() if t.is_floating_point())
    assert not list(make().store.root.rglob("round-*"))


def test_a_residual_that_cannot_be_kept_does_not_stop_the_round(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(client.Residuals, "put", full)
    assert isinstance(ask(make(), ternary(server, 1)), TrainReply)
    assert "residual not kept" in caplog.text


# --- rows kept on disk --------------------------------------------------------------------


@pytest.fixture
def edge(tmp_path: Path) -> Callable[..., Client]:
    """A node with a data file; each call is a new process of it."""
    tiny.write_csv(tmp_path / "rows.csv", tiny.sentences(60))

    def start(**more: Any) -> Client:
        keys = {"name": "a", "data-path": str(tmp_path / "rows.csv"), "cache-dir": str(tmp_path)}
        keys |= {"keep-rows": 1}
        node = client_for(keys | more, {})
        node.cache = ProcessCache()
        return node

    return start


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is encoded from now on."""
    calls: list[int] = []
    encode = row.encode

    def counted(examples: Any, *more: Any) -> Any:
        calls.append(len(examples))
        return encode(examples, *more)

    monkeypatch.setattr(row, "encode", counted)
    return calls


Edge = Callable[..., Client]


def test_a_new_process_finds_its_rows_encoded(
    server: Server, edge: Edge, tokenised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(edge(), server.whole(0))
    assert tokenised == [60]
    node = edge()
    monkeypatch.setattr("client_app.rows.from_files", lambda *_: pytest.fail("tokenizer loaded"))
    node.load_rows = lambda task: pytest.fail("data file parsed")
    assert same(trained(node, server.request(0)), first)
    assert tokenised == [60]
    # Another version of the sub-FM reads the same rows in the same way.
    trained(edge(), server.whole(1))
    assert tokenised == [60]


def test_rows_are_encoded_anew_when_anything_they_depend_on_changes(
    server: Server, edge: Edge, tokenised: list[int], tmp_path: Path
) -> None:
    trained(edge(), server.whole(0))
    path = tmp_path / "rows.csv"
    stat = path.stat()
    # Same size, same time, one word else: only the content tells.
    old = path.read_bytes()
    new = old.replace(b"the ", b"old ", 1)
    assert new != old
    path.write_bytes(new)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    trained(edge(), server.request(0))
    assert len(tokenised) == 2
    path.write_bytes(old)
    trained(edge(), server.request(0))
    assert len(tokenised) == 2  # as at first, and that is still here
    good = server.packages[0]
    meta = good.meta
    known = key_of(replace_model(server, good), edge().rows_digest())
    assert edge().kept_rows.path(known).exists()
    for change in (
        replace(meta, max_length=6), replace(meta, labels=(*meta.labels, "more")),
    ):  # fmt: skip
        package = replace(good, meta=change)
        key = key_of(replace_model(server, package), edge().rows_digest())
        assert not edge().kept_rows.path(key).exists(), change
    with_column = edge(**{"label-column": "text"})
    assert with_column.rows_digest() != edge().rows_digest()


def replace_model(server: Server, package: Package) -> Any:
    meta = package.meta

    class Model:
        task, max_length = meta.task, meta.max_length

    return Held(Model(), package.files, client.combine_digest("", package.files, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["flipped", "cut", "foreign", "another key", "folder"])
def test_kept_rows_that_are_of_no_use_are_made_again(
    server: Server, edge: Edge, tokenised: list[int], tmp_path: Path, how: str
) -> None:
    first = trained(edge(), server.whole(0))
    (path,) = (tmp_path / "rows").glob("*.safetensors")
    data = path.read_bytes()
    if how == "flipped":
        # In the last tensor: the first token of a row.
        path.write_bytes(corrupt.flip(data, len(data) - 8, 0))
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "foreign":
        path.write_bytes(codec.pack({"ids": torch.zeros(3, dtype=torch.int32)}))
    elif how == "another key":
        other = rowcache.RowCache(tmp_path / "other")
        other.put("0" * 64, tiny.encoded("bert", 60), np.zeros(60, np.int64))
        path.write_bytes(other.path("0" * 64).read_bytes())
    else:
        path.unlink()
        path.mkdir()
    assert same(trained(edge(), server.request(0)), first)
    assert tokenised == [60, 60]
    if how != "folder":
        assert same(trained(edge(), server.request(0)), first)
        assert tokenised == [60, 60]


def test_rows_read_while_the_file_changes_are_not_kept(
    server: Server, edge: Edge, tmp_path: Path
) -> None:
    node = edge()
    load = node.load_rows

    def changing(task: Any) -> Any:
        with open(tmp_path / "rows.csv", "a") as file:
            file.write("the cat,animal\n")
        return load(task)

    node.load_rows = changing
    assert trained(node, server.whole(0)).examples == 61
    assert not list((tmp_path / "rows").glob("*"))


def test_a_full_disk_costs_only_the_time(
    server: Server, edge: Edge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    want = trained(edge(), server.whole(0))
    shutil.rmtree(edge().kept_rows.root)
    monkeypatch.setattr(rowcache.RowCache, "put", full)
    assert same(trained(edge(), server.request(0)), want)
    assert "encoded rows not kept" in caplog.text


# --- rows kept from training --------------------------------------------------------------


def test_a_share_of_the_rows_is_validated_on_and_never_trained_on(
    server: Server, edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    fine_tune, evaluate = chain.fine_tune, chain.evaluate

    def tuned(model: Any, task: Any, rows: Any, *more: Any) -> Any:
        seen["train"] = rows
        return fine_tune(model, task, rows, *more)

    def scored(model: Any, task: Any, rows: Any, *more: Any) -> Any:
        seen["validation"], seen["adapter"] = rows, adapters.read(model)
        return evaluate(model, task, rows, *more)

    monkeypatch.setattr(chain, "fine_tune", tuned)
    monkeypatch.setattr(chain, "evaluate", scored)
    share = {"validation-share": 0.25}
    hello = ask(edge(**share), Hello())
    reply = trained(edge(**share), server.whole(0))
    assert (hello.examples, hello.validation) == (reply.examples, reply.validation_rows)
    assert hello.examples + hello.validation == 60 and 5 <= hello.validation <= 25
    # Scored with the adapter received, before it is trained.
    assert all(torch.equal(seen["adapter"][k], t) for k, t in server.adapter.items())
    texts = {part: rows_of(seen[part]) for part in ("train", "validation")}
    assert not texts["train"] & texts["validation"]
    assert texts["train"] | texts["validation"] == rows_of(tiny.encoded("bert", 60))
    assert 0 <= reply.validation_sums["correct"] <= reply.validation_rows
    assert reply.validation_sums["rows"] == reply.validation_rows
    # By hand: right answers of the model with that adapter.
    held = edge(**share)._held(server.request(0))
    assert held is not None
    adapters.load(held.model.model, server.adapter, held.model.plan)
    right = 0
    rows = seen["validation"]
    for i in range(len(rows)):
        ids = rows.ids[rows.offsets[i] : rows.offsets[i + 1]].long()[None]
        with torch.no_grad():
            right += int(held.model.model(input_ids=ids).logits.argmax() == rows.labels[i])
    assert right == reply.validation_sums["correct"]
    # Nothing said of them where there are none.
    plain = trained(edge(), server.request(0))
    assert (plain.validation_rows, plain.validation_sums, plain.examples) == (0, {}, 60)


def test_of_its_validation_rows_a_client_sends_three_sums_and_nothing_by_class(
    server: Server, edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    evaluate = chain.evaluate

    def scored(*args: Any) -> Any:
        made.append(evaluate(*args))
        return made[-1]

    monkeypatch.setattr(chain, "evaluate", scored)
    reply = trained(edge(**{"validation-share": 0.25}), server.whole(0))
    assert reply.validation_sums.keys() == {"rows", "correct", "loss"}
    # There was more to keep back: the client's own score has the figures of every class.
    assert made[0].more and len(made[0].sums) > 3
    assert all(made[0].sums[name] == value for name, value in reply.validation_sums.items())


def rows_of(encoded: Any) -> set[tuple[int, ...]]:
    bounds = zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True)
    return {tuple(encoded.ids[a:b].tolist()) for a, b in bounds}


def test_which_rows_validate_depends_on_the_rows_alone(edge: Edge, tmp_path: Path) -> None:
    rows = tiny.examples("bert", 300)
    folds = rowcache.folds_of(rows)
    out = rowcache.held_out(folds, 0.2)
    assert 0.1 < out.mean() < 0.3
    # Rows that come, go or move leave the others where they are, and equal rows stay together.
    order = np.random.default_rng(0).permutation(300)[:200]
    assert np.array_equal(rowcache.folds_of(rows.select(order)), folds[order])
    more = rowcache.held_out(folds, 0.5)
    assert (more | ~out).all()
    assert not rowcache.held_out(folds, 0.0).any()
    by_text: dict[Any, set[bool]] = {}
    for text, kept in zip(rows.inputs, out, strict=True):
        by_text.setdefault(text, set()).add(bool(kept))
    assert all(len(kinds) == 1 for kinds in by_text.values())


def test_a_share_that_leaves_nothing_to_train_on_is_refused(
    server: Server, edge: Edge, tmp_path: Path
) -> None:
    tiny.write_csv(tmp_path / "rows.csv", [("the cat", "animal")] * 20)
    (fold,) = set(rowcache.folds_of(client_rows(edge())).tolist())
    share = min(0.9, fold / 2**62 + 0.01)
    tiny.write_csv(tmp_path / "rows.csv", [("the cat", "animal")] * 20)
    reply = ask(edge(**{"validation-share": share}), server.whole(0))
    assert isinstance(reply, RefusalReply) and "leaves none of its 20 rows" in reply.reason


def client_rows(node: Client) -> Any:
    return node.load_rows(tiny.TASK)


@pytest.mark.parametrize("share", [-0.1, 0.95, 1.0, float("nan")])
def test_a_share_out_of_range_is_named(edge: Edge, share: float) -> None:
    with pytest.raises(UserError, match="validation-share"):
        edge(**{"validation-share": share})
    with pytest.raises(UserError, match="validation-share expects float"):
        edge(**{"validation-share": "0.1"})
