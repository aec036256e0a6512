"""What a round sends to each client, and what a good answer to it looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedpft_core.aggregation import factors
from fedpft_core.config import Config
from fedpft_core.disk import evict
from fedpft_core.tensors import Tensors
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire.envelope import Envelope, seal
from fedpft_core.wire.messages import Message, SecureTrainRequest, TrainRequest
from fedpft_core.wire.package import Patch
from fedpft_core.wire.parcel import Parcel
from fedpft_core.wire.validate import Expected
from server_app.delivery import Holds, delivery, share, useful
from server_app.state import State

_MOST_PATCHES = 2**16  # tokens an image can become

_MEGABYTE = 10**6
_KEPT_MESSAGES = 4  # made for what different clients lack

Request = Callable[[Holds], Envelope]


def learning_rate(lr0: float, round: int, rounds: int) -> float:
    """The rate of round t of T, lr0 · (T − t + 1) / T: linear, never 0.

    Source: FedPFT, section 5.1.

    Args:
        lr0: rate of the first round.
        round: t, from 1.
        rounds: T.

    Returns:
        The rate.
    """
    return lr0 * (rounds - round + 1) / rounds


def reply_format(config: Config) -> str:
    """The format of the adapters clients send back.

    Args:
        config: the run's configuration.

    Returns:
        wire.adapter-up; where that is `same`, wire.adapter.
    """
    up = config.wire.adapter_up
    return config.wire.adapter if up == "same" else up


def local_settings(config: Config, round: int) -> LocalSettings:
    """A client's work in a round.

    Args:
        config: the run's configuration.
        round: t, from 1.

    Returns:
        Its rates, steps and the like.
    """
    t = config.train
    return LocalSettings(
        learning_rate(t.lr, round, config.federation.rounds), t.batch_size, t.local_epochs,
        t.local_steps, t.weight_decay, t.clip, t.threads, t.head_lr_scale, t.b_lr_scale,
        t.augment, factors(config.federation.aggregate, round), t.local_decay,
    )  # fmt: skip


def requests(
    config: Config, state: State, parcel: Parcel, round: int, adapter: Tensors, count_rule: str
) -> Request:
    """A function from what a client has to the message it gets.

    Clients that need the same things get the same message: one copy in memory serves all.

    Args:
        config: the run's configuration.
        state: where the run stands; patches too old to be of use are dropped from it.
        parcel: the state's package as it travels.
        round: the round the messages begin.
        adapter: the adapter to start from, in the wire's format.
        count_rule: how clients are to count inactive neurons; empty = not at all.

    Returns:
        The function; see `by_need`.
    """
    fields = _fields(config, state, round, adapter)

    def make(package: bytes, patches: tuple[Patch, ...]) -> TrainRequest:
        return TrainRequest(**fields, count_rule=count_rule, package=package, patches=patches)

    return by_need(config, state, parcel, make)


def secure_request(
    config: Config, state: State, parcel: Parcel, round: int, adapter: Tensors,
    **secure: Any,
) -> Request:  # fmt: skip
    """The same for one client of secure aggregation.

    Args:
        config: the run's configuration.
        state: where the run stands; patches too old to be of use are dropped from it.
        parcel: the state's package as it travels.
        round: the round that the message belongs to.
        adapter: the adapter to start from, in the wire's format.
        **secure: what `SecureTrainRequest` has besides.

    Returns:
        The function; see `by_need`.
    """
    fields = _fields(config, state, round, adapter)

    def make(package: bytes, patches: tuple[Patch, ...]) -> SecureTrainRequest:
        return SecureTrainRequest(**fields, package=package, patches=patches, **secure)

    return by_need(config, state, parcel, make)


def _fields(config: Config, state: State, round: int, adapter: Tensors) -> dict[str, Any]:
    return {
        "round": round,
        "digest": state.digest,
        "adapter": adapter,
        "fmt": config.wire.adapter,
        "settings": local_settings(config, round),
        "seed": config.run.seed,
        "reply_fmt": reply_format(config),
        "run": state.run,
    }


def most_bytes(config: Config) -> int:
    """Bytes of a sub-FM in one message.

    Args:
        config: the run's configuration.

    Returns:
        wire.message-mb in bytes; 0 = no limit.
    """
    return config.wire.message_mb * _MEGABYTE


def by_need(
    config: Config,
    state: State,
    parcel: Parcel,
    make: Callable[[bytes, tuple[Patch, ...]], Message],
) -> Request:
    """A function from what a client has to the message that also brings what it lacks.

    Clients that need the same things get the same message: one copy in memory serves all.

    Args:
        config: says how much of a package one message may bring.
        state: where the run stands; patches too old to be of use are dropped from it.
        parcel: the state's package as it travels.
        make: the message, from what of the package (or nothing) and the patches it carries.

    Returns:
        A function from what is known of a client's store to its sealed message.
    """
    state.patches = useful(state.patches, parcel.size)
    made: dict[tuple[frozenset[str] | None, int], Envelope] = {}
    most = most_bytes(config)

    def request(holds: Holds) -> Envelope:
        some = share(parcel, holds, most)
        size = some.size or parcel.size
        whole, chain = delivery(holds.have or (), state.digest, size, state.patches)
        if holds.lacks is not None and state.digest in (holds.have or ()):
            whole = True  # it says so itself
        key = (frozenset(some.sizes) if whole else None, len(chain))
        if key not in made:
            message = seal(make(some.to_bytes() if whole else b"", chain))
            evict.put(made, key, message, _KEPT_MESSAGES)
        return made[key]

    return request


def expected(config: Config, state: State, round: int, sent: Tensors, count_rule: str) -> Expected:
    """What a good reply of this round looks like.

    Args:
        config: the run's configuration.
        state: where the run stands; its package says which neurons can be counted.
        round: the round asked for.
        sent: the adapter as clients decode it, float32.
        count_rule: how clients are to count inactive neurons; empty = no counts are expected.

    Returns:
        What replies are held against.
    """
    meta = state.package.meta
    plan = meta.plan
    return Expected(
        round=round,
        digest=state.digest,
        fmt=reply_format(config),
        adapter=sent,
        max_update_norm=config.wire.max_update_norm,
        count_blocks={b: len(plan.blocks[b].kept) for b in plan.pruned} if count_rule else {},
        task=meta.task,
        tokens_per_row=meta.max_length if meta.task.reads == "text" else _MOST_PATCHES,
        factors=factors(config.federation.aggregate, round),
    )
