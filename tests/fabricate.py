"""A federation without models or network: state, nodes and transports made by hand.

Weights, adapters and replies are drawn from seeds; a node "trains" by adding noise that depends
on its name and the round. So a round takes milliseconds and every order of events can be tried.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpft_core import config as configs
from fedpft_core.adapter.lora import AdapterSpec
from fedpft_core.config import Config
from fedpft_core.model.names import PatchedWeights, is_trained
from fedpft_core.model.plan import BlockPlan, Plan
from fedpft_core.proxy.patch import apply_patch
from fedpft_core.seeds import torch_stream
from fedpft_core.task import make
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.identity import combine_digest, tensor_digest
from fedpft_core.wire.messages import (
    Failure,
    Hello,
    HelloReply,
    Message,
    NeedReply,
    RefusalReply,
    TrainReply,
    TrainRequest,
)
from fedpft_core.wire.meta import PackageMeta
from fedpft_core.wire.package import Package, Patch
from fedpft_core.wire.parcel import Parcel
from fedpft_core.wire.validate import Expected
from server_app.state import State
from server_app.transport import Meanwhile, OnReply

WIDTH, CLASSES, MAX_LENGTH = 4, 3, 8
TASK = make("text", ("x", "y", "z"))
PLAN = Plan(
    "bert",
    6,
    (
        BlockPlan("whole"),
        BlockPlan("pruned", (0, 2, 3, 5)),
        BlockPlan("pruned", (1, 2, 4)),
        BlockPlan("whole"),
    ),
)
NEURON_PARTS = ("in0.weight", "in0.bias", "out.weight")
SHARED_PARTS = ("out.bias", "norm.weight", "norm.bias")


def _noise(shape: tuple[int, ...], *purpose: str | int) -> Tensor:
    return torch.randn(shape, generator=torch_stream(0, *purpose))


def adapter(seed: int = 0) -> Tensors:
    """A LoRA pair and a head of one tiny adapter."""
    query = "bert.encoder.layer.0.attention.self.query"
    shapes = {
        f"{query}.lora_A.weight": (2, WIDTH),
        f"{query}.lora_B.weight": (WIDTH, 2),
        "classifier.weight": (CLASSES, WIDTH),
        "classifier.bias": (CLASSES,),
    }
    return {k: 0.1 * _noise(shape, "adapter", seed, k) for k, shape in sorted(shapes.items())}


def package(seed: int = 0) -> Package:
    """A package whose plan has two pruned blocks; `ballast` makes it larger than a few patches."""
    names = PatchedWeights(PLAN)
    weights = {"ballast": _noise((600,), "ballast", seed)}
    for block in PLAN.pruned:
        k = len(PLAN.blocks[block].kept)
        shapes = {"in0.weight": (k, WIDTH), "in0.bias": (k,), "out.weight": (WIDTH, k)}
        shapes |= dict.fromkeys(SHARED_PARTS, (WIDTH,))
        for part, shape in shapes.items():
            weights[names.name(block, part)] = _noise(shape, "weights", seed, block, part)
    config = {"model_type": PLAN.model_type, "seed": seed}
    spec = AdapterSpec(2, 4.0, 0.0, ("bert.encoder.layer.0.attention.self.query",), ("classifier",))
    meta = PackageMeta(PLAN, spec, config, "Made", TASK.name, TASK.labels, MAX_LENGTH)
    return Package(meta, {"vocab.txt": b"a\nb\n"}, weights)


def with_metadata(given: Package, text: str) -> tuple[str, bytes]:
    """Digest and bytes of a package with this text for its metadata, whatever it says."""
    digests = {k: tensor_digest(t) for k, t in given.weights.items()}
    found = codec.unpack(given.to_bytes())
    manifest = json.loads(found["//manifest"].numpy().tobytes()) | {"meta": "@"}
    forged = json.dumps(manifest).replace('"@"', text).encode()
    found["//manifest"] = torch.tensor(list(forged), dtype=torch.uint8)
    return combine_digest(text, given.files, digests), codec.pack(found)


def state(seed: int = 0) -> State:
    """A state before round 1."""
    made = package(seed)
    digests = {k: tensor_digest(t) for k, t in made.weights.items()}
    return State(0, adapter(seed), made, digests, made.digest(), run="0" * 16)


def aligned(before: Package, seed: int, fmt: str = "fp32") -> tuple[Patch, Package]:
    """What an alignment would do to a package: a patch of some neurons, and the next package.

    Written out by hand, so that it checks `apply_patch` instead of sharing its code.
    """
    names, flat, weights = PatchedWeights(PLAN), {}, dict(before.weights)
    for block in PLAN.pruned:
        index = torch.tensor([0, 2])
        flat[f"{block}/index"] = index
        for part in NEURON_PARTS + SHARED_PARTS:
            name = names.name(block, part)
            value = weights[name].clone()
            if part in SHARED_PARTS:
                piece = _noise(tuple(value.shape), "align", seed, block, part)
            else:
                rows = value.T if part == "out.weight" else value
                piece = _noise(tuple(rows[index].shape), "align", seed, block, part)
                piece = piece.T if part == "out.weight" else piece
            piece = codec.decode(codec.encode({"x": piece}, fmt), fmt)["x"].contiguous()
            flat[f"{block}/{part}"] = piece
            if part in SHARED_PARTS:
                value = piece
            elif part == "out.weight":
                value[:, index] = piece
            else:
                value[index] = piece
            weights[name] = value
    after = Package(before.meta, before.files, weights)
    return Patch(before.digest(), after.digest(), fmt, codec.encode(flat, fmt)), after


def align(current: State, seed: int) -> None:
    """Move a state one alignment on."""
    patch, current.package = aligned(current.package, seed)
    current.digests = {k: tensor_digest(t) for k, t in current.package.weights.items()}
    current.digest = patch.target
    current.patches.append(patch)


def config(**keys: Any) -> Config:
    """A run's configuration; `federation__rounds=3` sets federation.rounds."""
    flat: dict[str, Any] = {
        "federation.clients": 10,
        "federation.clients-per-round": 3,
        "federation.min-clients": 2,
        "federation.rounds": 6,
        "federation.round-timeout": 30.0,
        "federation.node-timeout": 0.3,
        "wire.adapter": "fp32",  # what is fabricated can then be reckoned with exactly
    }
    flat |= {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
    return configs.from_flat(flat)


def counts(name: str, round: int, tokens: int) -> Tensors:
    """Inactivity counts a node could have."""
    out: Tensors = {}
    for block in PLAN.pruned:
        k = len(PLAN.blocks[block].kept)
        stream = torch_stream(0, "counts", name, round, block)
        out[f"{block}"] = torch.randint(0, tokens + 1, (k,), generator=stream)
        out[f"{block}/tokens"] = torch.tensor([tokens])
    return out


def expected(round: int = 1, fmt: str = "fp32", counted: bool = True) -> Expected:
    """What the server waits for in round `round` of a fresh state."""
    current = state()
    blocks = {b: len(PLAN.blocks[b].kept) for b in PLAN.pruned} if counted else {}
    return Expected(round, current.digest, fmt, current.adapter, 100.0, blocks, TASK, MAX_LENGTH)


def sums(right: int, rows: int) -> dict[str, float]:
    """What a client says of its held-out rows."""
    return {"rows": rows, "correct": right, "loss": 0.7 * rows} if rows or right else {}


def reply(
    want: Expected, name: str = "a", examples: int = 5, validation: tuple[int, int] = (0, 0)
) -> TrainReply:
    """A good reply to what is expected; `validation` is (right, rows)."""
    new = {k: t + 0.01 * _noise(tuple(t.shape), name, k) for k, t in want.adapter.items()}
    tensors, _ = codec.encode_update(new, want.adapter, {}, want.fmt)
    return TrainReply(
        name=name,
        round=want.round,
        digest=want.digest,
        examples=examples,
        steps=4,
        loss=0.5,
        seconds=1.25,
        adapter=tensors,
        fmt=want.fmt,
        counts=counts(name, want.round, 7 * examples) if want.count_blocks else {},
        timings={"train": 1.0},
        validation_rows=validation[1],
        validation_sums=sums(*validation),
    )


Answer = Message | Envelope | Failure


@dataclass
class Node:
    """A client made by hand. `spoil` turns a good answer to a training request into another."""

    name: str
    examples: int = 5
    spoil: Callable[[TrainReply], Answer] | None = None
    greet: Callable[[HelloReply], Answer] | None = None
    packages: dict[str, Package] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)  # by digest, as are files
    files: dict[str, bytes] = field(default_factory=dict)
    validation: tuple[int, int] = (0, 0)  # rows kept from training: right, all
    trained: list[tuple[int, str]] = field(default_factory=list)  # (round, digest)

    def answer(self, envelope: Envelope) -> Envelope | Failure:
        message = open_envelope(envelope)
        made: Answer
        if isinstance(message, Hello):
            hello = HelloReply(
                self.name, self.examples, tuple(sorted(self.packages)), "0", self.validation[1]
            )
            made = self.greet(hello) if self.greet else hello
        else:
            assert isinstance(message, TrainRequest)
            made = self._train(message)
        return made if isinstance(made, Envelope | Failure) else seal(made)

    def _train(self, request: TrainRequest) -> Answer:
        if request.package:
            parcel = Parcel.from_bytes(request.package)
            assert parcel.manifest.digest == request.digest
            self.tensors |= parcel.tensors()
            self.files |= parcel.files
            lacks = parcel.manifest.contents - self.tensors.keys() - self.files.keys()
            if lacks:
                have = tuple(sorted(self.packages))
                return NeedReply(self.name, request.digest, have, tuple(sorted(lacks)))
            got = Package.made(parcel.manifest, self.tensors, self.files)
            self.packages[got.digest()] = got
        for patch in request.patches:
            if patch.source in self.packages:
                base = self.packages[patch.source]
                digests = {k: tensor_digest(t) for k, t in base.weights.items()}
                self.packages[patch.target] = apply_patch(base, patch, digests)
        if request.digest not in self.packages:
            return NeedReply(self.name, request.digest, tuple(sorted(self.packages)))
        if self.packages[request.digest].digest() != request.digest:
            raise AssertionError("a node holds other weights than the digest says")
        self.trained.append((request.round, request.digest))
        base = codec.decode(request.adapter, request.fmt)
        new = {
            k: t + 0.01 * _noise(tuple(t.shape), "train", self.name, request.round, k)
            for k, t in base.items()
            if is_trained(k, request.settings.factors)
        }
        base = {k: base[k] for k in new}
        fmt = request.reply_fmt or request.fmt
        tensors, _ = codec.encode_update(new, base, {}, fmt)
        made = TrainReply(
            name=self.name,
            round=request.round,
            digest=request.digest,
            examples=self.examples,
            steps=2,
            loss=1.0 / request.round,
            seconds=0.5,
            adapter=tensors,
            fmt=fmt,
            counts=(
                counts(self.name, request.round, 3 * self.examples) if request.count_rule else {}
            ),
            merging=merging(request.merging_rule, new),
            validation_rows=self.validation[1],
            validation_sums=sums(*self.validation),
        )
        return self.spoil(made) if self.spoil else made


def merging(rule: str, trained: Tensors) -> Tensors:
    """Merging figures of an adapter, such as can be."""
    if rule == "fisher":
        return {k: t.square().to(torch.bfloat16) for k, t in trained.items()}
    if rule == "gram":
        return {k: torch.eye(t.shape[1]) for k, t in trained.items() if k.endswith("lora_B.weight")}
    return {}


@dataclass
class Network:
    """A transport over nodes made by hand, with replies in any order and any number of times."""

    members: dict[int, Node]
    chaos: random.Random | None = None
    duplicates: bool = False
    log: list[tuple[str, int, Envelope]] = field(default_factory=list)  # (down | up, node, …)

    def nodes(self) -> list[int]:
        return sorted(self.members)

    def exchange(
        self,
        messages: dict[int, Envelope],
        round: int,
        timeout: float,
        on_reply: OnReply,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        if meanwhile:
            meanwhile()
        replies: dict[int, Envelope | Failure] = {}
        for node, envelope in messages.items():
            self.log.append(("down", node, envelope))
            replies[node] = self.members[node].answer(envelope)
        times = 2 if self.duplicates and any(e.kind == "train" for e in messages.values()) else 1
        queue = [n for n in replies for _ in range(times)]
        if self.chaos:
            self.chaos.shuffle(queue)
        done = False
        for node in queue:
            got = Failure("not waited for", late=True) if done else replies[node]
            if isinstance(got, Envelope):
                self.log.append(("up", node, got))
            done = bool(on_reply(node, got)) or done


def network(*names: str, **keys: Any) -> Network:
    """Nodes with ids 11, 12, … by name, with 5, 6, … examples."""
    return Network({11 + i: Node(n, 5 + i) for i, n in enumerate(names)}, **keys)


def processes() -> Any:
    """A way to start processes that is safe whatever threads this one has by now."""
    context = multiprocessing.get_context("forkserver")
    # Imported once instead of in each process. The server finds modules by PYTHONPATH only.
    context.set_forkserver_preload(["fedpft_core", "tiny"])
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
        forkserver.ensure_running()
    return context


def refuse(reason: str) -> Callable[[Any], Answer]:
    """A node that answers with a refusal."""
    return lambda made: RefusalReply(made.name, reason)


def fail(reason: str) -> Callable[[Any], Answer]:
    """A node that does not answer, as the transport reports it."""
    return lambda made: Failure(reason)
