"""Text-to-image: a diffusion model learns to take the noise off images, given their prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpft_core.data import captioned
from fedpft_core.data.chat import Say
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Captioned, Examples
from fedpft_core.data.pixels import encode_captioned
from fedpft_core.data.rows import Columns
from fedpft_core.model.batch import inputs_of, rows_of
from fedpft_core.model.device import Batch
from fedpft_core.model.load import TaskModel
from fedpft_core.task.base import MOST_TOKENS
from fedpft_core.task.figures import announced, check_loss
from fedpft_core.task.headless import HeadlessTask
from fedpft_core.task.painting import paint, png, prompts_of
from fedpft_core.task.score import Metric, Score

DENOISING_LOSS = Metric("denoising loss", higher_is_better=False, share=False)
_DRAWS = 4  # of noise and time step for each row that is scored


@dataclass(frozen=True)
class TextToImage(HeadlessTask):
    """The noise in an image; see `fedpft_core.task.base.Task` for each part.

    There is no head to train: the UNet's last layer stays as it is.

    Attributes:
        name: `text-to-image`.
        labels: none.
    """

    name: str = "text-to-image"

    reads = "captioned image"
    metric = DENOISING_LOSS
    further: tuple[Metric, ...] = ()
    sent = ("rows", "loss")
    per_position = False
    judged = DENOISING_LOSS

    # --- the model ---

    def model(self) -> TaskModel:
        """A diffusion pipeline as one model.

        Returns:
            This program's class.
        """
        return TaskModel(reads=self.reads, auto="TextToImage", settings={})

    # --- rows ---

    def read(self, path: str | Path, columns: Columns, key: str = "") -> Examples:
        """All rows of one file; see :func:`fedpft_core.data.captioned.read`.

        Args:
            path: .csv, .tsv, .json, .jsonl or .parquet file, or a folder of images.
            columns: which of its columns hold what.
            key: configuration key to name in messages; "" for none.

        Returns:
            Images with prompts; rows with the same prompt have the same number for a label.
        """
        faults = columns.faults(key)
        rows = captioned.read(path, columns.image, columns.text, key, faults)
        groups = np.unique([row.prompt for row in rows], return_inverse=True)[1]
        return Examples(tuple(rows), groups, faults.said(len(rows) + len(faults.bad)))

    def strata(self, examples: Examples) -> np.ndarray:
        """Rows go by their prompts.

        Args:
            examples: rows of this task.

        Returns:
            int64 (rows,).
        """
        return examples.labels

    def encode(
        self, examples: Examples, processor: Any, max_length: int, say: Say | None = None
    ) -> Encoded:
        """Pixels, and token ids of the prompts.

        Args:
            examples: rows of this task.
            processor: a `CaptionedProcessor`.
            max_length: unused: prompts are as long as the text encoder reads them.
            say: unused.

        Returns:
            The rows in their order.
        """
        rows = [row for row in examples.inputs if isinstance(row, Captioned)]
        return encode_captioned(rows, processor)

    def any_labels(self, rows: int) -> Tensor:
        """Nothing that a row is learned as.

        Args:
            rows: how many labels are wanted.

        Returns:
            int64 (rows, 0).
        """
        return torch.zeros(rows, 0, dtype=torch.int64)

    # --- training and scoring ---

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        """Mean squared error of the predicted noise, by the batch's own noise and time steps.

        Source: Ho et al., Denoising Diffusion Probabilistic Models, eq. 14.

        Args:
            model: a text-to-image model, with or without the adapter.
            batch: as `batches` serves it, on the model's device.
            reduction: `mean` over the rows, or `sum`.

        Returns:
            A scalar.
        """
        found = _by_row(*model(**inputs_of(batch)))
        return found.mean() if reduction == "mean" else found.sum()

    def count(self, batch: Batch) -> int:
        """Rows of the batch.

        Args:
            batch: as `batches` serves it.

        Returns:
            How many there are.
        """
        return rows_of(batch)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Rows, their losses, and the squares of these.

        A row's loss is the mean over several draws of noise and time step, the same each time that
        the row is scored.

        Args:
            model: a text-to-image model in eval mode.
            batch: as `batches` serves it, on the model's device.

        Returns:
            `rows`, `loss` and `loss2`.
        """
        total = torch.zeros(rows_of(batch), dtype=torch.float64)
        for draw in range(_DRAWS):
            again = {**batch, "noise_seed": batch["noise_seed"] + draw}
            total += _by_row(*model(**inputs_of(again))).double().cpu() / _DRAWS
        return {
            "rows": len(total),
            "loss": float(total.sum()),
            "loss2": float(total.square().sum()),
        }

    def score(self, sums: Mapping[str, float], seconds: float = 0.0) -> Score:
        """The mean loss of a row, and its standard error where the squares are known.

        Args:
            sums: as `sums` gives them, added up, or those of `sent` alone.
            seconds: time that scoring took.

        Returns:
            The score; no rows give 0.
        """
        rows = int(sums.get("rows", 0))
        if not rows:
            return Score(DENOISING_LOSS, 0.0, nan, nan, 0, seconds, {}, dict(sums))
        mean, error = sums["loss"] / rows, nan
        if "loss2" in sums and rows > 1:
            spread = max(sums["loss2"] / rows - mean**2, 0.0)
            error = sqrt(spread / (rows - 1))
        return Score(DENOISING_LOSS, mean, error, mean, rows, seconds, {}, dict(sums))

    def check_sums(
        self, sums: Mapping[str, float], rows: int, tokens_per_row: int = MOST_TOKENS
    ) -> None:
        """The loss is a finite number of at least 0.

        Args:
            sums: figures that a client has sent.
            rows: rows that the client announced it keeps from training.
            tokens_per_row: unused.

        Raises:
            ValueError: the figures are others than these, or those that so many rows cannot have.
        """
        if not announced(sums, self.sent, rows):
            return
        check_loss(sums["loss"], rows)

    # --- outputs ---

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The predicted noise.

        Args:
            model: a text-to-image model, with or without the adapter.
            batch: as `batches` serves it, on the model's device.

        Returns:
            [B, C, H, W].
        """
        found: Tensor = model(**inputs_of(batch))[0]
        return found

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean squared difference.

        Args:
            outputs: [N, C, H, W].
            target: of the same shape.

        Returns:
            A scalar of at least 0.
        """
        return (outputs - target).square().mean()

    def apart(self, model: nn.Module, other: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """How far the noise that a model predicts is from what another does.

        Args:
            model: gets gradients, where they are on.
            other: what it should come to; run without gradients.
            batch: as `batches` serves it, on the models' device.

        Returns:
            The sum of the rows' mean squared differences, and how many rows.
        """
        with torch.no_grad():
            wanted = self.outputs(other, batch)
        return _by_row(self.outputs(model, batch), wanted).sum(), rows_of(batch)

    def each(self, values: Tensor, batch: Batch) -> Tensor:
        """Every row is judged.

        Args:
            values: [B, ...].
            batch: unused.

        Returns:
            The same.
        """
        return values

    def answers(self, batch: Batch) -> Tensor:
        """The images themselves.

        Args:
            batch: as `batches` serves it.

        Returns:
            [B, C, H, W].
        """
        return batch["pixel_values"]

    def merit(self, outputs: Tensor, answers: Tensor) -> float:
        """How near outputs are to answers; more is better.

        Args:
            outputs: [N, C, H, W].
            answers: of the same shape.

        Returns:
            Minus the sum of the rows' mean squared differences.
        """
        return -float(_by_row(outputs, answers.to(outputs.device)).sum())

    # --- images ---

    def paint(
        self,
        model: nn.Module,
        examples: Examples,
        processor: Any,
        steps: int,
        batch_size: int,
    ) -> list[bytes]:
        """Let a model make an image for each prompt; see `fedpft_core.task.painting.paint`.

        Args:
            model: FM or proxy with the adapter.
            examples: rows of this task.
            processor: the FM's.
            steps: of the sampler.
            batch_size: rows at once.

        Returns:
            PNG files, one for each row.
        """
        made = paint(model, prompts_of(examples), processor, steps, batch_size)
        return [png(image) for image in made]


def _by_row(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row [B]."""
    return (prediction - target).square().flatten(1).mean(1)


__all__ = ["DENOISING_LOSS", "TextToImage"]
