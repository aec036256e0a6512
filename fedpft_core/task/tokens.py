"""Token classification: one label for each word of a text, such as the entity that it belongs to.

A word's label is learned at the first of its sub-words; the others have the label -100, which
nothing counts. Words behind the longest input are not counted either. Rows that the head reads at
every position give one feature vector a word, so that its head too follows from class statistics,
with words in the place of rows.

Shape letters: B rows, L positions, N words, C classes.
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

from fedpft_core.data.chat import Say
from fedpft_core.data.encoded import UNLEARNED, Encoded
from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Table
from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position, real_positions
from fedpft_core.model.device import Batch
from fedpft_core.model.families import Family
from fedpft_core.model.load import TaskModel
from fedpft_core.task.base import MOST_TOKENS
from fedpft_core.task.figures import announced, check_loss
from fedpft_core.task.labels import (
    label_names,
    label_settings,
    names_from_rows,
)
from fedpft_core.task.ratio import check_ratio, ratio_with_error
from fedpft_core.task.row import logits
from fedpft_core.task.score import Metric, Score
from fedpft_core.task.spans import are_tags
from fedpft_core.task.table import TableTask
from fedpft_core.task.words import (
    MOST_WORDS,
    aligned,
    class_numbers,
    encode_words,
    labels_of,
    word_figures,
    word_labels,
)

ENTITY_F1 = Metric("entity F1", higher_is_better=True, share=True)
TOKEN_ACCURACY = Metric("token accuracy", higher_is_better=True, share=True)
TOKEN_F1 = Metric("token macro-F1", higher_is_better=True, share=True)


@dataclass(frozen=True)
class Tokens(TableTask):
    """Which label each word has; see `fedpft_core.task.base.Task` for each part.

    It is called `tokens`. A row is a list of words and a list of as many labels. Where the labels
    are tags that mark entities (`B-`, `I-`, `O`), entity F1 decides, else token accuracy.
    """

    per_position = True
    refits = True
    closed_form = "token-classes"
    judged = Metric("words right", higher_is_better=True, share=True)
    baselines = ("linear-probe",)
    # Not the figures by class. The sums of rows with these numbers of entities, or of right words,
    # tell no more of any row than a standard error needs.
    sent = ("rows", "loss", "words", "top", "below", "top^2", "top*below", "below^2")

    @property
    def metric(self) -> Metric:
        """Entity F1 where labels are tags, else token accuracy."""
        return ENTITY_F1 if are_tags(self.labels) else TOKEN_ACCURACY

    @property
    def further(self) -> tuple[Metric, ...]:
        """Token accuracy where it does not decide, and macro-F1 over words."""
        return (TOKEN_ACCURACY, TOKEN_F1) if are_tags(self.labels) else (TOKEN_F1,)

    def settled(self, table: Table, setting: str = "") -> Tokens:
        """The task with the labels that are listed, or else those of the rows.

        Args:
            table: the rows that tell them where no setting does.
            setting: the value of ``data.labels``; "" for none.

        Returns:
            A task with two labels or more.

        Raises:
            UserError: the rows have fewer than two labels, or the setting cannot be used.
        """
        found = Tokens(self.name, label_names(setting)) if setting else self.learned(table)
        if len(found.labels) < 2:
            raise UserError(
                f"{table.where}: only one label, {found.labels[0]!r}; data.task = tokens needs two "
                "or more."
            )
        return found

    @staticmethod
    def usable(table: Table) -> Table:
        """The rows whose cells hold a label for each word.

        Args:
            table: rows as read.

        Returns:
            The table without the others.

        Raises:
            UserError: more rows than may be cannot be used.
        """
        return table.keep(lambda i: labels_of(table, i))

    def learned(self, table: Table) -> Tokens:
        """The task with the labels that the words of some rows have, sorted.

        Args:
            table: rows as read.

        Returns:
            A task of the same name; this one stays as it is.

        Raises:
            UserError: there are no rows, or a row has not as many labels as words.
        """
        cells = [label for row in word_labels(table) for label in row]
        return Tokens(self.name, names_from_rows(cells, table.where))

    def examples(self, table: Table) -> Examples:
        """Rows with a class number for each word.

        Args:
            table: rows as read.

        Returns:
            The rows in their order, labels int64 [rows, words of the longest], -100 behind a row's
            last word.

        Raises:
            UserError: a label is unknown, or a row has not as many labels as words; no cell is
                quoted.
        """
        return Examples(table.inputs, class_numbers(table, self.labels))

    # --- the model ---

    def model(self) -> TaskModel:
        """A token classifier of the model library.

        Returns:
            The library's class and the config's fields that name the labels.
        """
        return TaskModel(
            reads=self.reads,
            auto="AutoModelForTokenClassification",
            settings=label_settings(self.labels),
        )

    def head(self, family: Family) -> tuple[str, ...]:
        """The family's token classifier: one module, mostly the last of its classification head.

        Args:
            family: of the model.

        Returns:
            Its path in the bare task model.
        """
        return (family.tokens_head or family.head[-1],)

    def position(self, family: Family) -> Position:
        """Every position.

        Args:
            family: not looked at.

        Returns:
            `every`.
        """
        return "every"

    # --- rows ---

    def strata(self, examples: Examples) -> np.ndarray:
        """Rows go by the rarest label that a word of theirs has.

        Args:
            examples: rows of this task.

        Returns:
            Its number for each row, int64 (rows,).
        """
        labels = examples.labels
        if not len(labels):
            return np.zeros(0, dtype=np.int64)
        has = np.stack([(labels == c).any(1) for c in range(len(self.labels))], axis=1)
        order = np.argsort(has.sum(0), kind="stable")
        return order[has[:, order].argmax(1)].astype(np.int64)

    def histogram(self, examples: Examples) -> dict[str, int]:
        """Words of each label.

        Args:
            examples: rows of this task.

        Returns:
            By label in the task's order, 0 included.
        """
        found = examples.labels[examples.labels != UNLEARNED].astype(np.int64)
        counts = np.bincount(found, minlength=len(self.labels))
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def encode(
        self, examples: Examples, processor: Any, max_length: int, say: Say | None = None
    ) -> Encoded:
        """Inputs, and the class number of each word at its first sub-word.

        Args:
            examples: rows of this task.
            processor: a fast Hugging Face tokenizer.
            max_length: tokens per row at most, special tokens included.
            say: told how many rows were cut; None for nobody.

        Returns:
            The rows in their order, labels int64 [rows, positions of the longest].

        Raises:
            UserError: the tokenizer does not tell where its sub-words come from.
        """
        if not getattr(processor, "is_fast", False):
            raise UserError(
                "model.name: data.task = tokens needs a tokenizer that tells where its sub-words "
                "come from (a fast one, with a tokenizer.json)."
            )
        rows = [words for words in examples.inputs if isinstance(words, tuple)]
        return encode_words(rows, examples.labels, processor, max_length, say)

    def any_labels(self, rows: int) -> Tensor:
        """The first class for the first position of every row.

        Args:
            rows: how many labels are wanted.

        Returns:
            int64 (rows, 1), zeros.
        """
        return torch.zeros(rows, 1, dtype=torch.int64)

    # --- training and scoring ---

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        """Cross-entropy over the classes.

        Args:
            model: a token classifier, with or without the adapter.
            batch: inputs and labels, on the model's device.
            reduction: `mean` over words, or `sum`; 0 where there is no word.

        Returns:
            A scalar.
        """
        scores, labels = logits(model, batch), aligned(batch)
        total = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / max(self.count(batch), 1) if reduction == "mean" else total

    def count(self, batch: Batch) -> int:
        """Words of the batch.

        Args:
            batch: inputs and labels.

        Returns:
            How many labels there are.
        """
        return int((aligned(batch) != UNLEARNED).sum())

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The class scores of every position; 0 where there is padding.

        Args:
            model: a token classifier, with or without the adapter.
            batch: inputs, on the model's device; labels are not looked at.

        Returns:
            [B, L, C].
        """
        scores = logits(model, batch)
        return scores * real_positions(batch, scores.shape[1])[..., None]

    def each(self, values: Tensor, batch: Batch) -> Tensor:
        """The values at each word's label; at every real position where there are no labels.

        Args:
            values: [B, L, ...].
            batch: the batch they are of.

        Returns:
            [N, ...].
        """
        if "labels" not in batch:
            return values[real_positions(batch, values.shape[1])]
        return values[aligned(batch) != UNLEARNED]

    def answers(self, batch: Batch) -> Tensor:
        """The words' class numbers.

        Args:
            batch: with labels.

        Returns:
            int64 [N].
        """
        labels = aligned(batch)
        return labels[labels != UNLEARNED]

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Rows, words, loss, and what each metric needs.

        Args:
            model: a token classifier in eval mode.
            batch: inputs and labels, on the model's device.

        Returns:
            What `sent` names (see `ratio.ratio_sums` for the metric that decides), `correct`, and
            for each class c `hits c` and `named c`.
        """
        scores, labels = logits(model, batch), aligned(batch)
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
        rows = [
            (given[has != UNLEARNED], has[has != UNLEARNED])
            for given, has in zip(
                scores.argmax(-1).cpu().numpy(), labels.cpu().numpy(), strict=True
            )
        ]
        return {"loss": float(loss), **word_figures(rows, self.labels)}

    def score(self, sums: Mapping[str, float], seconds: float = 0.0) -> Score:
        """The metric that decides with its standard error, by rows, and the further ones.

        Args:
            sums: as `sums` gives them, added up; what does not follow from them is left out.
            seconds: time that scoring took.

        Returns:
            The score, its loss a mean over words; no rows give 0.
        """
        rows, words = int(sums.get("rows", 0)), max(sums.get("words", 0), 1)
        value, error = ratio_with_error(sums, 2.0 if are_tags(self.labels) else 1.0, rows)
        more: dict[str, float] = {}
        if are_tags(self.labels) and "correct" in sums:
            more[TOKEN_ACCURACY.name] = sums["correct"] / words
        each = [
            2 * sums[f"hits {name.removeprefix('named ')}"] / count
            for name, count in sums.items()
            if name.startswith("named ") and count
        ]
        if each:
            more[TOKEN_F1.name] = sum(each) / len(each)
        loss = sums.get("loss", 0.0) / words
        return Score(self.metric, value, error, loss, rows, seconds, more, dict(sums))

    def check_sums(
        self, sums: Mapping[str, float], rows: int, tokens_per_row: int = MOST_TOKENS
    ) -> None:
        """Counts are whole and within what rows and words allow; the loss is at least 0.

        Args:
            sums: figures that a client has sent.
            rows: rows that the client announced it keeps from training.
            tokens_per_row: the most tokens that a row has.

        Raises:
            ValueError: the figures are others than these, or those that so many rows cannot have.
        """
        if not announced(sums, self.sent, rows):
            return
        words = sums["words"]
        if type(words) is not int or not 0 <= words <= rows * MOST_WORDS:
            raise ValueError(f"{rows} validation rows cannot have {words} words")
        tags = are_tags(self.labels)
        check_ratio(sums, rows, 2 * MOST_WORDS, 2 if tags else 1)
        if sums["below"] > 2 * words or (not tags and sums["below"] != words):
            raise ValueError(f"{words} words cannot have these counts")
        check_loss(sums["loss"])

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Kullback-Leibler divergence of the class shares from the target's, the mean over rows.

        Args:
            outputs: class scores [B, L, C], 0 where there is padding in both.
            target: class scores of the same rows and shape.

        Returns:
            A scalar of at least 0, the sum over a row's positions.
        """
        return F.kl_div(
            F.log_softmax(outputs, -1), F.log_softmax(target, -1), reduction="batchmean",
            log_target=True,
        )  # fmt: skip

    def merit(self, outputs: Tensor, answers: Tensor) -> float:
        """Words whose highest score is their label's.

        Args:
            outputs: class scores [N, C].
            answers: int64 [N], on any device.

        Returns:
            How many words are right.
        """
        return int((outputs.argmax(-1) == answers.to(outputs.device)).sum())

    # --- reference points ---

    def fit_baseline(
        self, name: str, train: tuple[Any, np.ndarray], test: tuple[Any, np.ndarray], seed: int
    ) -> Score:
        """A logistic regression on each word's features.

        Args:
            name: `linear-probe`.
            train: features [words, D] and labels [rows, positions] to fit to.
            test: the same, to score.
            seed: of the solver.

        Returns:
            The score on the rows of `test`; there is no loss.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        probe = LogisticRegression(C=0.1, max_iter=300, random_state=seed)
        known = train[1][train[1] != UNLEARNED]
        found = make_pipeline(StandardScaler(), probe).fit(train[0], known)
        given = np.full(test[1].shape, UNLEARNED)
        given[test[1] != UNLEARNED] = found.predict(test[0])
        rows = [(g[y != UNLEARNED], y[y != UNLEARNED]) for g, y in zip(given, test[1], strict=True)]
        return replace(self.score(word_figures(rows, self.labels)), loss=nan)
