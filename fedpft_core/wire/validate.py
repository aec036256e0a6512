"""What a good reply looks like; every reply is held against it before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.head.form import Summing, Sums
from fedpft_core.model.names import is_trained
from fedpft_core.task import Task
from fedpft_core.tensors import Tensors
from fedpft_core.train.inactivity import Counts
from fedpft_core.wire import codec, merging
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.messages import StatisticsReply, TrainReply

_CERTAIN = 0.8  # of the bound's square: float32 sums are not off by so much
_SLACK = 2**16  # bytes a reply may have beyond its tensors: head, safetensors headers


@dataclass(frozen=True)
class Expected:
    """What a good reply of this round looks like."""

    round: int
    digest: str
    fmt: str  # of the reply's adapter
    adapter: Mapping[str, Tensor]  # float32, as the clients decoded it
    max_update_norm: float
    count_blocks: Mapping[int, int]  # pruned block → neurons K; empty when no counts are asked
    task: Task  # says what figures of held-out rows are possible
    tokens_per_row: int = 2**16  # the most real tokens one example can have
    factors: str = "both"  # which of LoRA's factors are trained, and sent back
    # Tensors that a client with LoRA in fewer blocks trains; empty = all.
    names: frozenset[str] = frozenset()
    widths: Mapping[str, str] = field(default_factory=dict)  # other widths' names by digest
    merging_rule: str = ""  # which merging figures come with the adapter; empty = none

    @cached_property
    def trained(self) -> Tensors:
        """The tensors of the adapter that are trained, as they were sent."""
        return {
            k: t
            for k, t in self.adapter.items()
            if is_trained(k, self.factors) and (not self.names or k in self.names)
        }

    @cached_property
    def layout(self) -> codec.Layout:
        """Names, dtypes and shapes of the reply's adapter."""
        return codec.update_layout(self.trained, self.fmt)

    @cached_property
    def merging(self) -> codec.Layout:
        """Names, dtypes and shapes of the merging figures."""
        return merging.layout(self.merging_rule, self.trained)

    @cached_property
    def beside(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the merging figures once they are float32."""
        return merging.shapes(self.merging_rule, self.trained)

    @cached_property
    def max_bytes(self) -> int:
        """The largest reply that can be good: its tensors, their names, and some slack."""
        counts = sum(8 * k + 8 for k in self.count_blocks.values())
        names = sum(len(name) + 100 for name in self.layout) + 250 * len(self.count_blocks)
        names += sum(len(name) + 100 for name in self.merging)
        tensors = codec.layout_bytes(self.layout) + codec.layout_bytes(self.merging)
        return tensors + counts + names + _SLACK


def check_size(envelope: Envelope, most: int) -> None:
    """Refuse a reply by its size, before anything in it is parsed.

    Args:
        envelope: as it came.
        most: bytes that a good one can have.

    Raises:
        ReplyError: head, checksum and parts together are larger.
    """
    size = sum(envelope.sizes().values())
    if size > most:
        raise ReplyError(f"the reply has {size} bytes, more than the {most} a good one can have")


def check_digest(what: str, found: str, wanted: str, widths: Mapping[str, str]) -> None:
    """Refuse what was made with another sub-FM than the one served.

    Args:
        what: what was made with it, and a verb.
        found: the digest of the sub-FM that it says.
        wanted: the digest of the one served.
        widths: the names of other widths of the run, by digest.

    Raises:
        ReplyError: they differ; names the width, where it is one of the run.
    """
    if found == wanted:
        return
    if found in widths:
        raise ReplyError(f"{what} width {widths[found]}, which is not the one it was served")
    raise ReplyError(f"{what} another sub-FM than the one asked for")


def _at_least(value: float, low: float) -> bool:
    # Compared as they are: a huge int would overflow a conversion to float.
    return low <= value < math.inf


def validate(
    reply: TrainReply, want: Expected, name: str, announced: int, held_out: int = 0
) -> tuple[Tensors, Counts | None]:
    """Check one reply of a round before it is used.

    The checks, in this order: identity, numbers, format, keys, shapes, finiteness, size of the
    change, counts. The types of the plain fields are those `open_envelope` guarantees.

    Args:
        reply: what came.
        want: what was asked for.
        name: the node it came from.
        announced: rows that the node said it trains on.
        held_out: rows that the node said it keeps from training.

    Returns:
        The adapter as float32 tensors, and the inactivity counts; None where none were asked for.

    Raises:
        ReplyError: with the first check failed.
    """
    if reply.name != name:
        raise ReplyError(f"the reply is signed {reply.name[:40]!r}, not {name!r}")
    if reply.round != want.round:
        raise ReplyError(f"the reply is for round {reply.round}, not {want.round}")
    check_digest("the reply was trained on", reply.digest, want.digest, want.widths)
    if reply.examples < 1:
        raise ReplyError(f"example count {reply.examples} is not positive")
    if reply.examples != announced:
        raise ReplyError(f"example count {reply.examples} is not the {announced} announced")
    if reply.validation_rows != held_out:
        raise ReplyError(
            f"validation row count {reply.validation_rows} is not the {held_out} announced"
        )
    try:
        want.task.check_sums(reply.validation_sums, held_out, want.tokens_per_row)
    except ValueError as error:
        raise ReplyError(str(error)) from error
    if reply.steps < 1:
        raise ReplyError(f"step count {reply.steps} is not positive")
    if not _at_least(reply.loss, 0) or not _at_least(reply.seconds, 0):
        raise ReplyError("loss or seconds is not a finite number of at least 0")
    if not all(_at_least(v, 0) for v in reply.timings.values()):
        raise ReplyError("timings are not finite numbers of at least 0")
    if reply.fmt != want.fmt:
        raise ReplyError(f"the adapter is in format {reply.fmt!r}, not {want.fmt}")
    _check_rank(reply, want)
    try:
        codec.check_layout(reply.adapter, want.layout)
    except ReplyError as error:
        raise ReplyError(f"adapter: {error}") from error
    adapter = codec.decode_update(reply.adapter, want.trained, want.fmt)
    _check_change(adapter, want)
    return {**want.adapter, **adapter}, _validated_counts(reply, want)


def _check_change(adapter: Mapping[str, Tensor], want: Expected) -> None:
    """Refuse values that are not finite, or moved by more than the bound."""
    # Most replies lie well within: sums of squares in float32 show it in a fraction of the time.
    # Not finite compares false, so that such values go on to the exact look, too.
    rough = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for key, t in adapter.items():
            moved = (t.numpy() - want.adapter[key].numpy()).reshape(-1)
            rough += float(np.dot(moved, moved))
    if rough < _CERTAIN * want.max_update_norm**2:
        return
    change = 0.0
    for key, t in adapter.items():
        # float64: the sum of squares of finite float32 values must not overflow to inf.
        change += float((t.double() - want.adapter[key].double()).square().sum())
    if not math.isfinite(change):
        raise ReplyError("the adapter has values that are not finite")
    if math.sqrt(change) > want.max_update_norm:
        raise ReplyError(
            f"the adapter moved by {math.sqrt(change):.3g}, more than the bound "
            f"wire.max-update-norm = {want.max_update_norm:g}"
        )


def _check_rank(reply: TrainReply, want: Expected) -> None:
    """Say so where a reply has another rank than was asked for, before its shapes are compared."""
    for name, t in reply.adapter.items():
        if name.endswith("lora_A.weight") and t.dim() == 2 and name in want.trained:
            rank = len(want.trained[name])
            if len(t) != rank:
                raise ReplyError(f"the adapter has rank {len(t)}, not the {rank} announced")


def validated_merging(reply: TrainReply, want: Expected) -> Tensors:
    """Check the merging figures of a reply before they are used.

    Args:
        reply: what came.
        want: what was asked for.

    Returns:
        The figures as float32 tensors by name; empty where none were asked for.

    Raises:
        ReplyError: they are missing, not asked for, of another layout, or no such figures.
    """
    try:
        codec.check_layout(reply.merging, want.merging)
        return merging.checked(want.merging_rule, reply.merging) if want.merging_rule else {}
    except (ReplyError, ValueError) as error:
        raise ReplyError(f"merging figures: {error}") from error


def _validated_counts(reply: TrainReply, want: Expected) -> Counts | None:
    keys = {f"{b}" for b in want.count_blocks} | {f"{b}/tokens" for b in want.count_blocks}
    if reply.counts.keys() != keys:
        raise ReplyError(
            "inactivity counts are missing or not for the pruned blocks"
            if keys
            else "inactivity counts were not asked for"
        )
    return checked_counts(reply.counts, reply.examples, want) if keys else None


def checked_counts(counts: Mapping[str, Tensor], examples: int, want: Expected) -> Counts:
    """Check inactivity counts over some rows.

    Args:
        counts: `{block}` and `{block}/tokens` for each block wanted.
        examples: the rows.
        want: says which blocks have how many neurons, and how many tokens a row can have.

    Returns:
        The counts.

    Raises:
        ReplyError: naming the first block whose counts cannot be.
    """
    inactive, tokens = {}, {}
    for block, k in want.count_blocks.items():
        c, n = counts[f"{block}"], counts[f"{block}/tokens"]
        if c.dtype != torch.int64 or c.shape != (k,) or n.dtype != torch.int64 or n.shape != (1,):
            raise ReplyError(f"inactivity counts of block {block} have the wrong type or shape")
        total = int(n)
        # The bounds also keep sums over many clients far from int64's limit.
        if not 0 < total <= min(examples * want.tokens_per_row, 2**48):
            raise ReplyError(
                f"block {block} has counts over {total} tokens, which {examples} examples "
                "cannot have"
            )
        if int(c.min()) < 0 or int(c.max()) > total:
            raise ReplyError(f"inactivity counts of block {block} are not within its token total")
        inactive[block], tokens[block] = c, total
    return Counts(inactive, tokens)


@dataclass(frozen=True)
class ExpectedStatistics:
    """What good statistics look like.

    Attributes:
        round: the round asked for.
        digest: the sub-FM asked for.
        form: what is summed.
        width: features D that are summed over.
        longest: largest L2 norm that a feature vector can have.
        most: the most answers that a row can have.
        widths: the names of the other widths, by digest.
        label: how far from zero a number to be learned can be; 0 where that is not known. Only
            statistics under masks need it.
        head: at which slopes are wanted, `weight` and `bias`; empty = class statistics.
    """

    round: int
    digest: str
    form: Summing
    width: int
    longest: float
    most: int = 1
    widths: Mapping[str, str] = field(default_factory=dict)
    label: float = 0.0
    head: Tensors = field(default_factory=dict)

    @property
    def max_bytes(self) -> int:
        """The largest reply that can be good."""
        return 8 * self.form.numbers(self.width) + _SLACK


def validate_statistics(
    reply: StatisticsReply, want: ExpectedStatistics, name: str, announced: int
) -> Sums:
    """Check statistics from the node `name`, which announced so many training rows.

    Args:
        reply: what came.
        want: what was asked for.
        name: the node it came from.
        announced: rows it said it trains on.

    Returns:
        The statistics.

    Raises:
        ReplyError: with the first check failed.
    """
    if reply.name != name:
        raise ReplyError(f"the reply is signed {reply.name[:40]!r}, not {name!r}")
    if reply.round != want.round:
        raise ReplyError(f"the reply is for round {reply.round}, not {want.round}")
    check_digest("the statistics are of", reply.digest, want.digest, want.widths)
    if reply.examples != announced:
        raise ReplyError(f"example count {reply.examples} is not the {announced} announced")
    if not _at_least(reply.seconds, 0):
        raise ReplyError("seconds is not a finite number of at least 0")
    found: Sums = want.form.read(reply.statistics, want.width)
    want.form.check(found, announced, want.longest, want.most)
    return found
