"""Classification of texts, pairs of texts and images: one label a row, of a fixed set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import nan, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Table, cell_text
from fedpft_core.errors import UserError
from fedpft_core.model.device import Batch
from fedpft_core.model.load import TaskModel
from fedpft_core.task.base import MOST_TOKENS
from fedpft_core.task.figures import announced, check_loss
from fedpft_core.task.labels import (
    STRANGE,
    LabelTable,
    label_names,
    label_settings,
    names_from_rows,
    shown,
)
from fedpft_core.task.row import RowTask, logits
from fedpft_core.task.score import Metric, Score

ACCURACY = Metric("accuracy", higher_is_better=True, share=True)
MACRO_F1 = Metric("macro-F1", higher_is_better=True, share=True)
MATTHEWS = Metric("Matthews correlation", higher_is_better=True, share=False)


@dataclass(frozen=True)
class Classify(RowTask):
    """Which of some labels a row has; see `fedpft_core.task.base.Task` for each part.

    It is called `text`, `pair` or `image`, by what the rows are. Class c is called labels[c];
    where labels are not known yet, the rows of a file are read with the labels they have.
    """

    metric = ACCURACY
    further = (MACRO_F1, MATTHEWS)
    # Not the figures by class: they would tell how many validation rows are of each class.
    sent = ("rows", "correct", "loss")
    closed_form = "classes"
    judged = Metric("rows right", higher_is_better=True, share=True)

    def settled(self, table: Table, setting: str = "") -> Classify:
        """The task with the labels that are listed, or else those of the rows.

        Args:
            table: the rows that tell them where no setting does.
            setting: the value of ``data.labels``; "" for none.

        Returns:
            A task with two labels or more.

        Raises:
            UserError: the rows have fewer than two labels, or the setting cannot be used.
        """
        if setting:
            names = label_names(setting)
        else:
            names = table.names or names_from_rows(table.cells, table.where)
        if len(names) < 2:
            raise UserError(
                f"{table.where}: only one label, {names[0]!r}; classification needs two or more."
            )
        return Classify(self.name, names)

    def learned(self, table: Table) -> Classify:
        """The task with the labels that some rows have, sorted.

        Args:
            table: rows as read.

        Returns:
            A task of the same name; this one stays as it is.

        Raises:
            UserError: there are no rows.
        """
        return Classify(self.name, names_from_rows(table.cells, table.where))

    def examples(self, table: Table) -> Examples:
        """Rows with their class numbers; cells are matched as `label_index` says.

        Args:
            table: rows as read.

        Returns:
            The rows in their order.

        Raises:
            UserError: a row's label is unknown.
        """
        known = LabelTable(self.labels)
        numbers = np.empty(len(table.cells), dtype=np.int64)
        for i, value in enumerate(table.cells):
            number = known.index(value)
            if number is None:
                raise UserError(
                    f"{table.where}: row {table.row(i)} has the unknown label "
                    f"{cell_text(value)!r}; known are {shown(self.labels)}.",
                    public=STRANGE,
                )
            numbers[i] = number
        return Examples(table.inputs, numbers)

    # --- the model ---

    def model(self) -> TaskModel:
        """A classifier of the model library with one output a label.

        Returns:
            The library's class and the config's fields that name the labels.
        """
        return TaskModel(
            reads=self.reads,
            auto=self.auto,
            settings=label_settings(self.labels) | {"problem_type": "single_label_classification"},
        )

    # --- rows ---

    def strata(self, examples: Examples) -> np.ndarray:
        """Rows go by their label.

        Args:
            examples: rows of this task.

        Returns:
            Class number of each row, int64 (rows,).
        """
        return examples.labels

    def histogram(self, examples: Examples) -> dict[str, int]:
        """Rows of each label.

        Args:
            examples: rows of this task.

        Returns:
            By label in the task's order, 0 included.
        """
        counts = np.bincount(examples.labels, minlength=len(self.labels))
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def any_labels(self, rows: int) -> Tensor:
        """The first class for every row.

        Args:
            rows: how many labels are wanted.

        Returns:
            int64 (rows,), zeros.
        """
        return torch.zeros(rows, dtype=torch.int64)

    # --- training and scoring ---

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        """Cross-entropy over the classes.

        Args:
            model: a classifier, with or without the adapter.
            batch: inputs and labels, on the model's device.
            reduction: `mean` over rows, or `sum`.

        Returns:
            A scalar.
        """
        return F.cross_entropy(logits(model, batch), batch["labels"], reduction=reduction)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Rows, rows right, their summed cross-entropies, F1's parts, and which class was named.

        Args:
            model: a classifier in eval mode.
            batch: inputs and labels, on the model's device.

        Returns:
            `rows`, `correct`, `loss`, for each class c `hits c`, `named c` and `given c` (see
            `_by_class`), and `pair a b` (see `_pairs`).
        """
        scores, labels = logits(model, batch), batch["labels"]
        return {
            "rows": len(scores),
            "correct": self.merit(scores, labels),
            "loss": float(F.cross_entropy(scores, labels, reduction="sum")),
            **_by_class(scores.argmax(-1).cpu(), labels.cpu(), scores.shape[-1]),
            **_pairs(scores.argmax(-1).cpu(), labels.cpu()),
        }

    def score(self, sums: Mapping[str, float], seconds: float = 0.0) -> Score:
        """Accuracy, with the standard error of a binomial share, macro-F1 and Matthews correlation.

        The latter two have no standard error: they are no means over rows, and the figures by
        class do not tell which class a wrong row was given.

        Args:
            sums: `rows`, `correct` and `loss`; one that is missing counts as 0. Where there are
                none by class, as in what clients send, the further metrics are left out.
            seconds: time that scoring took.

        Returns:
            The score, its loss a mean over rows; no rows give 0.
        """
        rows = int(sums.get("rows", 0))
        n = max(rows, 1)
        value, loss = sums.get("correct", 0) / n, sums.get("loss", 0.0) / n
        error = sqrt(value * (1 - value) / n)
        more = _macro_f1(sums) | _matthews(sums)
        return Score(ACCURACY, value, error, loss, rows, seconds, more, dict(sums))

    def check_sums(
        self, sums: Mapping[str, float], rows: int, tokens_per_row: int = MOST_TOKENS
    ) -> None:
        """Right rows are whole and within the rows; the loss is a sum of what is never below 0.

        Args:
            sums: figures that a client has sent.
            rows: rows that the client announced it keeps from training.
            tokens_per_row: unused; what counts is rows.

        Raises:
            ValueError: the figures are others than these, or those that so many rows cannot have.
        """
        if not announced(sums, self.sent, rows):
            return
        correct = sums["correct"]
        if type(correct) is not int or not 0 <= correct <= rows:
            raise ValueError(f"{correct} of {rows} validation rows cannot be right")
        check_loss(sums["loss"])

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean Kullback-Leibler divergence of the outputs' class shares from the target's.

        Args:
            outputs: class scores [N, classes].
            target: class scores of the same rows and shape.

        Returns:
            A scalar of at least 0.
        """
        return F.kl_div(
            F.log_softmax(outputs, -1), F.log_softmax(target, -1), reduction="batchmean",
            log_target=True,
        )  # fmt: skip

    def merit(self, outputs: Tensor, answers: Tensor) -> int:
        """Rows whose highest score is their label's.

        Args:
            outputs: class scores [N, classes].
            answers: int64 [N], on any device.

        Returns:
            How many rows are right.
        """
        return int((outputs.argmax(-1) == answers.to(outputs.device)).sum())

    # --- reference points ---

    def fit_baseline(
        self, name: str, train: tuple[Any, np.ndarray], test: tuple[Any, np.ndarray], seed: int
    ) -> Score:
        """A logistic regression on features, or on TF-IDF of words and word pairs.

        Args:
            name: `linear-probe` or `tf-idf`.
            train: (x, labels) to fit to, x being features [rows, D] for `linear-probe` and texts
                for `tf-idf`.
            test: the same, to score.
            seed: of the solver.

        Returns:
            Accuracy and macro-F1 on the rows of `test`; there is no loss.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if name == "tf-idf":
            before: Any = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
            strength = 10.0
        else:
            before, strength = StandardScaler(), 0.1
        found = make_pipeline(
            before, LogisticRegression(C=strength, max_iter=300, random_state=seed)
        )
        found.fit(*train)
        x, labels = test
        named = found.predict(x)
        sums = {"rows": len(labels), "correct": int((named == labels).sum())}
        by_class = _by_class(torch.as_tensor(named), torch.as_tensor(labels), len(self.labels))
        return replace(self.score(sums | by_class), loss=nan)


def _by_class(named: Tensor, labels: Tensor, classes: int) -> dict[str, int]:
    """What F1 of each class needs.

    Args:
        named: int64 [N], the class each row was given.
        labels: int64 [N], the class it has.
        classes: how many there are.

    Returns:
        For every class c `hits c`, its rows that are right, `named c`, how often it stands in
        `named` or in `labels` (F1 is twice the one over the other), and `given c`, how often it
        stands in `named`.
    """
    hits = torch.bincount(labels[named == labels], minlength=classes).tolist()
    given = torch.bincount(named, minlength=classes).tolist()
    has = torch.bincount(labels, minlength=classes).tolist()
    return {
        name: n
        for c in range(classes)
        for name, n in (
            (f"hits {c}", hits[c]), (f"named {c}", given[c] + has[c]), (f"given {c}", given[c])
        )
    }  # fmt: skip


def _pairs(named: Tensor, labels: Tensor) -> dict[str, int]:
    """The confusion table: for classes a and b, rows of a that were given b, without zeros.

    Args:
        named: int64 [N], the class each row was given.
        labels: int64 [N], the class it has.

    Returns:
        Rows by `pair a b`.
    """
    found, counts = torch.stack([labels, named]).unique(dim=1, return_counts=True)
    return {f"pair {a} {b}": n for (a, b), n in zip(found.T.tolist(), counts.tolist(), strict=True)}


def confusion(sums: Mapping[str, float]) -> list[list[int]]:
    """The confusion table that a score was made from.

    Args:
        sums: of a score of this task, or of another.

    Returns:
        [class, class that was given, rows], ascending, without zeros; empty where the sums do not
        tell.
    """
    pairs = [(name.split()[1:], n) for name, n in sums.items() if name.startswith("pair ")]
    return sorted([int(a), int(b), int(n)] for (a, b), n in pairs)


def _macro_f1(sums: Mapping[str, float]) -> dict[str, float]:
    """The mean of F1 over the classes that a row has or was given; empty without any."""
    each = [
        2 * sums[f"hits {name.removeprefix('named ')}"] / count
        for name, count in sums.items()
        if name.startswith("named ") and count
    ]
    return {MACRO_F1.name: sum(each) / len(each)} if each else {}


def _matthews(sums: Mapping[str, float]) -> dict[str, float]:
    """The correlation of classes given and classes had; 0 where either never changes.

    Args:
        sums: with the figures by class, or without any.

    Returns:
        The coefficient from the margins of the confusion matrix (Gorodkin 2004, "Comparing two
        K-category assignments by a K-category correlation coefficient", equation 8), by the
        metric's name; empty without figures by class.
    """
    given = {name.removeprefix("given "): n for name, n in sums.items() if name.startswith("given")}
    rows = sum(given.values())
    if not rows:
        return {}
    has = {c: sums[f"named {c}"] - n for c, n in given.items()}
    agree = rows * sum(sums[f"hits {c}"] for c in given) - sum(has[c] * given[c] for c in given)
    spread = (rows**2 - sum(n**2 for n in given.values())) * (
        rows**2 - sum(n**2 for n in has.values())
    )
    return {MATTHEWS.name: agree / sqrt(spread) if spread else 0.0}
