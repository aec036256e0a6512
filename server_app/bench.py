"""What every phase of a run works on: the models, the rows to measure them on, the settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpft_core.config import Config
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Examples
from fedpft_core.data.splits import stratified_subset
from fedpft_core.data.stream import public_batches
from fedpft_core.model.batch import Position
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.package import make_package
from fedpft_core.seeds import derive, numpy_stream
from fedpft_core.task import Painter, Task, TaskData
from fedpft_core.wire.package import Package
from server_app.models import Models
from server_app.owner.neurons import Ledger
from server_app.state import Events, State, fresh_state, version_of


@dataclass
class Rows:
    """The server's rows: the task's, the public corpus, and what of the former is encoded."""

    config: Config
    data: TaskData
    public: list[Any]
    processor: Any
    scored: Encoded  # the rows of run.eval-split
    gradient: Encoded  # the validation rows that gradient agreement is measured on

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.data.task

    @cached_property
    def validation(self) -> Encoded:
        """The server's validation rows as model inputs."""
        if self.config.run.eval_split == "validation":
            return self.scored
        return self.encode(self.data.validation)

    @cached_property
    def samples(self) -> Examples:
        """The rows of run.eval-split that models write or paint for, drawn once for a run."""
        scored = self.data.test if self.config.run.eval_split == "test" else self.data.validation
        stream = numpy_stream(self.config.run.seed, "samples")
        if isinstance(self.task, Painter):
            # Not one prompt several times and another never.
            count = min(self.config.run.samples, len(scored))
            return scored.select(stratified_subset(self.task.strata(scored), count, stream))
        order = stream.permutation(len(scored))
        return scored.select(np.sort(order[: self.config.run.samples]))

    def encode(self, examples: Examples) -> Encoded:
        """Turn rows into model inputs.

        Args:
            examples: rows of the task.

        Returns:
            The rows, of texts at most data.max-length tokens each.
        """
        return self.task.encode(examples, self.processor, self.config.data.max_length)

    def public_batches(self, steps: int, *purpose: str | int, rows: int = 0) -> Iterator[Any]:
        """Serve `steps` public batches, always the same for the same purpose.

        Args:
            steps: number of batches.
            *purpose: names what they are for; the order of the rows is drawn from it and the seed.
            rows: rows of each; 0 for distill.batch-size.

        Returns:
            The batches, without labels.
        """
        return public_stream(self.config, self.public, self.processor, steps, *purpose, rows=rows)

    def public_rows(self, count: int, *purpose: str | int) -> Encoded:
        """About so many public rows without labels, always the same for the same purpose.

        Args:
            count: rows wanted, at least 1; whole batches are served, so it may become a few more.
            *purpose: names what they are for.

        Returns:
            The rows as model inputs; of texts each has distill.length tokens.
        """
        steps = math.ceil(count / self.config.distill.batch_size)
        served = list(self.public_batches(steps, *purpose))
        if "pixel_values" in served[0]:
            prompts = [b["prompt_ids"].to(torch.int32) for b in served if "prompt_ids" in b]
            return Encoded(
                labels=None,
                pixels=torch.cat([b["pixel_values"] for b in served]),
                prompts=torch.cat(prompts) if prompts else None,
            )
        ids = torch.cat([b["input_ids"] for b in served])
        types = [b["token_type_ids"] for b in served if "token_type_ids" in b]
        return Encoded(
            labels=None,
            ids=ids.reshape(-1).to(torch.int32),
            offsets=torch.arange(len(ids) + 1) * ids.shape[1],
            token_types=torch.cat(types).reshape(-1).to(torch.uint8) if types else None,
        )

    def probe(self) -> Iterator[Any]:
        """Public batches on which output error is measured: always the same.

        Returns:
            At least two batches and at least 32 rows, without labels.
        """
        rows = self.config.distill.batch_size
        return self.public_batches(max(2, math.ceil(32 / rows)), "probe")


@dataclass
class Bench:
    """One run's settings, log, models and rows."""

    config: Config
    events: Events
    models: Models
    rows: Rows
    device: torch.device
    ledger: Ledger | None = None  # of the FM's neurons; None before it is known who is served
    leaves: bool = False  # whether messages leave the machine

    @property
    def head_reads(self) -> Position:
        """Which positions of the last block's output the task's head reads."""
        return self.rows.task.position(family_of(self.models.plan.model_type))

    def package(self) -> Package:
        """The proxy as clients get it, with its present weights.

        These are rounded in place to wire.package first, so that the server goes on with what
        clients have; what has been rounded before stays as it is.

        Returns:
            A package of copies, without the adapter.

        Raises:
            UserError: there are weights too large for the format.
        """
        m = self.models
        hidden = self.config.plan.disguise != "none"
        return self._packed(m.proxy, m.plan.anonymous() if hidden else m.plan)

    def others(self) -> dict[str, Package]:
        """The other widths as clients get them, with their present weights, rounded likewise.

        The FM itself stays as it is at the server; clients get a rounded copy of it.

        Returns:
            Packages of copies by the width's name, narrowest first.

        Raises:
            UserError: there are weights too large for the format.
        """
        return {w.name: self._packed(w.proxy, w.plan) for w in self.models.others}

    def _packed(self, proxy: nn.Module, plan: Plan) -> Package:
        rows, wire = self.rows, self.config.wire
        return make_package(
            proxy, plan, self.models.spec, rows.processor, rows.task.name, rows.task.labels,
            self.config.data.max_length, wire.package, wire.embeddings,
            keep=proxy is not self.models.proxy and plan.is_full,
        )  # fmt: skip

    def fresh_state(self) -> State:
        """The state before round 1, with the proxy, and every other width, as it is now.

        Returns:
            A state that no client has been served from, under a new random name of the run.
        """
        state = fresh_state(self.models.start, self.package())
        state.width = self.models.width
        state.others = {name: version_of(package) for name, package in self.others().items()}
        return state


def public_stream(
    config: Config, public: list[Any], processor: Any, steps: int, *purpose: str | int,
    rows: int = 0,
) -> Iterator[Any]:  # fmt: skip
    """Serve `steps` public batches, a function of the run's seed and the purpose.

    Args:
        config: says how many rows a batch has, and of texts how many tokens a row has.
        public: public rows: texts as token ids, or encoded images.
        processor: the FM's tokenizer or image processor.
        steps: number of batches.
        *purpose: names what they are for.
        rows: rows of each; 0 for distill.batch-size.

    Returns:
        The batches, without labels.
    """
    d = config.distill
    seed = derive(config.run.seed, "public-batches", *purpose)
    return public_batches(public, processor, rows or d.batch_size, d.length, steps, seed)
