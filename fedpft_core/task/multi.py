"""Multi-label classification: which of some labels a text, a pair or an image has, maybe none.

Shape letters: N rows, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.data.examples import Examples
from fedpft_core.data.faults import RowFault
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
from fedpft_core.task.ratio import check_ratio, ratio_sums, ratio_with_error
from fedpft_core.task.row import RowTask, logits
from fedpft_core.task.score import Metric, Score

MICRO_F1 = Metric("micro-F1", higher_is_better=True, share=True)
MACRO_F1 = Metric("macro-F1", higher_is_better=True, share=True)
EXACT = Metric("exact match", higher_is_better=True, share=True)
RANKING = Metric("ranking precision", higher_is_better=True, share=True)


@dataclass(frozen=True)
class MultiLabel(RowTask):
    """Which labels a row has; see `fedpft_core.task.base.Task` for each part.

    It is called `text-labels`, `pair-labels` or `image-labels`, by what the rows are. A label cell
    is a list of labels, or a text in which `Columns.separator` stands between them; an empty one
    is a row without any label. The head has an output for each label, and those above 0 are the
    ones a row is given.
    """

    metric = MICRO_F1
    further = (MACRO_F1, EXACT, RANKING)
    # Not the figures by label: they would tell how many validation rows have each label.
    sent = ("rows", "loss", "exact", "top", "below", "top^2", "top*below", "below^2")
    closed_form = "labels"
    judged = Metric("mean F1 of rows", higher_is_better=True, share=True)

    def settled(self, table: Table, setting: str = "") -> MultiLabel:
        """The task with the labels that are listed, or else those of the rows.

        Args:
            table: the rows that tell them where no setting does.
            setting: the value of ``data.labels``; "" for none.

        Returns:
            A task with two labels or more.

        Raises:
            UserError: the rows have fewer than two labels, or the setting cannot be used.
        """
        found = MultiLabel(self.name, label_names(setting)) if setting else self.learned(table)
        if len(found.labels) < 2:
            raise UserError(
                f"{table.where}: only one label, {found.labels[0]!r}; data.task = multi-label "
                "needs two or more."
            )
        return found

    @staticmethod
    def usable(table: Table) -> Table:
        """The rows whose cells hold labels.

        Args:
            table: rows as read.

        Returns:
            The table without the others.

        Raises:
            UserError: more rows than may be cannot be used.
        """
        return table.keep(lambda i: _set(table, i))

    def learned(self, table: Table) -> MultiLabel:
        """The task with the labels that some rows have, sorted.

        Args:
            table: rows as read.

        Returns:
            A task of the same name; this one stays as it is.

        Raises:
            UserError: no row has a label, or a cell holds no labels.
        """
        cells = [label for row in _sets(table) for label in row]
        if not cells:
            raise UserError(f"{table.where}: no row has a label.")
        return MultiLabel(self.name, names_from_rows(cells, table.where))

    def examples(self, table: Table) -> Examples:
        """Rows with a 1 for each label they have.

        Args:
            table: rows as read.

        Returns:
            The rows in their order, labels float32 [rows, K].

        Raises:
            UserError: a row's label is unknown, or a cell holds no labels; the cell is not quoted.
        """
        known, rows = LabelTable(self.labels), _sets(table)
        found = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        for i, row in enumerate(rows):
            for value in row:
                number = known.index(value)
                if number is None:
                    raise UserError(
                        f"{table.where}: row {table.row(i)} has an unknown label; known are "
                        f"{shown(self.labels)}.",
                        public=STRANGE,
                    )
                found[i, number] = 1
        return Examples(table.inputs, found)

    # --- the model ---

    def model(self) -> TaskModel:
        """A classifier of the model library with one output a label.

        Returns:
            The library's class and the config's fields that name the labels.
        """
        return TaskModel(
            reads=self.reads,
            auto=self.auto,
            settings=label_settings(self.labels) | {"problem_type": "multi_label_classification"},
        )

    # --- rows ---

    def strata(self, examples: Examples) -> np.ndarray:
        """Rows go by the first of their labels, in the task's order.

        Args:
            examples: rows of this task.

        Returns:
            Its number for each row, and K for a row without any; int64 (rows,).
        """
        labels = examples.labels
        first = labels.argmax(1) if len(labels) else np.zeros(0)
        return np.where(labels.any(1), first, len(self.labels)).astype(np.int64)

    def histogram(self, examples: Examples) -> dict[str, int]:
        """Rows that have each label; a row counts for all of its labels.

        Args:
            examples: rows of this task.

        Returns:
            By label in the task's order, 0 included.
        """
        counts = examples.labels.sum(0).astype(int).tolist()
        return dict(zip(self.labels, counts, strict=True))

    def any_labels(self, rows: int) -> Tensor:
        """No label for any row.

        Args:
            rows: how many rows.

        Returns:
            float32 (rows, K), zeros.
        """
        return torch.zeros(rows, len(self.labels))

    # --- training and scoring ---

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        """Binary cross-entropy, the mean over a row's labels.

        Args:
            model: a classifier, with or without the adapter.
            batch: inputs and labels, on the model's device.
            reduction: `mean` over rows, or `sum`.

        Returns:
            A scalar.
        """
        found = logits(model, batch)
        labels = batch["labels"].to(found)
        loss = F.binary_cross_entropy_with_logits(found, labels, reduction=reduction)
        return loss / found.shape[-1] if reduction == "sum" else loss

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Rows, loss, and what each metric needs.

        Args:
            model: a classifier in eval mode.
            batch: inputs and labels, on the model's device.

        Returns:
            What `sent` names (see `ratio.ratio_sums` for micro-F1's), `ranking`, and for each
            label k `hits k` and `named k`.
        """
        found = logits(model, batch)
        labels = batch["labels"].to(found)
        loss = F.binary_cross_entropy_with_logits(found, labels, reduction="sum")
        return {
            "loss": float(loss) / found.shape[-1],
            **_figures(found.double().cpu().numpy(), labels.cpu().numpy() > 0),
        }

    def score(self, sums: Mapping[str, float], seconds: float = 0.0) -> Score:
        """Micro-F1 with its standard error, macro-F1, exact match and ranking precision.

        Args:
            sums: as `sums` gives them, added up; what does not follow from them is left out.
            seconds: time that scoring took.

        Returns:
            The score, its loss a mean over rows; no rows give 0.
        """
        rows = int(sums.get("rows", 0))
        n = max(rows, 1)
        value, error = ratio_with_error(sums, 2.0, rows)
        each = [
            2 * sums[f"hits {name.removeprefix('named ')}"] / count if count else 0.0
            for name, count in sums.items()
            if name.startswith("named ")
        ]
        more = {MACRO_F1.name: sum(each) / len(each)} if each else {}
        more[EXACT.name] = sums.get("exact", 0) / n
        if "ranking" in sums:
            more[RANKING.name] = sums["ranking"] / n
        loss = sums.get("loss", 0.0) / n
        return Score(MICRO_F1, value, error, loss, rows, seconds, more, dict(sums))

    def check_sums(
        self, sums: Mapping[str, float], rows: int, tokens_per_row: int = MOST_TOKENS
    ) -> None:
        """Counts are whole and within what rows and labels allow; the loss is at least 0.

        Args:
            sums: figures that a client has sent.
            rows: rows that the client announced it keeps from training.
            tokens_per_row: unused; what counts is rows.

        Raises:
            ValueError: the figures are others than these, or those that so many rows cannot have.
        """
        if not announced(sums, self.sent, rows):
            return
        exact = sums["exact"]
        if type(exact) is not int or not 0 <= exact <= rows:
            raise ValueError(f"{exact} of {rows} validation rows cannot match")
        check_ratio(sums, rows, 2 * len(self.labels))
        check_loss(sums["loss"])

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean Kullback-Leibler divergence of each label's odds from the target's.

        Args:
            outputs: log odds [N, K].
            target: log odds of the same rows and shape.

        Returns:
            A scalar of at least 0, but for rounding.
        """
        want = target.sigmoid()
        cross = F.binary_cross_entropy_with_logits(outputs, want)
        return cross - F.binary_cross_entropy_with_logits(target, want)

    def merit(self, outputs: Tensor, answers: Tensor) -> float:
        """F1 of each row's labels, added up; a row with none that is given none has 1.

        Args:
            outputs: log odds [N, K].
            answers: float [N, K], on any device.

        Returns:
            A number between 0 and N.
        """
        given, has = outputs > 0, answers.to(outputs.device) > 0
        both, total = (given & has).sum(1).double(), (given.sum(1) + has.sum(1)).double()
        return float(torch.where(total > 0, 2 * both / total.clamp_min(1), 1.0).sum())

    # --- reference points ---

    def fit_baseline(
        self, name: str, train: tuple[Any, np.ndarray], test: tuple[Any, np.ndarray], seed: int
    ) -> Score:
        """A logistic regression for each label, on features or on TF-IDF of words and word pairs.

        Args:
            name: `linear-probe` or `tf-idf`.
            train: (x, labels) to fit to, x being features [rows, D] for `linear-probe` and texts
                for `tf-idf`.
            test: the same, to score.
            seed: of the solver.

        Returns:
            The score on the rows of `test`; there is no loss.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        if name == "tf-idf":
            before: Any = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
            strength = 10.0
        else:
            before, strength = StandardScaler(), 0.1
        x, known = before.fit_transform(train[0]), train[1] > 0
        there, labels = before.transform(test[0]), test[1] > 0
        odds = np.empty(labels.shape)
        for k in range(labels.shape[1]):
            if known[:, k].all() or not known[:, k].any():
                odds[:, k] = 1.0 if known[:, k].all() else -1.0
                continue
            fit = LogisticRegression(C=strength, max_iter=300, random_state=seed)
            odds[:, k] = fit.fit(x, known[:, k]).decision_function(there)
        return replace(self.score(_figures(odds, labels)), loss=nan)


def _sets(table: Table) -> list[list[Any]]:
    """The labels of each row."""
    return [_set(table, i) for i in range(len(table.cells))]


def _set(table: Table, i: int) -> list[Any]:
    """The labels of a row; RowFault for a cell that holds none of a list or a text."""
    value, at = table.cells[i], f"{table.where}: row {table.row(i)}"
    if isinstance(value, list | tuple):
        found = list(value)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        found = [part for part in cell_text(value).split(table.separator) if part.strip()]
    else:
        raise RowFault(
            f"{at} holds {type(value).__name__}, not a list of labels.", "with no list of labels"
        )
    for label in found:
        if not isinstance(label, str | int | float) or isinstance(label, bool):
            raise RowFault(
                f"{at} has a label of type {type(label).__name__}.", "with a label that is no name"
            )
        if label != label or not cell_text(label):
            raise RowFault(f"{at} has an empty label.", "with an empty label")
    return found


def _figures(odds: np.ndarray, has: np.ndarray) -> dict[str, float]:
    """Rows and all figures but the loss, for outputs [N, K] and whether a row has a label."""
    from sklearn.metrics import label_ranking_average_precision_score

    given = odds > 0
    hits, both = (given & has).sum(0), given.sum(0) + has.sum(0)
    ranking = label_ranking_average_precision_score(has, odds) * len(has) if len(has) else 0.0
    return {
        "rows": len(has),
        "exact": int((given == has).all(1).sum()),
        "ranking": float(ranking),
        **ratio_sums((given & has).sum(1), given.sum(1) + has.sum(1)),
        **{f"hits {k}": int(n) for k, n in enumerate(hits)},
        **{f"named {k}": int(n) for k, n in enumerate(both)},
    }
