"""What a task is: everything that differs between, say, classification and generation.

Nothing outside this folder knows what a label means, which score counts, or where a head reads.
A task is a small frozen value: packages carry its name and labels, and `fedpft_core.task.make`
makes it from these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from fedpft_core.data.chat import Say
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import Splits
from fedpft_core.model.batch import Position
from fedpft_core.model.device import Batch
from fedpft_core.model.families import Family
from fedpft_core.model.load import TaskModel
from fedpft_core.task.score import Metric, Score

MOST_TOKENS = 2**31
"""Tokens that no row has."""


class Task(Protocol):
    """One kind of task with its labels; `classify.Classify` is one.

    Methods may assume batches and models of this task. A task without something says so (an empty
    tuple, None) instead of raising.
    """

    @property
    def name(self) -> str:
        """What packages and node configs call this kind of task."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of what the head puts out; empty where they are not known yet, or mean nothing."""

    @property
    def reads(self) -> str:
        """What its rows are to a model: `text`, `image` or `captioned image`."""

    @property
    def metric(self) -> Metric:
        """The metric that decides."""

    @property
    def further(self) -> tuple[Metric, ...]:
        """Metrics that are shown beside it, in this order; empty where there are none."""

    # --- the model ---

    def model(self) -> TaskModel:
        """What of the model library the task is done with.

        Returns:
            What the rows are, the library's class, and the fields of its config.
        """

    def head(self, family: Family) -> tuple[str, ...]:
        """Which modules are the head and are trained whole.

        Args:
            family: of the model.

        Returns:
            Paths in the bare task model; none if there is no head.
        """

    def position(self, family: Family) -> Position:
        """Which positions of the last block's output the head reads.

        Args:
            family: of the model.

        Returns:
            `first`, `last` or `every`.
        """

    @property
    def per_position(self) -> bool:
        """Whether a row has many answers, each at a position of its own, instead of one."""

    @property
    def refits(self) -> bool:
        """Whether the head ends in one linear layer over one feature vector for each answer."""

    @property
    def closed_form(self) -> str:
        """How the head follows from sums over rows: a name of `fedpft_core.head.closed.FORMS`.

        Empty where it cannot be had so; otherwise the head also has `refits`.
        """

    # --- rows ---

    def read(self, path: str | Path, columns: Columns, key: str = "") -> Examples:
        """All rows of one file, in file order.

        Args:
            path: .csv, .tsv, .json, .jsonl or .parquet file.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            Inputs, and what is to be learned of each.

        Raises:
            UserError: anything wrong in the file, naming it and, where there is one, the row.
        """

    def learn(self, path: str | Path, columns: Columns, key: str = "") -> Task:
        """The same task with the labels that a file's rows have.

        Args:
            path: as `read` takes it.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            A task of the same name; this one stays as it is.

        Raises:
            UserError: as `read` does.
        """

    def strata(self, examples: Examples) -> np.ndarray:
        """The group of each row: subsets and partitions go by it.

        Args:
            examples: rows of this task.

        Returns:
            int64 (rows,).
        """

    def histogram(self, examples: Examples) -> dict[str, int]:
        """How many rows each label has.

        Args:
            examples: rows of this task.

        Returns:
            Rows by label, 0 included; empty where that means nothing.
        """

    def encode(
        self, examples: Examples, processor: Any, max_length: int, say: Say | None = None
    ) -> Encoded:
        """Rows as model inputs with what the loss needs.

        Args:
            examples: rows of this task.
            processor: a Hugging Face tokenizer for texts, an image processor for images.
            max_length: tokens per row at most, special tokens included; unused for images.
            say: told in one sentence how many rows were cut; None for nobody.

        Returns:
            The rows in their order.
        """

    def any_labels(self, rows: int) -> Tensor:
        """Labels that so many rows may have, for trying a step on inputs that mean nothing.

        Args:
            rows: how many labels are wanted.

        Returns:
            A batch's labels, first axis rows.
        """

    # --- training and scoring ---

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        """The loss of a batch.

        Args:
            model: a model of this task.
            batch: inputs and labels, on the model's device.
            reduction: `mean` over what the task counts (see `count`), or `sum`.

        Returns:
            A scalar.
        """

    def count(self, batch: Batch) -> int:
        """How many terms the mean loss of a batch is over (rows here).

        Args:
            batch: inputs and labels.

        Returns:
            The number by which `loss` divides its sum.
        """

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """What a batch adds to the figures scores are made from; `rows` is one of them.

        Figures add up over batches. They may say more of the rows than is to leave a client: what
        leaves it is named by `sent`.

        Args:
            model: a model of this task, in eval mode.
            batch: inputs and labels, on the model's device.

        Returns:
            Figures by name.
        """

    @property
    def sent(self) -> tuple[str, ...]:
        """Which of these figures a client may send to the server; the others never leave it.

        The metric that decides must follow from them alone. They add up over clients.
        """

    def score(self, sums: Mapping[str, float], seconds: float = 0.0) -> Score:
        """The score that such figures come to.

        Args:
            sums: figures as `sums` gives them, added up, or only those that `sent` names; none
                where there are no rows.
            seconds: time that scoring took.

        Returns:
            The score, with the further metrics that follow from these figures; no rows give 0.
        """

    def check_sums(
        self, sums: Mapping[str, float], rows: int, tokens_per_row: int = MOST_TOKENS
    ) -> None:
        """Refuse figures that so many rows cannot have; where there are no rows, none may be.

        Args:
            sums: figures that a client has sent.
            rows: rows that the client announced it keeps from training.
            tokens_per_row: the most tokens that a row has.

        Raises:
            ValueError: saying what is wrong.
        """

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the head puts out for a batch.

        Args:
            model: a model of this task.
            batch: inputs, on the model's device; labels are not looked at.

        Returns:
            [B, ...].
        """

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """How far a head's outputs are from others for the same rows.

        Args:
            outputs: [N, ...], as `outputs` gives them.
            target: the outputs they should come to, of the same shape.

        Returns:
            A scalar of at least 0.
        """

    def each(self, values: Tensor, batch: Batch) -> Tensor:
        """What of a model's values has an answer: one vector for each thing that is judged.

        Args:
            values: features or outputs for a batch, [B, ...] as the head has them.
            batch: the batch they are of. Where it has no labels, everything that could have one
                is judged.

        Returns:
            [N, ...] in the order of `answers`.
        """

    def answers(self, batch: Batch) -> Tensor:
        """What is to be learned of each thing that is judged.

        Args:
            batch: with labels.

        Returns:
            First axis N.
        """

    def merit(self, outputs: Tensor, answers: Tensor) -> float:
        """How good a head's outputs are; adds up over what is judged, more is better.

        Args:
            outputs: [N, ...], as `each` gives them.
            answers: of the same N.

        Returns:
            A number, such as the rows that are right.
        """

    @property
    def judged(self) -> Metric:
        """What `merit` over N is called, and whether that is a share."""

    # --- reference points ---

    @property
    def baselines(self) -> tuple[str, ...]:
        """The reference points that make sense: `linear-probe`, `tf-idf`."""

    def fit_baseline(
        self, name: str, train: tuple[Any, np.ndarray], test: tuple[Any, np.ndarray], seed: int
    ) -> Score:
        """Fit a reference point and score it.

        Args:
            name: one of `baselines`.
            train: (x, labels) to fit to, x being features for `linear-probe`, one vector [D] for
                each thing that is judged, and texts for `tf-idf`.
            test: the same, to score.
            seed: of the fit.

        Returns:
            The score on the rows of `test`.
        """


@dataclass(frozen=True)
class TaskData:
    """A task with its rows."""

    name: str
    """The ``data.train`` value it came from, for reports."""
    task: Task
    splits: Splits

    @property
    def train(self) -> Examples:
        """Rows shared out among the clients."""
        return self.splits.train

    @property
    def validation(self) -> Examples:
        """Rows the server may use for choices; empty if none were asked for."""
        return self.splits.validation

    @property
    def test(self) -> Examples:
        """Rows for reporting only."""
        return self.splits.test

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of its files cannot be used, a sentence each, with nothing that stands in them."""
        return self.splits.left_out
