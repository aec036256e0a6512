"""The time of one training step, on rows a model has never seen."""

from __future__ import annotations

import statistics
from typing import Any

from fedpft_core.model.families import Shape
from fedpft_core.task import Headless, Task


def step_seconds(
    model: Any, task: Task, rows: Any, batch_size: int, threads: int, repeats: int = 5
) -> float:
    """Median seconds of a training step on these rows, after one that is not counted.

    Args:
        model: a sub-FM with an adapter, whose adapter is changed.
        task: whose loss is minimised.
        rows: labelled rows as model inputs.
        batch_size: rows of a step.
        threads: torch's threads meanwhile; afterwards they are as before.
        repeats: steps that count.

    Returns:
        Seconds.
    """
    import torch

    from fedpft_core.train.tune import LocalSettings, fine_tune

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one = LocalSettings(1e-4, batch_size, 1, 1, 0.0, 1.0, threads)
        return statistics.median(
            [fine_tune(model, task, rows, one, i).seconds for i in range(repeats + 1)][1:]
        )
    finally:
        torch.set_num_threads(before)


def full_rows(task: Task, shape: Shape, max_length: int, batch_size: int) -> Any:
    """Rows of full length, or images of noise, for a model of which only the shape is known.

    Args:
        task: says what labels such rows have.
        shape: the model's sizes.
        max_length: tokens of each row; not looked at for images.
        batch_size: how many rows.

    Returns:
        The rows as model inputs, with random content.
    """
    import torch

    from fedpft_core.data.encoded import Encoded

    labels = None if isinstance(task, Headless) else task.any_labels(batch_size)
    if shape.image_tokens:
        size = (batch_size, shape.channels, shape.height, shape.width)
        prompts = torch.zeros(batch_size, shape.prompt_tokens, dtype=torch.int32)
        return Encoded(
            labels=labels,
            pixels=torch.rand(size),
            prompts=prompts if shape.prompt_tokens else None,
        )
    # Ids below 5 are special tokens in many vocabularies.
    first = min(5, shape.vocabulary - 1)
    count = batch_size * max_length
    ids = torch.randint(first, shape.vocabulary, (count,), dtype=torch.int32)
    return Encoded(
        labels=labels,
        ids=ids,
        offsets=torch.arange(batch_size + 1) * max_length,
        token_labels=ids if labels is None else None,
    )
