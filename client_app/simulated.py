"""The clients of a simulation: rows, privacy and attacks are the run's to decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from client_app import attacks, means, private
from client_app.chain import Work
from client_app.client import Client
from client_app.process import PROCESS_CACHE, Held
from client_app.rows import split_sizes
from client_app.store import Store
from fedpft_core import config as configs
from fedpft_core.config.widths import width_names
from fedpft_core.data.examples import Examples
from fedpft_core.data.grouping import share_out
from fedpft_core.data.partition import client_names
from fedpft_core.errors import UserError
from fedpft_core.seeds import derive
from fedpft_core.task import Task, TaskData, load_task
from fedpft_core.tensors import Tensors

_STORED = 3  # sub-FMs that a simulation's store keeps of each width


@lru_cache(maxsize=2)
def _task(data: configs.DataConfig, seed: int) -> TaskData:
    return load_task(data, seed)


@lru_cache(maxsize=2)
def _partitions(
    data: configs.DataConfig,
    federation: configs.FederationConfig,
    seed: int,
    count: int,
    run_dir: str,
) -> list[Any]:
    found = _task(data, seed)
    return share_out(found.train, found.task.strata, federation, count, seed, run_dir)


def partition_rows(config: configs.Config, index: int, count: int) -> Examples:
    """The training rows of one simulated client.

    Args:
        config: the run's configuration: data, partition and seed decide.
        index: the client's number, from 0.
        count: how many clients share the rows.

    Returns:
        Its rows.

    Raises:
        UserError: the index is not below the count, or the data cannot be used.
    """
    if index >= count:
        raise UserError(f"partition-id {index} is not below num-partitions {count}.")
    # Only clusters hang on the run folder, and another run's are other ones.
    folder = config.run.dir if config.federation.partition_by == "cluster" else ""
    rows = _partitions(config.data, config.federation, config.run.seed, count, folder)[index]
    return _task(config.data, config.run.seed).train.select(rows)


def simulated_client(node: Mapping[str, Any], config: configs.Config) -> Client:
    """One of the run's own clients.

    Args:
        node: checked node config, with every key; `partition-id` says which client it is.
        config: the run's configuration.

    Returns:
        The client, which is an attacker where the run simulates some and this is one of them.

    Raises:
        UserError: the run's rows have other labels than the server's, once they are asked for.
    """
    index, count = node["partition-id"], node["num-partitions"]
    simulate = config.simulate
    bad = attacks.hostile(simulate, index, count)

    def load_rows(task: Task) -> Examples:
        rows = partition_rows(config, index, count)
        own = _task(config.data, config.run.seed).task
        if own.labels != task.labels:
            raise UserError(f"client {index} has labels {own.labels}, the server {task.labels}.")
        return attacks.poisoned(simulate, rows, len(task.labels)) if bad else rows

    share = node["validation-share"]

    def count_rows() -> tuple[int, int]:
        return split_sizes(partition_rows(config, index, count), share)

    # All clients share one store and one process, and with it the sub-FMs of every width.
    widths = max(1, len(width_names(config.plan.widths)))
    PROCESS_CACHE.max_models = max(PROCESS_CACHE.max_models, widths + 1)
    name = client_names(count)[index]
    root = Path(config.run.dir) / "clients" if config.run.dir else configs.home() / "clients"
    return Client(
        name=name,
        count_rows=count_rows,
        load_rows=load_rows,
        store=Store(root, keep=_STORED * widths),
        device=node["device"],
        max_threads=node["max-threads"],
        shared_store=True,
        rows_id=(
            config.data,
            config.federation,
            config.run.seed,
            index,
            count,
            bad and simulate,
            config.run.dir if config.federation.partition_by == "cluster" else "",
        ),
        attack=partial(_attack, node, config) if bad else None,
        own_rows=False,
        validation_share=share,
        private=_simulated_privacy(config, root / "privacy" / f"{name}.json"),
        means=means.of_simulated(node, config, index),
        rank=node["lora-rank"],
    )


def _attack(node: Mapping[str, Any], config: configs.Config, work: Work, held: Held) -> Tensors:
    """What a simulated attacker sends in place of what it has trained."""
    simulate, index, count = config.simulate, node["partition-id"], node["num-partitions"]
    if simulate.attack != "little-is-enough":
        seed = derive(config.run.seed, "attack", work.request.round, index)
        return attacks.spoiled(simulate, work.adapter, work.sent, seed)
    honest = replace(config, simulate=replace(simulate, attack="none"))
    fellows = [
        simulated_client({**node, "partition-id": i}, honest)
        for i in range(count)
        if attacks.hostile(simulate, i, count)
    ]
    return attacks.colluded(simulate, {f.name: partial(f.honest, held=held) for f in fellows}, work)


def _simulated_privacy(config: configs.Config, ledger: Path) -> private.ExamplePrivacy | None:
    """A simulated client has no owner: the run's configuration decides for it."""
    p = config.privacy
    if not p.example_noise:
        return None
    return private.ExamplePrivacy(
        p.example_noise, p.example_clip, p.example_epsilon, p.delta, ledger
    )
