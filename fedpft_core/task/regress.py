"""Regression: one number for a text, a pair of texts or an image, such as how alike two are.

Numbers are learned in the unit they have in the file, so that the exported model answers in it;
they are not standardised. The head from statistics (ridge regression) has their mean and spread
from the start. The loss is the squared error.

Shape letters: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.data.examples import Examples
from fedpft_core.data.faults import RowFault
from fedpft_core.data.rows import Table
from fedpft_core.errors import UserError
from fedpft_core.model.device import Batch
from fedpft_core.model.load import TaskModel
from fedpft_core.task.base import MOST_TOKENS
from fedpft_core.task.figures import announced
from fedpft_core.task.row import RowTask, logits
from fedpft_core.task.score import Metric, Score

PEARSON = Metric("Pearson correlation", higher_is_better=True, share=False)
SPEARMAN = Metric("Spearman correlation", higher_is_better=True, share=False)
RMSE = Metric("RMSE", higher_is_better=False, share=False)

_BINS = 10  # groups of the rows by their number, for subsets and partitions
_OVER = 1e-6  # share by which sums may miss what rows can have, for rounding
_LARGEST = 1e30  # beyond it the square of a float32 is no number any more


@dataclass(frozen=True)
class Regress(RowTask):
    """Which number a row has; see `fedpft_core.task.base.Task` for each part.

    It is called `text-regression`, `pair-regression` or `image-regression`, by what the rows are.
    It has no labels.
    """

    metric = PEARSON
    further = (SPEARMAN, RMSE)
    # Sums only: not the numbers themselves, which the ranks of Spearman's correlation need.
    sent = ("rows", "loss", "label", "answer", "label^2", "answer^2", "label*answer")
    named = False
    closed_form = "values"
    judged = Metric("negative squared error", higher_is_better=True, share=False)

    def settled(self, table: Table, setting: str = "") -> Regress:
        """The task itself: numbers have no names.

        Args:
            table: not looked at.
            setting: the value of ``data.labels``, which must be "".

        Returns:
            This task.

        Raises:
            UserError: names are given.
        """
        if setting:
            raise UserError(
                "data.labels is set, but the labels of data.task = regress are numbers."
            )
        return self

    @staticmethod
    def usable(table: Table) -> Table:
        """The rows whose cells are finite numbers.

        Args:
            table: rows as read.

        Returns:
            The table without the others.

        Raises:
            UserError: more rows than may be cannot be used.
        """
        return table.keep(lambda i: _number_in(table, i))

    def learned(self, table: Table) -> Regress:
        """The task itself: numbers have no names.

        Args:
            table: not looked at.

        Returns:
            This task.
        """
        return self

    def examples(self, table: Table) -> Examples:
        """Rows with their numbers.

        Args:
            table: rows as read.

        Returns:
            The rows in their order, labels float32.

        Raises:
            UserError: a label is no finite number; the cell is not quoted.
        """
        numbers = np.empty(len(table.cells), dtype=np.float32)
        for i in range(len(table.cells)):
            numbers[i] = _number_in(table, i)
        return Examples(table.inputs, numbers)

    # --- the model ---

    def model(self) -> TaskModel:
        """A model of the library with one output.

        Returns:
            The library's class and the config's fields.
        """
        return TaskModel(
            reads=self.reads,
            auto=self.auto,
            settings={
                "num_labels": 1,
                "id2label": {0: "LABEL_0"},
                "label2id": {"LABEL_0": 0},
                "problem_type": "regression",
            },
        )

    # --- rows ---

    def strata(self, examples: Examples) -> np.ndarray:
        """Rows go by the tenth that their number lies in.

        Args:
            examples: rows of this task.

        Returns:
            Group of each row, int64 (rows,); equal numbers are in the same group.
        """
        labels = examples.labels
        return np.searchsorted(_edges(labels), labels, side="right").astype(np.int64)

    def histogram(self, examples: Examples) -> dict[str, int]:
        """Rows between the quartiles of their numbers.

        Args:
            examples: rows of this task.

        Returns:
            By the least and the largest number of each quarter; empty without rows.
        """
        labels = examples.labels
        quarter = np.searchsorted(_edges(labels, 4), labels, side="right")
        found = [labels[quarter == q] for q in np.unique(quarter)]
        return {f"{part.min():g} to {part.max():g}": len(part) for part in found}

    def any_labels(self, rows: int) -> Tensor:
        """0 for every row.

        Args:
            rows: how many labels are wanted.

        Returns:
            float32 (rows,), zeros.
        """
        return torch.zeros(rows)

    # --- training and scoring ---

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        """Squared error.

        Args:
            model: a model with one output, with or without the adapter.
            batch: inputs and labels, on the model's device.
            reduction: `mean` over rows, or `sum`.

        Returns:
            A scalar.
        """
        found = logits(model, batch)[:, 0]
        return F.mse_loss(found, batch["labels"].to(found), reduction=reduction)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Rows, squared error, the sums that correlation follows from, and the numbers themselves.

        Args:
            model: a model with one output, in eval mode.
            batch: inputs, labels and `index`, on the model's device.

        Returns:
            What `sent` names, and for each row i `label i` and `answer i`, which never leave.
        """
        answer = logits(model, batch)[:, 0].double().cpu().numpy()
        label = batch["labels"].double().cpu().numpy()
        return _sums(label, answer, batch["index"].tolist())

    def score(self, sums: Mapping[str, float], seconds: float = 0.0) -> Score:
        """Pearson's correlation with its standard error, Spearman's, and the root of the loss.

        The standard error (1 - r^2) / sqrt(N - 1) is that of large samples of normal numbers. A
        correlation with answers or labels that are all equal is 0.

        Args:
            sums: as `sums` gives them, added up; without the rows' own numbers Spearman's
                correlation is left out.
            seconds: time that scoring took.

        Returns:
            The score, its loss a mean over rows; no rows give 0.
        """
        rows = int(sums.get("rows", 0))
        loss = sums.get("loss", 0.0) / max(rows, 1)
        value = _pearson(sums)
        error = (1 - value**2) / sqrt(max(rows - 1, 1))
        more = _spearman(sums) | {RMSE.name: sqrt(loss)}
        return Score(PEARSON, value, error, loss, rows, seconds, more, dict(sums))

    def check_sums(
        self, sums: Mapping[str, float], rows: int, tokens_per_row: int = MOST_TOKENS
    ) -> None:
        """Squares are not smaller than sums allow, nor the products larger than squares allow.

        Args:
            sums: figures that a client has sent.
            rows: rows that the client announced it keeps from training.
            tokens_per_row: unused; what counts is rows.

        Raises:
            ValueError: the figures are others than these, or those that so many rows cannot have.
        """
        if not announced(sums, self.sent, rows):
            return
        # So small that products of two are numbers as well.
        if not all(abs(value) < 1e150 for value in sums.values()):
            raise ValueError("a figure of the validation rows is no finite number")
        y, p = float(sums["label"]), float(sums["answer"])
        yy, pp, yp = (float(sums[name]) for name in ("label^2", "answer^2", "label*answer"))
        slack = _OVER * (yy + pp)
        # The scatter of (1, label, answer) has no negative direction.
        vy, vp, vyp = yy - y * y / rows, pp - p * p / rows, yp - y * p / rows
        if (
            min(yy, pp) < 0
            or min(vy, vp) < -slack
            or abs(vyp) > sqrt(max(vy, 0) * max(vp, 0)) + slack
        ):
            raise ValueError("no validation rows have these sums of labels and answers")
        if abs(float(sums["loss"]) - (yy - 2 * yp + pp)) > slack:
            raise ValueError("the loss of the validation rows is not that of their sums")

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean squared difference.

        Args:
            outputs: [N, 1].
            target: of the same rows and shape.

        Returns:
            A scalar of at least 0.
        """
        return F.mse_loss(outputs, target)

    def merit(self, outputs: Tensor, answers: Tensor) -> float:
        """The squared error, negated.

        Args:
            outputs: [N, 1].
            answers: float [N], on any device.

        Returns:
            At most 0.
        """
        return -float((outputs[:, 0] - answers.to(outputs)).square().sum())

    # --- reference points ---

    def fit_baseline(
        self, name: str, train: tuple[Any, np.ndarray], test: tuple[Any, np.ndarray], seed: int
    ) -> Score:
        """Ridge regression on features, or on TF-IDF of words and word pairs.

        Args:
            name: `linear-probe` or `tf-idf`.
            train: (x, labels) to fit to, x being features [rows, D] for `linear-probe` and texts
                for `tf-idf`.
            test: the same, to score.
            seed: of the solver.

        Returns:
            The score on the rows of `test`, its pull chosen by cross-validation on `train`.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge, RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if name == "tf-idf":
            before: Any = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
            last: Any = Ridge(alpha=1.0, random_state=seed)
        else:
            before, last = StandardScaler(), RidgeCV(alphas=np.logspace(-1, 5, 13))
        found = make_pipeline(before, last).fit(*train)
        x, labels = test
        answer = np.asarray(found.predict(x), dtype=np.float64)
        return self.score(_sums(labels.astype(np.float64), answer, range(len(labels))))


def _number_in(table: Table, i: int) -> float:
    """The number in a row's label cell; RowFault for a cell that holds none."""
    number = _number(table.cells[i])
    if number is None:
        raise RowFault(
            f"{table.where}: row {table.row(i)} has a label that is no finite number, which "
            "data.task = regress needs.",
            "with a label that is no number",
        )
    return number


def _number(value: Any) -> float | None:
    """The number a cell holds, or None; nothing that float32 cannot square is one."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isfinite(number) and abs(number) < _LARGEST else None


def _edges(labels: np.ndarray, groups: int = _BINS) -> np.ndarray:
    """Inner bounds of as many groups of about equal size; fewer where numbers repeat."""
    if not len(labels):
        return np.zeros(0)
    return np.unique(np.quantile(labels, np.arange(1, groups) / groups))


def _sums(label: np.ndarray, answer: np.ndarray, index: Any) -> dict[str, float]:
    sums: dict[str, float] = {
        "rows": len(label),
        "loss": float(np.square(label - answer).sum()),
        "label": float(label.sum()),
        "answer": float(answer.sum()),
        "label^2": float(np.square(label).sum()),
        "answer^2": float(np.square(answer).sum()),
        "label*answer": float((label * answer).sum()),
    }
    for i, y, p in zip(index, label.tolist(), answer.tolist(), strict=True):
        sums[f"label {i}"], sums[f"answer {i}"] = y, p
    return sums


def _pearson(sums: Mapping[str, float]) -> float:
    """The correlation of answers and labels from their sums; 0 where either never changes."""
    rows = sums.get("rows", 0)
    if not rows:
        return 0.0
    y, p = sums["label"] / rows, sums["answer"] / rows
    # What rounding leaves of numbers that are all equal is no spread.
    vy, vp = sums["label^2"] / rows - y * y, sums["answer^2"] / rows - p * p
    if vy <= 1e-12 * sums["label^2"] / rows or vp <= 1e-12 * sums["answer^2"] / rows:
        return 0.0
    found = (sums["label*answer"] / rows - y * p) / sqrt(vy * vp)
    return min(1.0, max(-1.0, found))


def _spearman(sums: Mapping[str, float]) -> dict[str, float]:
    """The correlation of ranks, by the metric's name; empty without the rows' own numbers."""
    from scipy.stats import spearmanr

    rows = [name.removeprefix("label ") for name in sums if name.startswith("label ")]
    if not rows:
        return {}
    label, answer = ([sums[f"{what} {i}"] for i in rows] for what in ("label", "answer"))
    if min(len(set(label)), len(set(answer))) < 2:
        return {SPEARMAN.name: 0.0}
    return {SPEARMAN.name: float(spearmanr(label, answer).statistic)}
