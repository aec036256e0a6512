"""Regression by the absolute error, for numbers with outliers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from fedpft_core.model.device import Batch
from fedpft_core.task.regress import Regress
from fedpft_core.task.row import logits


@dataclass(frozen=True)
class Absolute(Regress):
    """As `Regress`, but for the loss; see `fedpft_core.task.base.Task` for each part of a task."""

    def loss(self, model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        """Absolute error.

        Args:
            model: a model with one output, with or without the adapter.
            batch: inputs and labels, on the model's device.
            reduction: `mean` over rows, or `sum`.

        Returns:
            A scalar.
        """
        found = logits(model, batch)[:, 0]
        return F.l1_loss(found, batch["labels"].to(found), reduction=reduction)


TASK = Absolute
