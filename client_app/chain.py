"""The chain that a round's work passes at a client, from the adapter received to the one sent.

`STEPS` is the whole of it, in order. A step takes the work in hand and returns it as the next step
gets it. A step of one's own is a function and one entry in `STEPS`: one that clips a change or adds
noise to it belongs between `tune` and `encode`, where `adapter` is float32.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from client_app.private import ExamplePrivacy
from client_app.residuals import Residuals
from client_app.secure import Secure
from fedpft_core.adapter import lora as adapters
from fedpft_core.adapter.layers import in_blocks, only_blocks
from fedpft_core.data.encoded import Encoded
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.model.names import is_trained
from fedpft_core.privacy.entropy import skellam
from fedpft_core.proxy.package import ClientModel
from fedpft_core.secure import digits, ring
from fedpft_core.seeds import derive, numpy_stream
from fedpft_core.tensors import Tensors
from fedpft_core.train.evaluate import evaluate
from fedpft_core.train.inactivity import count_inactive
from fedpft_core.train.merging import fisher, gram
from fedpft_core.train.private import fine_tune_private
from fedpft_core.train.tune import DECAYS, FACTORS, fine_tune
from fedpft_core.wire import codec, merging
from fedpft_core.wire.messages import (
    SecureTrainReply,
    SecureTrainRequest,
    TrainReply,
    TrainRequest,
)

log = logging.getLogger("fedpft")


@dataclass(frozen=True)
class Work:
    """One round's work of one client, as far as it has come.

    `rows` is what it trains on, `held_out` what it keeps from training, `sent` the adapter it
    received, float32. The other fields are filled by the steps.
    """

    name: str
    request: TrainRequest
    model: ClientModel
    rows: Encoded
    held_out: Encoded
    sent: Tensors
    residuals: Residuals
    secure: Secure
    private: ExamplePrivacy | None = None
    # What a simulated attacker sends in place of what it has trained.
    attack: Callable[[Work], Tensors] | None = None
    # What the sub-FM with `sent` came to on `held_out`, and only what may leave; see `Task.sent`.
    sums: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    adapter: Tensors = field(default_factory=dict)  # float32 until `encode`
    counts: Tensors = field(default_factory=dict)
    merging: Tensors = field(default_factory=dict)  # on the wire's form
    timings: dict[str, float] = field(default_factory=dict)  # seconds by step, before `encode`


Steps = tuple[tuple[str, Callable[[Work], Work]], ...]


def plug(work: Work) -> Work:
    """Put the adapter received on the sub-FM.

    Args:
        work: with the model and the adapter received.

    Returns:
        The work as it was.

    Raises:
        ReplyError: when it does not fit.
    """
    put(work.model, work.sent)
    return work


def put(model: ClientModel, adapter: Tensors) -> None:
    """Put an adapter that was received on a sub-FM, which takes its rank.

    Args:
        model: the sub-FM, which gets it in place.
        adapter: float32 tensors by their name in the FM.

    Raises:
        ReplyError: when it does not fit.
    """
    try:
        adapters.resize(model.model, adapters.rank_of(adapter) or model.spec.rank)
        adapters.load(model.model, adapter, model.plan)
    except ValueError as error:
        raise ReplyError(f"the adapter received does not fit the sub-FM ({error})") from error


def validate(work: Work) -> Work:
    """Score the adapter received on the rows kept from training.

    Args:
        work: with the adapter received on the model.

    Returns:
        The work with those figures of the score that a client may send; none where no rows are
        kept.
    """
    if not len(work.held_out):
        return work
    model, task = work.model.model, work.model.task
    score = evaluate(model, task, work.held_out, 2 * work.request.settings.batch_size)
    return replace(work, sums={name: score.sums[name] for name in task.sent})


def tune(work: Work) -> Work:
    """Fine-tune the adapter on the rows; afterwards it is read from the model.

    With `private` no row shows in it, and the loss is not said.

    Source: FedPFT, section 4.2.

    Args:
        work: with the adapter received on the model.

    Returns:
        The work with the tuned adapter, float32, and the steps, loss and seconds it took.

    Raises:
        ReplyError: when the request names factors or rates that there are not.
        UserError: the node's budget is spent, or the model cannot be trained so.
    """
    model, request = work.model, work.request
    if request.settings.factors not in FACTORS or request.settings.decay not in DECAYS:
        raise ReplyError("the request cannot be used (what is to be trained, or at which rate)")
    seed = derive(request.seed, "local", request.round, work.name)
    settings, private = request.settings, work.private
    if private and settings.blocks:
        raise ReplyError("example-level privacy trains LoRA in all blocks")
    if private:
        private.spend(work.name, settings, len(work.rows))
        try:
            done = fine_tune_private(
                model.model, model.task, work.rows, settings, seed, private.noise, private.clip
            )
        except ValueError as error:
            text = f"example-level privacy (dp-noise): {error}"
            raise UserError(text, public=text) from error
    else:
        with only_blocks(model.model, settings.blocks, model.plan):
            done = fine_tune(model.model, model.task, work.rows, settings, seed)
    return replace(
        work, steps=done.steps, loss=done.loss, seconds=done.seconds,
        adapter=adapters.read(model.model, model.plan),
    )  # fmt: skip


def misbehave(work: Work) -> Work:
    """Put what a simulated attacker sends in the place of what it has trained.

    Args:
        work: with the tuned adapter, float32.

    Returns:
        The work as it was, but for a client that simulates an attack.
    """
    if work.attack is None:
        return work
    return replace(work, adapter=work.attack(work))


def count(work: Work) -> Work:
    """Count inactive neurons with the tuned adapter, where the server asks for it.

    Source: FedPFT, section 4.3.

    Args:
        work: with the tuned adapter on the model.

    Returns:
        The work with the counts: `{block}` int64 [K] of `{block}/tokens` int64 [1] real tokens.
    """
    request = work.request
    if not request.count_rule:
        return work
    found = count_inactive(
        work.model.model, work.model.plan, work.rows, 2 * request.settings.batch_size,
        request.count_rule,
    )  # fmt: skip
    counts: Tensors = {}
    for block, value in found.inactive.items():
        counts[f"{block}"] = value
        counts[f"{block}/tokens"] = torch.tensor([found.tokens[block]])
    return replace(work, counts=counts)


def weigh(work: Work) -> Work:
    """Find the merging figures with the tuned adapter, where the server asks for them.

    Args:
        work: with the tuned adapter on the model.

    Returns:
        The work with the figures, in the format in which they travel.

    Raises:
        ReplyError: the request names figures that there are not.
    """
    request = work.request
    rule, model = request.merging_rule, work.model
    if not rule:
        return work
    if rule not in merging.FORMATS:
        raise ReplyError(f"the server asks for unknown merging figures {rule[:40]!r}")
    if rule == "fisher":
        seed = derive(request.seed, "merging", request.round, work.name)
        factors = request.settings.factors
        found = fisher(model.model, model.plan, model.task, work.rows, factors, seed)
    else:
        found = gram(model.model, model.plan, work.rows, 2 * request.settings.batch_size)
    return replace(work, merging=codec.encode(found, merging.FORMATS[rule]))


def encode(work: Work) -> Work:
    """Put the adapter into the format asked for, with error feedback where it has any.

    Args:
        work: with the tuned adapter, float32.

    Returns:
        The work with the adapter in that format.

    Raises:
        ReplyError: when the format is unknown, or the request cannot name a residual.
    """
    request, kept = work.request, work.residuals
    # What was not trained is as the server sent it: it need not travel.
    factors = request.settings.factors
    plan, blocks = work.model.plan, request.settings.blocks
    new = {
        k: t for k, t in work.adapter.items()
        if is_trained(k, factors) and in_blocks(k, blocks, plan)
    }  # fmt: skip
    base = {k: work.sent[k] for k in new}
    fmt = request.reply_fmt or request.fmt
    if fmt not in codec.UPDATE_FORMATS:
        raise ReplyError(f"the server asks for an unknown format {fmt!r}")
    residual: Tensors = {}
    if fmt == "ternary":
        try:
            residual = kept.get(request.run, work.name, request.round)
        except ValueError as error:
            raise ReplyError(f"the request cannot be used ({error})") from error
        fits = {k: t.shape for k, t in residual.items()} == {k: t.shape for k, t in new.items()}
        residual = residual if fits else {}
    tensors, left = codec.encode_update(new, base, residual, fmt)
    # After a diverged round there is nothing sensible left to send.
    if left and all(bool(t.isfinite().all()) for t in left.values()):
        try:
            kept.put(request.run, work.name, request.round, left)
        except OSError as error:
            log.warning("client %s: rounding residual not kept: %s", work.name, error)
    return replace(work, adapter=tensors)


STEPS: Steps = (
    ("prepare", plug),
    ("validate", validate),
    ("train", tune),
    ("count", count),
    ("weigh", weigh),
    ("", misbehave),
    ("", encode),  # not timed
)


def mask(work: Work) -> Work:
    """Quantise the change and the loss, and put the session's masks on them and on the counts.

    Where the server asks for it, the change is scaled down to a norm and gets this client's part of
    the noise, and the loss is not said.

    Args:
        work: with the tuned adapter, float32, the mean loss, and counts where they are asked for.

    Returns:
        The work with the one tensor `masked`, and without figures of its own.

    Raises:
        ReplyError: the change is not finite, or the session does not allow it.
    """
    request = work.request
    assert isinstance(request, SecureTrainRequest)
    change = {k: t.double() - work.sent[k].double() for k, t in work.adapter.items()}
    size = math.sqrt(math.fsum(float(d.square().sum()) for d in change.values()))
    if request.longest and size > request.longest:
        change = {k: d * (request.longest / size) for k, d in change.items()}
    loss = {"loss": torch.tensor([0.0 if request.variance else work.loss])}
    counts = [work.counts[k].numpy() for k in sorted(work.counts)]
    stream = numpy_stream(request.seed, "quantise", request.round, work.name)
    try:
        values = np.concatenate([
            ring.quantise(change, request.bits, request.reach, stream),
            ring.quantise(loss, request.bits, ring.LOSS_REACH, stream),
            *(digits.split(c, request.digits, request.bits) for c in counts),
        ])  # fmt: skip
    except ValueError as error:
        raise ReplyError(str(error)) from error
    if request.variance:
        values = values + skellam(len(values), request.variance)
    return replace(work, loss=0.0, counts={}, adapter=work.secure.mask(request, values))


# The same where the change goes into a sum that nobody can take apart.
SECURE_STEPS: Steps = (
    ("prepare", plug),
    ("train", tune),
    ("count", count),
    ("", misbehave),
    ("", mask),
)


def work_through(work: Work, began: float, steps: Steps = STEPS) -> Work:
    """Take a round's work through the chain.

    Args:
        work: with what the client has to work with.
        began: when the message came, `time.perf_counter()`; what was done since is booked to the
            first step.
        steps: the chain.

    Returns:
        The work done, with the seconds of each step but the last.

    Raises:
        ReplyError: a step cannot do what the request asks for.
    """
    for name, step in steps:
        work = step(work)
        now = time.perf_counter()
        if name:
            work = replace(work, timings=work.timings | {name: now - began})
        began = now
    return work


def reply(work: Work) -> TrainReply:
    """What a client sends for a round's work.

    Args:
        work: done.

    Returns:
        The reply.
    """
    request = work.request
    return TrainReply(
        name=work.name,
        round=request.round,
        digest=request.digest,
        examples=len(work.rows),
        steps=work.steps,
        loss=work.loss,
        seconds=work.seconds,
        adapter=work.adapter,
        fmt=request.reply_fmt or request.fmt,
        counts=work.counts,
        merging=work.merging,
        timings=work.timings,
        validation_rows=len(work.held_out),
        validation_sums=dict(work.sums),
        private=work.private is not None,
    )


def masked_reply(work: Work, request: SecureTrainRequest) -> SecureTrainReply:
    """What a client sends for a round's work in a session of secure aggregation.

    Args:
        work: done, by the steps that mask it.
        request: what was asked for.

    Returns:
        The reply.
    """
    return SecureTrainReply(
        name=work.name,
        session=request.session,
        round=request.round,
        digest=request.digest,
        steps=work.steps,
        seconds=work.seconds,
        adapter=work.adapter,
    )
