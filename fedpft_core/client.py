"""One client: from a request to a reply. It knows its own rows and its package, never the FM."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import __version__, adapters, codec
from .data.batches import Encoded, encode
from .data.tasks import Examples
from .errors import ReplyError, UserError
from .exchange import (
    Envelope,
    Hello,
    HelloReply,
    Message,
    NeedReply,
    Package,
    RefusalReply,
    TrainReply,
    TrainRequest,
    open_envelope,
    seal,
    tensor_digest,
)
from .proxy import ClientModel, apply_patch, load_processor, rebuild
from .seeds import derive
from .store import Store
from .training import count_inactive, fine_tune


@dataclass
class Client:
    """A node's identity, rows and store. Models and encoded rows are kept per process.

    `load_rows(labels)` reads the node's rows; it raises UserError for data that cannot be used.
    `count_rows()` says how many there are without needing the label names.
    `shared_store` says that the store is not this client's alone (simulation).
    """

    name: str
    count_rows: Callable[[], int]
    load_rows: Callable[[tuple[str, ...]], Examples]
    store: Store
    device: str = "cpu"
    max_threads: int = 0
    shared_store: bool = False
    cache: ProcessCache = field(default_factory=lambda: PROCESS_CACHE)

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer one message. What the user can put right comes back as a refusal."""
        try:
            return seal(self._answer(open_envelope(envelope)))
        except (UserError, ReplyError) as error:
            return seal(RefusalReply(self.name, str(error)))
        except OSError as error:
            return seal(RefusalReply(self.name, f"disk or file error: {error}"))

    def _answer(self, message: Message) -> Message:
        if isinstance(message, Hello):
            have = () if self.shared_store else self.store.digests()
            return HelloReply(self.name, self.count_rows(), have, __version__)
        if isinstance(message, TrainRequest):
            return self._train(message)
        raise ReplyError(f"a client cannot answer a {type(message).__name__}")

    def _train(self, request: TrainRequest) -> Message:
        start = time.perf_counter()
        threads = request.settings.threads
        if self.max_threads:
            threads = min(threads, self.max_threads)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        held = self._model(request)
        if held is None:
            return NeedReply(self.name, request.digest, self.store.digests())
        rows = self._rows(request.digest, held)
        adapters.load(held.model, codec.decode(request.adapter, request.fmt), held.plan)
        ready = time.perf_counter()
        seed = derive(request.seed, "local", request.round, self.name)
        result = fine_tune(held.model, rows, request.settings, seed)
        trained = time.perf_counter()
        counts: dict[str, torch.Tensor] = {}
        if request.count_rule:
            found = count_inactive(
                held.model, held.plan, rows, 2 * request.settings.batch_size, request.count_rule
            )
            for block, value in found.inactive.items():
                counts[f"{block}"] = value
                counts[f"{block}/tokens"] = torch.tensor([found.tokens[block]])
        done = time.perf_counter()
        return TrainReply(
            name=self.name,
            round=request.round,
            digest=request.digest,
            examples=len(rows),
            steps=result.steps,
            loss=result.loss,
            seconds=result.seconds,
            adapter=codec.encode(adapters.read(held.model, held.plan), request.fmt),
            fmt=request.fmt,
            counts=counts,
            timings={"prepare": ready - start, "train": trained - ready, "count": done - trained},
        )

    def _model(self, request: TrainRequest) -> ClientModel | None:
        """The model with the digest asked for: from memory, disk, or what the message brings."""
        cached = self.cache.models.get(request.digest)
        if cached is not None:
            # Kept true to its disk copy: a wiped store must be served again (see `_ensure`).
            if request.digest in self.store.digests():
                return cached
            del self.cache.models[request.digest]
        package = self._package(request)
        if package is None:
            return None
        model = rebuild(package)
        model.model.to(self.device)
        self.cache.keep_model(request.digest, model)
        return model

    def _package(self, request: TrainRequest) -> Package | None:
        if request.package:
            package = Package.from_bytes(request.package)
            if package.digest() != request.digest:
                raise ReplyError("the package received does not have the digest it was sent under")
            self.store.put(request.digest, package)
            return package
        here = self.store.get(request.digest)
        if here is not None or not request.patches:
            return here
        base: Package | None = None
        digests: dict[str, str] = {}
        for patch in request.patches:
            if base is None:
                # The chain may start before what this client has.
                base = self.store.get(patch.source)
                if base is None:
                    continue
                digests = {k: tensor_digest(t) for k, t in base.weights.items()}
            base = apply_patch(base, patch, digests)
        if base is not None:
            self.store.put(request.digest, base)
        return base

    def _rows(self, digest: str, held: ClientModel) -> Encoded:
        folder = self.store.folder(digest) / "files"
        reader = hashlib.sha256(
            b"".join(p.name.encode() + p.read_bytes() for p in sorted(folder.iterdir()))
        ).hexdigest()
        key = (self.name, reader, held.labels, held.max_length)
        if key not in self.cache.rows:
            examples = self.load_rows(held.labels)
            if not len(examples):
                raise UserError(f"client {self.name} has no rows.")
            if reader not in self.cache.processors:
                self.cache.processors[reader] = load_processor(folder, held.kind)
            processor = self.cache.processors[reader]
            self.cache.keep_rows(key, encode(examples, processor, held.max_length))
        return self.cache.rows[key]


class ProcessCache:
    """Models, processors and encoded rows that outlive a message within one worker process."""

    def __init__(self, max_models: int = 2, max_clients: int = 64) -> None:
        self.models: dict[str, ClientModel] = {}
        self.rows: dict[Any, Encoded] = {}
        self.processors: dict[str, Any] = {}
        self.max_models = max_models
        self.max_clients = max_clients

    def keep_model(self, digest: str, model: ClientModel) -> None:
        while len(self.models) >= self.max_models:
            self.models.pop(next(iter(self.models)))
        self.models[digest] = model

    def keep_rows(self, key: Any, rows: Encoded) -> None:
        while len(self.rows) >= self.max_clients:
            self.rows.pop(next(iter(self.rows)))
        self.rows[key] = rows


PROCESS_CACHE = ProcessCache()
