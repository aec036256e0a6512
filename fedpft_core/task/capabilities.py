"""What some tasks can besides: go without a head, write text, make images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from fedpft_core.data.chat import Say
from fedpft_core.data.examples import Examples
from fedpft_core.model.device import Batch
from fedpft_core.task.writing import Sample


@runtime_checkable
class Headless(Protocol):
    """What a task can besides that trains no head."""

    def apart(self, model: nn.Module, other: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """How far a model's outputs, which are too many to be kept, are from another's.

        Args:
            model: gets gradients, where they are on.
            other: what it should come to; run without gradients.
            batch: on the models' device, with or without labels.

        Returns:
            The sum of the divergences, and how many terms it has.
        """


@runtime_checkable
class Writer(Headless, Protocol):
    """What a task can besides where its models write text: its responses are shown and judged."""

    def prepare(self, processor: Any, template: str, vocabulary: int, name: str, say: Say) -> None:
        """Make the FM's tokenizer fit, before rows are encoded and packages made.

        Args:
            processor: the FM's tokenizer, changed in place.
            template: data.prompt-template.
            vocabulary: token ids the FM knows.
            name: of the FM, for messages.
            say: told in one sentence what was set.

        Raises:
            UserError: tokenizer and model do not fit, or the template cannot be used.
        """

    def write(
        self,
        model: nn.Module,
        examples: Examples,
        processor: Any,
        max_length: int,
        new_tokens: int,
        batch_size: int,
    ) -> list[Sample]:
        """Let a model respond to some rows.

        Args:
            model: FM or proxy with the adapter.
            examples: rows of the task.
            processor: the FM's tokenizer.
            max_length: tokens of a prompt at most.
            new_tokens: tokens of a response at most.
            batch_size: rows at once.

        Returns:
            One sample for each row, in order.
        """

    def judge(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Values of the task's further metrics.

        Args:
            samples: what a model wrote.

        Returns:
            By the metric's name; nothing without samples.
        """


@runtime_checkable
class Painter(Headless, Protocol):
    """What a task can besides where its models make images: they are shown."""

    def paint(
        self,
        model: nn.Module,
        examples: Examples,
        processor: Any,
        steps: int,
        batch_size: int,
    ) -> list[bytes]:
        """Let a model make an image for the prompt of each row.

        Args:
            model: FM or proxy with the adapter.
            examples: rows of the task.
            processor: the FM's.
            steps: of the sampler.
            batch_size: rows at once.

        Returns:
            PNG files, one for each row, in order; the same for the same rows and weights.
        """
