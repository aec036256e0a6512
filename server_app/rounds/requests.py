"""What a round sends to each client, and what a good answer to it looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedpft_core.adapter.layers import in_blocks
from fedpft_core.adapter.lora import rank_of
from fedpft_core.aggregation import factors, merging
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
from server_app.rounds.crossing import Crossing
from server_app.rounds.nodes import Node
from server_app.state import Given, State

_MOST_PATCHES = 2**16  # tokens an image can become

_MEGABYTE = 10**6
_KEPT_MESSAGES = 4  # made for what different clients lack

Request = Callable[[Holds], Envelope]
ByNode = Callable[[Node, Holds], Envelope]


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


def local_settings(config: Config, round: int, blocks: str = "") -> LocalSettings:
    """A client's work in a round.

    Args:
        config: the run's configuration.
        round: t, from 1.
        blocks: whose LoRA it trains, `first:n` or `last:n`; empty = all.

    Returns:
        Its rates, steps and the like.
    """
    t = config.train
    return LocalSettings(
        learning_rate(t.lr, round, config.federation.rounds), t.batch_size, t.local_epochs,
        t.local_steps, t.weight_decay, t.clip, t.threads, t.head_lr_scale, t.b_lr_scale,
        t.augment, factors(config.federation.aggregate, round), t.local_decay, blocks,
        t.gradient_checkpointing,
    )  # fmt: skip


def requests(
    config: Config, state: State, parcel: Parcel, round: int, adapter: Tensors, count_rule: str,
    blocks: str = "", answer: int = 0,
) -> Request:  # fmt: skip
    """A function from what a client has to the message it gets.

    Clients that need the same things get the same message: one copy in memory serves all.

    Args:
        config: the run's configuration.
        state: where the run stands; patches too old to be of use are dropped from it.
        parcel: the state's package as it travels.
        round: the round the messages begin.
        adapter: the adapter to start from, in the wire's format.
        count_rule: how clients are to count inactive neurons; empty = not at all.
        blocks: whose LoRA they train; empty = all.
        answer: bytes that a good reply can have; 0 for no limit.

    Returns:
        The function; see `by_need`.
    """
    fields = _fields(config, state, round, adapter, blocks)

    def make(package: bytes, patches: tuple[Patch, ...]) -> TrainRequest:
        return TrainRequest(**fields, count_rule=count_rule, package=package, patches=patches)

    return by_need(config, state, parcel, make, answer)


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


def _fields(
    config: Config, state: State, round: int, adapter: Tensors, blocks: str = ""
) -> dict[str, Any]:
    return {
        "round": round,
        "digest": state.digest,
        "adapter": adapter,
        "fmt": config.wire.adapter,
        "settings": local_settings(config, round, blocks),
        "seed": config.run.seed,
        "reply_fmt": reply_format(config),
        "run": state.run,
        "merging_rule": merging(config.federation.aggregate),
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
    answer: int = 0,
) -> Request:
    """A function from what a client has to the message that also brings what it lacks.

    Clients that need the same things get the same message: one copy in memory serves all.

    Args:
        config: says how much of a package one message may bring.
        state: where the run stands; patches too old to be of use are dropped from it.
        parcel: the state's package as it travels.
        make: the message, from what of the package (or nothing) and the patches it carries.
        answer: bytes that a good reply can have; 0 for no limit.

    Returns:
        A function from what is known of a client's store to its sealed message.
    """
    state.patches = useful(state.patches, parcel.size)
    made: dict[tuple[frozenset[str] | None, tuple[str, ...]], Envelope] = {}
    most = most_bytes(config)
    crossing = Crossing(state)

    def request(holds: Holds) -> Envelope:
        have, some = holds.have or (), share(parcel, holds, most)
        size = some.size or parcel.size
        whole, chain = delivery(have, state.digest, size, state.patches)
        if whole and state.beside:
            whole, chain = crossing(have, size)
        if holds.lacks is not None and state.digest in have:
            whole = True  # it says so itself
        key = (frozenset(some.sizes) if whole else None, tuple(p.source for p in chain))
        if key not in made:
            message = seal(make(some.to_bytes() if whole else b"", chain))
            evict.put(made, key, replace(message, answer=answer), _KEPT_MESSAGES)
        return made[key]

    return request


def by_node(
    state: State, parcel: Callable[[State], Parcel],
    make: Callable[[State, Parcel, str, int], Request],
) -> ByNode:  # fmt: skip
    """A function from a client and what it has to the message that it gets.

    Args:
        state: where the run stands; it has what each client has been given.
        parcel: gives the package of a view of the state as it travels.
        make: the messages to clients of one width, from the view of it, its package, the blocks
            whose LoRA they train, and its rank, 0 for the run's.

    Returns:
        The function. Clients that have been given the same and need the same get the same message.
    """
    made: dict[tuple[Given, int], Request] = {}
    if not state.others:
        made[Given(), 0] = make(state, parcel(state), "", 0)

    def request(node: Node, holds: Holds) -> Envelope:
        given = state.given.get(node.name, Given())
        key = Given(given.width, given.blocks), own_rank(state, node)
        if key not in made:
            view = state.of(node.name)
            made[key] = make(view, parcel(view), given.blocks, key[1])
        return made[key](holds)

    return request


def own_rank(state: State, node: Node) -> int:
    """The rank of LoRA that a client trains, where that is not the run's.

    Args:
        state: with the adapter of the run's rank.
        node: the client.

    Returns:
        A lower rank than the run's; 0 for the run's.
    """
    return node.rank if 0 < node.rank < rank_of(state.adapter) else 0


def wanted(state: State, make: Callable[[State, str, int], Expected]) -> Callable[[Node], Expected]:
    """A function from a client to what a good reply of it looks like.

    Args:
        state: where the run stands; it has what each client has been given.
        make: the same for all clients of one width, from the view of it, the blocks and the rank.

    Returns:
        The function.
    """
    made: dict[tuple[Given, int], Expected] = {}

    def want(node: Node) -> Expected:
        given = state.given.get(node.name, Given())
        key = Given(given.width, given.blocks), own_rank(state, node)
        if key not in made:
            made[key] = make(state.of(node.name), given.blocks, key[1])
        return made[key]

    return want


def expected(
    config: Config, state: State, round: int, sent: Tensors, count_rule: str, blocks: str = ""
) -> Expected:
    """What a good reply of this round looks like.

    Args:
        config: the run's configuration.
        state: where the run stands; its package says which neurons can be counted.
        round: the round asked for.
        sent: the adapter as clients decode it, float32.
        count_rule: how clients are to count inactive neurons; empty = no counts are expected.
        blocks: whose LoRA they train; empty = all.

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
        names=(
            frozenset(k for k in sent if in_blocks(k, blocks, plan)) if blocks else frozenset()
        ),
        widths={v.digest: name for name, v in state.beside.items()},
        merging_rule=merging(config.federation.aggregate),
    )  # fmt: skip
