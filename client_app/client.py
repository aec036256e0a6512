"""One client: from a request to a reply. It knows its own rows and its package, never the FM."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from client_app import audit, means
from client_app.app_hash import app_hash
from client_app.chain import (
    SECURE_STEPS,
    STEPS,
    Steps,
    Work,
    masked_reply,
    plug,
    reply,
    tune,
    work_through,
)
from client_app.disclosure import reason
from client_app.fetch import fetch
from client_app.policy import Policy
from client_app.private import ExamplePrivacy, refuse
from client_app.process import PROCESS_CACHE, Held, ProcessCache, Rows
from client_app.residuals import Residuals
from client_app.rowcache import RowCache
from client_app.rows import Source, divided, encoded
from client_app.secure import Secure
from client_app.startup import collector_paused
from client_app.store import Store
from client_app.sums import masked, summed
from fedpft_core import __version__
from fedpft_core.data.examples import Examples
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.head.form import Summing, Sums
from fedpft_core.proxy.int8 import give_back
from fedpft_core.proxy.package import rebuild
from fedpft_core.task import Task
from fedpft_core.tensors import Tensors
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.identity import combine_digest
from fedpft_core.wire.messages import (
    OUT_OF_MEMORY,
    Hello,
    HelloReply,
    KeysRequest,
    Message,
    NeedReply,
    RefusalReply,
    RevealRequest,
    SecureStatisticsReply,
    SecureStatisticsRequest,
    SecureTrainRequest,
    SharesRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainRequest,
)

log = logging.getLogger("fedpft")
_MOST_THREADS = 1024


@dataclass
class Client:
    """A node's identity, rows and store. Models and encoded rows are kept per process.

    `load_rows(task)` reads the node's rows as the task does; it raises UserError for data that
    cannot be used.
    `count_rows()` says how many there are to train on and to validate on, without needing the
    label names. `validation_share` of the rows, chosen by their content, is never trained on.
    `shared_store` says that the store is not this client's alone (simulation). `rows_id` is equal
    for equal rows and differs for others (another seed, another file), so that encoded rows kept
    in this process are never taken for those of another run.

    `means` is what the node says that it has and will take (`HelloReply.means`).

    `max_bad_rows` is how many rows may have no response left where rows are cut to the model's
    length: below 1 a share, from 1 on a number; a simulated client's limit is the run's, which is
    of all rows and not of each client's. How many rows of the file were left out is logged here and
    never sent.

    `audit` is the file in which the node notes what it was asked and what left it; `attack` makes
    a simulated client an attacker: what it sends for a round's work, given the model it has for it.
    `policy` is what the node's owner lets a server ask for; with `private` it trains with
    example-level differential privacy. `own_rows` says that the rows are the node's and not the
    run's: then nothing of a row and no path is in a refusal. `rank` is the most of LoRA's rank that
    the node trains; 0 = whatever it is sent.

    With `kept_rows` encoded rows also outlive the process. `rows_digest()` is then a digest of all
    the rows depend on at the source (a file's content, the columns), or empty where only the rows
    themselves can tell (a file that names image files).
    """

    name: str
    count_rows: Callable[[], tuple[int, int]]
    load_rows: Callable[[Task], Examples]
    store: Store
    device: str = "cpu"
    max_threads: int = 0
    shared_store: bool = False
    rows_id: tuple[object, ...] = ()
    validation_share: float = 0.0
    kept_rows: RowCache | None = None
    rows_digest: Callable[[], str] = str
    own_rows: bool = True
    max_bad_rows: float = math.inf
    attack: Callable[[Work, Held], Tensors] | None = None
    audit: Path | None = None
    policy: Policy = field(default_factory=Policy)
    private: ExamplePrivacy | None = None
    means: dict[str, int | str] = field(default_factory=dict)
    rank: int = 0
    cache: ProcessCache = field(default_factory=lambda: PROCESS_CACHE)

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer one message. What the user can put right comes back as a refusal.

        Args:
            envelope: what came.

        Returns:
            The sealed answer: a reply, what the client lacks, or a refusal with the reason.
        """
        noted: dict[str, Any] = {"asked": "?", "bytes_in": sum(envelope.sizes().values())}
        answer: Message
        try:
            self.policy.check_app(app_hash() if self.policy.app_hash else "")
            self.policy.check_size(envelope)
            message = open_envelope(envelope)
            noted |= audit.asked(message)
            answer = self._answer(message)
        except (UserError, ReplyError, OSError) as error:
            answer = RefusalReply(self.name, reason(error, self.name, self.own_rows))
        except Exception as error:
            if means.out_of_memory(error):
                self.cache.models.clear()
                answer = RefusalReply(self.name, OUT_OF_MEMORY)
            elif not self.own_rows:
                raise
            else:
                # Flower would send the traceback's last line, whatever it quotes.
                answer = RefusalReply(self.name, reason(error, self.name))
        sealed = seal(answer)
        if self.audit:
            entry = noted | {"name": self.name, "policy": self.policy.digest()}
            try:
                audit.append(self.audit, entry | audit.left(answer, sealed))
            except OSError as error:
                # What nobody could note must not have happened.
                text = f"the audit log cannot be written ({error.strerror})"
                return seal(
                    RefusalReply(self.name, reason(UserError(text, public=text), self.name))
                )
        return sealed

    def _answer(self, message: Message) -> Message:
        if isinstance(message, Hello):
            have = () if self.shared_store else self.store.digests()
            examples, validation = self.count_rows()
            return HelloReply(
                self.name, examples, have, __version__, validation, self.means, self.rank
            )
        if isinstance(message, KeysRequest):
            return self._secure.show_keys(message)
        if isinstance(message, SharesRequest):
            return self._secure.share(message)
        if isinstance(message, RevealRequest):
            return self._secure.reveal(message)
        if isinstance(message, SecureTrainRequest):
            return self._train_masked(message)
        if isinstance(message, TrainRequest):
            return self._train(message)
        if isinstance(message, SecureStatisticsRequest):
            return self._statistics_masked(message)
        if isinstance(message, StatisticsRequest):
            return self._statistics(message)
        raise ReplyError(f"a client cannot answer a {type(message).__name__}")

    @property
    def _secure(self) -> Secure:
        return Secure(self.store.root, self.name)

    def _work(self, request: TrainRequest, steps: Steps) -> Work | NeedReply:
        """A round's work done, or what is lacking for it."""
        start = time.perf_counter()
        _check_settings(request.settings)
        self.policy.check_request(request)
        means.check_blocks(self.means, request.settings.blocks)
        self._use(request.settings.threads)
        held = self._held(request)
        if isinstance(held, NeedReply):
            return held
        rows = self._rows(held)
        self.policy.check_rows(request, len(rows.train))
        means.check_rank(self.rank, request.adapter)
        if self.private and request.count_rule:
            raise refuse("counts of inactive neurons")
        if self.private and request.merging_rule:
            raise refuse("merging figures")
        attack = self.attack
        return work_through(
            Work(
                name=self.name,
                request=request,
                model=held.model,
                rows=rows.train,
                held_out=rows.validation,
                sent=codec.decode(request.adapter, request.fmt),
                residuals=Residuals(self.store.root / "residuals"),
                secure=self._secure,
                private=self.private,
                attack=attack and (lambda work: attack(work, held)),
            ),
            start,
            steps,
        )

    def honest(self, work: Work, held: Held) -> Tensors:
        """The adapter that this client would have trained, had another's request come to it.

        Args:
            work: of the other client, whose request and model are used.
            held: the same model, for which the rows are encoded.

        Returns:
            The tuned adapter, float32; the model has it, too.
        """
        own = replace(work, name=self.name, rows=self._rows(held).train)
        return tune(plug(own)).adapter

    def _train_masked(self, request: SecureTrainRequest) -> Message:
        self._secure.ready(request)
        work = self._work(request, SECURE_STEPS)
        if isinstance(work, NeedReply):
            return work
        return masked_reply(work, request)

    def _train(self, request: TrainRequest) -> Message:
        work = self._work(request, STEPS)
        if isinstance(work, NeedReply):
            return work
        return reply(work)

    def _statistics(self, request: StatisticsRequest) -> Message:
        start = time.perf_counter()
        got = self._summed(request)
        if isinstance(got, NeedReply):
            return got
        found, _, rows, _ = got
        seconds = time.perf_counter() - start
        return StatisticsReply(
            self.name, request.round, request.digest, rows, seconds, found.tensors()
        )

    def _statistics_masked(self, request: SecureStatisticsRequest) -> Message:
        start = time.perf_counter()
        self._secure.ready(request)
        got = self._summed(request)
        if isinstance(got, NeedReply):
            return got
        sums = masked(*got, self._secure, request)
        seconds = time.perf_counter() - start
        return SecureStatisticsReply(
            self.name, request.session, request.round, request.digest, seconds, sums
        )

    def _summed(self, request: StatisticsRequest) -> tuple[Sums, Summing, int, int] | NeedReply:
        """The sums over this client's rows, of what, how many rows, and most answers of one."""
        if request.width < 1 or request.batch_size < 1:
            raise ReplyError("the request cannot be used (no features, or no rows at once)")
        if not 1 <= request.threads <= _MOST_THREADS:
            raise ReplyError(f"the request cannot be used (threads = {request.threads})")
        self.policy.check_request(request)
        if self.private:
            raise refuse("class statistics")
        self._use(request.threads)
        held = self._held(request)
        if isinstance(held, NeedReply):
            return held
        rows = self._rows(held).train
        return summed(request, held, rows, self.policy, self.cache, self._rows_key(held))

    def _use(self, threads: int) -> None:
        """Pin torch to so many threads, or to what the node allows."""
        if self.max_threads:
            threads = min(threads, self.max_threads)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def _held(self, request: TrainRequest | StatisticsRequest) -> Held | NeedReply:
        """The model with the digest asked for: from memory, disk, or what the message brings."""
        base = means.base_of(self.means)
        # In a simulation nodes that hold it in 8 bits and in floats share one process.
        key = request.digest if base == "float" else f"{request.digest} {base}"
        cached = self.cache.models.get(key)
        if cached is not None:
            # Kept true to its disk copy: a wiped store must be served again, as it would be in
            # a deployment, where each message may meet a new process.
            if self.store.touch(request.digest):
                return cached
            del self.cache.models[key]
        package = fetch(self.name, self.store, self.policy, request)
        if isinstance(package, NeedReply):
            return package
        self.policy.check_package(package.meta)  # what lies on the disk may be of before the rule
        with collector_paused():  # a family's own module is imported here
            model = rebuild(package, base)
        model.model.to(self.device)
        reader = combine_digest("", package.files, {})
        held = Held(model, package.files, reader)
        self.cache.keep_model(key, held)
        if base != "float":
            del package
            give_back()
        return held

    def _rows_key(self, held: Held) -> Any:
        """Tells these rows, encoded for this sub-FM, from all others."""
        return (
            self.name, self.rows_id, self.validation_share, held.reader, held.model.task,
            held.model.max_length,
        )  # fmt: skip

    def _rows(self, held: Held) -> Rows:
        share, key = self.validation_share, self._rows_key(held)
        if key not in self.cache.rows:
            source = Source(
                self.name, self.load_rows, self.kept_rows, self.rows_digest, self.max_bad_rows
            )
            rows = divided(*encoded(source, held, self.cache.processors), share, self.name)
            self.cache.keep_rows(key, rows)
        return self.cache.rows[key]


def _check_settings(s: LocalSettings) -> None:
    """Refuse work that cannot be done before anything is set up for it."""
    whole = {"batch_size": (1, 2**31), "epochs": (0, 2**31), "steps": (0, 2**31),
             "threads": (1, _MOST_THREADS)}  # fmt: skip
    for name, (least, most) in whole.items():
        if not least <= getattr(s, name) <= most:
            raise ReplyError(f"the request cannot be used ({name} = {getattr(s, name)})")
    if not (s.steps or s.epochs):
        raise ReplyError("the request cannot be used (neither steps nor epochs)")
    for name in ("lr", "weight_decay", "clip", "head_lr_scale"):
        if not 0 <= getattr(s, name) < math.inf:
            raise ReplyError(f"the request cannot be used ({name} = {getattr(s, name)})")
