"""Reference points before tuning: a linear probe on the frozen FM, TF-IDF, the FM as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpft_core.config import Config
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Examples
from fedpft_core.model.batch import inputs_of, real_positions
from fedpft_core.model.device import device_of, to_device
from fedpft_core.model.families import family_of_model
from fedpft_core.model.precision import widened
from fedpft_core.model.taps import keep
from fedpft_core.task import Score, Task, TaskData
from fedpft_core.train.evaluate import evaluate


@torch.inference_mode()
def features(
    model: nn.Module,
    data: Encoded,
    batch_size: int,
    task: Task,
    on_rows: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The last block's output, dropout off: its mean over a row's real positions.

    Where a row has many answers, it is that of each position with a label.

    Args:
        model: FM or proxy, bare or with the adapter; left in eval mode.
        data: rows, with or without labels.
        batch_size: rows at once.
        task: says whether a row has one answer.
        on_rows: told how many rows each batch had.

    Returns:
        float32 [rows, D], or [N, D] for N positions, in row order; [0] without rows.
    """
    if task.per_position:
        return _by_position(model.eval(), data, batch_size, task)
    return row_features(model, data, batch_size, on_rows)


@torch.inference_mode()
def row_features(
    model: nn.Module,
    data: Encoded,
    batch_size: int,
    on_rows: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The mean of what the last block puts out for each row, over its real positions.

    Args:
        model: FM or proxy; left in eval mode.
        data: rows.
        batch_size: rows at once.
        on_rows: told how many rows each batch had.

    Returns:
        float32 [rows, D] in row order; [0] without rows.
    """
    model.eval()
    rows = np.empty(0)
    with keep({"last": family_of_model(model).block_list(model)[-1]}) as seen:
        for batch in batches(data, batch_size, None):
            index = batch["index"].numpy()
            batch = to_device(batch, device_of(model))
            model(**inputs_of(batch))
            h = widened(seen["last"])
            real = real_positions(batch, h.shape[1])[..., None]
            mean = (h * real).sum(1) / real.sum(1)
            if not rows.size:
                rows = np.empty((len(data), mean.shape[1]), dtype=np.float32)
            rows[index] = mean.cpu().numpy()
            if on_rows:
                on_rows(len(index))
    return rows


def _by_position(model: nn.Module, data: Encoded, batch_size: int, task: Task) -> np.ndarray:
    found, rows = [np.empty((0, 0), dtype=np.float32)], [np.empty(0, dtype=np.int64)]
    with keep({"last": family_of_model(model).block_list(model)[-1]}) as seen:
        for batch in batches(data, batch_size, None):
            batch = to_device(batch, device_of(model))
            model(**inputs_of(batch))
            h = widened(seen["last"])
            found.append(task.each(h, batch).cpu().numpy())
            row = batch["index"][:, None].expand(h.shape[:2])
            rows.append(task.each(row, batch).cpu().numpy())
    order = np.argsort(np.concatenate(rows), kind="stable")
    return np.concatenate(found[1:])[order] if len(found) > 1 else np.empty(0)


def texts(rows: Examples) -> list[str]:
    """Each row as one text.

    Args:
        rows: texts or pairs of texts.

    Returns:
        One text a row; a pair's two texts, or a list's words, are joined by blanks.
    """
    return [" ".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in rows.inputs]


def score(
    fm: nn.Module,
    processor: Any,
    data: TaskData,
    config: Config,
    on_rows: Callable[[int, int], None] | None = None,
) -> dict[str, Score]:
    """Scores of the task's reference points, fitted to all clients' rows pooled.

    Args:
        fm: the FM, its adapter at the start.
        processor: its tokenizer or image processor.
        data: the task and its rows.
        config: of the run; says which rows are scored.
        on_rows: told how many rows are done, of how many, over all reference points.

    Returns:
        By the reference point's name.
    """
    task = data.task
    test = data.test if config.run.eval_split == "test" else data.validation
    if "zero-shot" in task.baselines:
        encoded = task.encode(test, processor, config.data.max_length)
        return {"zero-shot": evaluate(fm, task, encoded, config.run.eval_batch_size)}

    done = 0

    def ready(rows: int) -> None:
        nonlocal done
        done += rows
        if on_rows:
            on_rows(done, len(task.baselines) * (len(data.train) + len(test)))

    def known(name: str, rows: Examples) -> tuple[Any, np.ndarray]:
        if name == "tf-idf":
            ready(len(rows))
            return texts(rows), rows.labels
        encoded = task.encode(rows, processor, config.data.max_length)
        assert encoded.labels is not None
        found = features(fm, encoded, config.run.eval_batch_size, task, ready)
        return found, encoded.labels.numpy()

    return {
        name: task.fit_baseline(name, known(name, data.train), known(name, test), config.run.seed)
        for name in task.baselines
    }
