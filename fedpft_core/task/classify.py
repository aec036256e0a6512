"""Classification of texts, pairs of texts and images: one label a row, of a fixed set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.data import files
from fedpft_core.data.batches import Encoded, encode
from fedpft_core.data.examples import Examples
from fedpft_core.data.rows import Columns, Table, cell_text, read_split, read_table
from fedpft_core.data.splits import DataSettings, columns_of, owned_split
from fedpft_core.errors import UserError
from fedpft_core.model.batch import Position, inputs_of
from fedpft_core.model.device import Batch
from fedpft_core.model.families import Family
from fedpft_core.model.load import TaskModel
from fedpft_core.task.base import Metric, Score

ACCURACY = Metric("accuracy", higher_is_better=True, share=True)
MACRO_F1 = Metric("macro-F1", higher_is_better=True, share=True)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores of a batch.

    Args:
        model: a classifier of the model library, with or without the adapter.
        batch: inputs, on the model's device; labels are not looked at.

    Returns:
        [B, classes].
    """
    out: Tensor = model(**inputs_of(batch)).logits
    return out


@dataclass(frozen=True)
class Classify:
    """Which of some labels a row has; see `fedpft_core.task.base.Task` for each part.

    Attributes:
        name: `text`, `pair` or `image`, by what the rows are.
        labels: class c is called labels[c]; empty where they are not known yet: then the rows
            of a file are read with the labels they have.
    """

    name: str
    labels: tuple[str, ...] = ()

    metric = ACCURACY
    further = (MACRO_F1,)
    # Not the figures by class: they would tell how many validation rows are of each class.
    sent = ("rows", "correct", "loss")
    refits = True

    @staticmethod
    def open(
        name: str, data: DataSettings, cache_dir: Path | None
    ) -> tuple[Classify, Callable[[str, str], Examples]]:
        """The task of a run's configuration, and a reader of (source, split).

        Labels are those that ``data.labels`` lists, or else those of the rows.

        Args:
            name: `text`, `pair` or `image`.
            data: the run's settings of its rows.
            cache_dir: where built-in data is cached; None for the default folder.

        Returns:
            The task with its labels, and a function that gives the rows of a source's split.

        Raises:
            UserError: the rows cannot be read, or have fewer than two labels.
        """
        columns, tables = columns_of(data), dict[tuple[str, str], Table]()

        def table(source: str, split: str) -> Table:
            if (source, split) not in tables:
                tables[source, split] = read_split(source, split, columns, cache_dir)
            return tables[source, split]

        owned = table(*owned_split(data))
        if data.labels:
            names = label_names(data.labels)
        else:
            names = owned.names or _names_from_rows(owned.cells, owned.where)
        if len(names) < 2:
            raise UserError(
                f"{owned.where}: only one label, {names[0]!r}; classification needs two or more."
            )
        return Classify(name, names), lambda *where: _examples(table(*where), names)

    # --- the model ---

    @property
    def reads(self) -> str:
        """What its rows are to a model."""
        return "image" if self.name == "image" else "text"

    def model(self) -> TaskModel:
        """A classifier of the model library with one output a label.

        Returns:
            The library's class and the config's fields that name the labels.
        """
        return TaskModel(
            reads=self.reads,
            auto="AutoModelForImageClassification"
            if self.reads == "image"
            else "AutoModelForSequenceClassification",
            settings={
                "num_labels": len(self.labels),
                "id2label": dict(enumerate(self.labels)),
                "label2id": {name: i for i, name in enumerate(self.labels)},
                "problem_type": "single_label_classification",
            },
        )

    def head(self, family: Family) -> tuple[str, ...]:
        """The family's classification head.

        Args:
            family: of the model.

        Returns:
            Paths of its modules in the bare task model.
        """
        return family.head

    def position(self, family: Family) -> Position:
        """Where the family's classification head reads.

        Args:
            family: of the model.

        Returns:
            The family's `summary`.
        """
        return family.summary

    # --- rows ---

    def read(self, path: str | Path, columns: Columns, key: str = "") -> Examples:
        """All rows of one file; cells are matched as :func:`label_index` says.

        Args:
            path: .csv, .tsv, .json, .jsonl or .parquet file.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            The rows in file order, each with its class number.

        Raises:
            UserError: the file cannot be read, or a row's label is unknown.
        """
        table = read_table(path, columns, key)
        return _examples(table, self.labels or _names_from_rows(table.cells, table.where))

    def learn(self, path: str | Path, columns: Columns, key: str = "") -> Classify:
        """The same task with the labels that a file's rows have.

        Args:
            path: as `read` takes it.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            A task whose labels are sorted; this one stays as it is.

        Raises:
            UserError: the file cannot be read, or has no rows.
        """
        table = read_table(path, columns, key)
        return Classify(self.name, _names_from_rows(table.cells, table.where))

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

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Encoded:
        """Inputs, and one class number a row.

        Args:
            examples: rows of this task.
            processor: a Hugging Face tokenizer for texts, an image processor for images.
            max_length: tokens per row at most, special tokens included; unused for images.

        Returns:
            The rows in their order.
        """
        return encode(examples, processor, max_length)

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

    def count(self, batch: Batch) -> int:
        """Rows of the batch.

        Args:
            batch: inputs and labels.

        Returns:
            How many labels there are.
        """
        return len(batch["labels"])

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Rows, rows right, their summed cross-entropies, F1's parts, and which class was named.

        Args:
            model: a classifier in eval mode.
            batch: inputs and labels, on the model's device.

        Returns:
            `rows`, `correct`, `loss`, for each class c `hits c` and `named c` (see `_by_class`),
            and `pair a b` (see `_pairs`).
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
        """Accuracy, with the standard error of a binomial share, and macro-F1.

        Macro-F1 has no standard error: it is no mean over rows, and the figures by class do not
        tell which class a wrong row was given.

        Args:
            sums: `rows`, `correct` and `loss`; one that is missing counts as 0. Where there are
                none by class, as in what clients send, macro-F1 is left out.
            seconds: time that scoring took.

        Returns:
            The score, its loss a mean over rows; no rows give 0.
        """
        rows = int(sums.get("rows", 0))
        n = max(rows, 1)
        value, loss = sums.get("correct", 0) / n, sums.get("loss", 0.0) / n
        error = sqrt(value * (1 - value) / n)
        return Score(ACCURACY, value, error, loss, rows, seconds, _macro_f1(sums), dict(sums))

    def check_sums(self, sums: Mapping[str, float], rows: int) -> None:
        """Right rows are whole and within the rows; the loss is a sum of what is never below 0.

        Args:
            sums: figures that a client has sent.
            rows: rows that the client announced it keeps from training.

        Raises:
            ValueError: the figures are others than these, or those that so many rows cannot have.
        """
        if not sums and not rows:
            return
        if sums.keys() != set(self.sent):
            raise ValueError(f"the figures of validation rows are {', '.join(sorted(sums))[:100]}")
        correct = sums["correct"]
        if sums["rows"] != rows:
            raise ValueError(f"validation row count {sums['rows']} is not the {rows} announced")
        if type(correct) is not int or not 0 <= correct <= rows:
            raise ValueError(f"{correct} of {rows} validation rows cannot be right")
        if not 0 <= sums["loss"] < inf:
            raise ValueError("the loss of the validation rows is no finite number of at least 0")

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The class scores of a batch.

        Args:
            model: a classifier, with or without the adapter.
            batch: inputs, on the model's device; labels are not looked at.

        Returns:
            [B, classes].
        """
        return logits(model, batch)

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

    def merit(self, outputs: Tensor, labels: Tensor) -> int:
        """Rows whose highest score is their label's.

        Args:
            outputs: class scores [N, classes].
            labels: int64 [N], on any device.

        Returns:
            How many rows are right.
        """
        return int((outputs.argmax(-1) == labels.to(outputs.device)).sum())

    # --- reference points ---

    @property
    def baselines(self) -> tuple[str, ...]:
        """A linear probe, and TF-IDF where rows are texts."""
        return ("linear-probe",) if self.reads == "image" else ("linear-probe", "tf-idf")

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
        For every class c `hits c`, its rows that are right, and `named c`, how often it stands in
        `named` or in `labels`; F1 is twice the one over the other.
    """
    hits = torch.bincount(labels[named == labels], minlength=classes).tolist()
    both = torch.bincount(torch.cat([named, labels]), minlength=classes).tolist()
    return {
        name: n
        for c in range(classes)
        for name, n in ((f"hits {c}", hits[c]), (f"named {c}", both[c]))
    }


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


def label_index(value: Any, names: Sequence[str]) -> int | None:
    """The class number that a label cell stands for, or None if it stands for none.

    A cell is first compared with the names, as text without surrounding blanks (``3``, ``3.0`` and
    ``" 3 "`` are all the text "3"). An integer that is no name is an index into ``names``, unless
    all names are integers themselves, where it would be a label nobody has declared.

    Args:
        value: the cell.
        names: the task's labels in order.

    Returns:
        Its position in `names`.
    """
    return _LabelTable(names).index(value)


class _LabelTable:
    """Looks label cells up in the list of names; see :func:`label_index`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.by_name = {cell_text(name): i for i, name in enumerate(names)}
        self.all_integers = all(_as_integer(name) is not None for name in names)
        if self.all_integers:
            self.by_name = {str(_as_integer(name)): i for i, name in enumerate(names)}

    def index(self, value: Any) -> int | None:
        text = cell_text(value)
        number = _as_integer(text)
        if self.all_integers:
            return None if number is None else self.by_name.get(str(number))
        if text in self.by_name:
            return self.by_name[text]
        if number is not None and 0 <= number < len(self.by_name):
            return number
        return None


def _as_integer(value: Any) -> int | None:
    """The integer a cell's text writes ("007" and "3.0" do), or None."""
    text = cell_text(value)
    if text.endswith(".0"):
        text = text[:-2]
    digits = text[1:] if text[:1] in "+-" else text
    # No label is a number of so many digits that Python would refuse to read it.
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 1000 else None


def _examples(table: Table, names: Sequence[str]) -> Examples:
    known = _LabelTable(names)
    numbers = np.empty(len(table.cells), dtype=np.int64)
    for i, value in enumerate(table.cells):
        number = known.index(value)
        if number is None:
            shown = ", ".join(repr(name) for name in names[:8])
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise UserError(
                f"{table.where}: row {i + 1} has the unknown label {cell_text(value)!r}; "
                f"known are {shown}{more}."
            )
        numbers[i] = number
    return Examples(table.inputs, numbers)


def label_names(setting: str) -> tuple[str, ...]:
    """The label names that ``data.labels`` lists.

    Args:
        setting: a path to a JSON list of names, or names separated by commas.

    Returns:
        The names in order.

    Raises:
        UserError: it names fewer than two, one twice, or an unreadable file.
    """
    if setting.lower().endswith(".json"):
        text = files.read_text(setting, "data.labels")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"data.labels: {setting}: line {error.lineno} is not valid JSON ({error.msg})."
            ) from error
        if not isinstance(values, list) or not all(
            isinstance(value, str | int) and not isinstance(value, bool) for value in values
        ):
            raise UserError(f"data.labels: {setting}: a JSON list of names is needed.")
        names = tuple(cell_text(value) for value in values)
    else:
        names = tuple(name.strip() for name in setting.split(","))
    if not all(names):
        raise UserError("data.labels: a label name is empty.")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"data.labels: the name {name!r} occurs more than once.")
    if len(names) < 2:
        raise UserError(f"data.labels: {setting!r} is one name; two or more are needed.")
    return names


def _names_from_rows(labels: Sequence[Any], where: str) -> tuple[str, ...]:
    """Sorted unique labels; numerically, and spelt as plain integers, if all are integers."""
    if not labels:
        raise UserError(f"{where}: the file holds no rows.")
    texts = {cell_text(value) for value in labels}
    numbers = {_as_integer(text) for text in texts}
    if None not in numbers:
        return tuple(str(number) for number in sorted(n for n in numbers if n is not None))
    return tuple(sorted(texts))
