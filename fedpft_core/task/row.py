"""What tasks share that judge one thing a row: where heads read, and what leaves them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedpft_core.data.chat import Say
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.encoding import encode
from fedpft_core.data.examples import Examples
from fedpft_core.model.batch import Position, inputs_of
from fedpft_core.model.device import Batch
from fedpft_core.model.families import Family
from fedpft_core.task.table import TableTask


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """What a model of the library puts out for a batch.

    Args:
        model: a task model of the model library, with or without the adapter.
        batch: inputs, on the model's device; labels are not looked at.

    Returns:
        [B, outputs], or [B, L, outputs] where the head reads every position.
    """
    out: Tensor = model(**inputs_of(batch)).logits
    return out


class RowTask(TableTask):
    """A task with one answer a row, given by the family's own head."""

    per_position = False
    refits = True

    @property
    def auto(self) -> str:
        """The library's class that puts a head on a model for the whole row."""
        read = "Image" if self.reads == "image" else "Sequence"
        return f"AutoModelFor{read}Classification"

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

    def encode(
        self, examples: Examples, processor: Any, max_length: int, say: Say | None = None
    ) -> Encoded:
        """Inputs, and the rows' labels as they are.

        Args:
            examples: rows of this task.
            processor: a Hugging Face tokenizer for texts, an image processor for images.
            max_length: tokens per row at most, special tokens included; unused for images.
            say: told how many rows were cut; None for nobody.

        Returns:
            The rows in their order.
        """
        return encode(examples, processor, max_length, say)

    def count(self, batch: Batch) -> int:
        """Rows of the batch.

        Args:
            batch: inputs and labels.

        Returns:
            How many labels there are.
        """
        return len(batch["labels"])

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the head puts out for each row.

        Args:
            model: a model of this task, with or without the adapter.
            batch: inputs, on the model's device; labels are not looked at.

        Returns:
            [B, outputs].
        """
        return logits(model, batch)

    def each(self, values: Tensor, batch: Batch) -> Tensor:
        """The values of each row, as they are.

        Args:
            values: [B, ...].
            batch: not looked at.

        Returns:
            The same [B, ...].
        """
        return values

    def answers(self, batch: Batch) -> Tensor:
        """The labels of each row, as they are.

        Args:
            batch: with labels.

        Returns:
            First axis B.
        """
        return batch["labels"]

    @property
    def baselines(self) -> tuple[str, ...]:
        """A linear probe, and TF-IDF where rows are texts."""
        return ("linear-probe",) if self.reads == "image" else ("linear-probe", "tf-idf")
