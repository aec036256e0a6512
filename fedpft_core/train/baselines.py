"""Reference points before tuning: a linear probe on the frozen FM, and TF-IDF."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fedpft_core.config import Config
from fedpft_core.data.batches import Encoded, batches, encode
from fedpft_core.data.tasks import Examples, Task
from fedpft_core.model.batch import inputs_of, real_positions
from fedpft_core.model.device import device_of, to_device
from fedpft_core.model.families import family_of_model
from fedpft_core.model.taps import keep


@torch.inference_mode()
def features(model: nn.Module, data: Encoded, batch_size: int) -> np.ndarray:
    """Mean of the last block's output over real positions, [rows, D], in row order."""
    model.eval()
    family = family_of_model(model)
    rows = np.empty(0)
    with keep({"last": family.block_list(model)[-1]}) as seen:
        for batch in batches(data, batch_size, None):
            index = batch["index"].numpy()
            batch = to_device(batch, device_of(model))
            model(**inputs_of(batch))
            h = seen["last"]
            real = real_positions(batch, h.shape[1])[..., None]
            mean = (h * real).sum(1) / real.sum(1)
            if not rows.size:
                rows = np.empty((len(data), mean.shape[1]), dtype=np.float32)
            rows[index] = mean.cpu().numpy()
    return rows


def linear_probe(
    model: nn.Module, train: Encoded, test: Encoded, batch_size: int, seed: int
) -> float:
    """Accuracy of a logistic regression on frozen features; the adapter must be at its start."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, max_iter=300, random_state=seed)
    )
    probe.fit(features(model, train, batch_size), np.asarray(train.labels))
    return float(probe.score(features(model, test, batch_size), np.asarray(test.labels)))


def tf_idf(train: Examples, test: Examples, seed: int) -> float:
    """Accuracy of a logistic regression on TF-IDF of words and word pairs (text only)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def text(rows: Examples) -> list[str]:
        return [" ".join(x) if isinstance(x, tuple) else str(x) for x in rows.inputs]

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10, max_iter=300, random_state=seed),
    )
    model.fit(text(train), train.labels)
    return float(model.score(text(test), test.labels))


def score(fm: nn.Module, processor: Any, task: Task, config: Config) -> dict[str, float]:
    """Accuracies of the linear probe and, for text, of TF-IDF, on the rows of run.eval-split.

    Args:
        fm: The FM, its adapter at the start.
        processor: Its tokeniser or image processor.
        task: The task; both are trained on the rows of all its clients pooled.
        config: The run's configuration.

    Returns:
        Accuracy, a share in [0, 1], by name of the reference point.
    """
    test = task.test if config.run.eval_split == "test" else task.validation
    seed, size, length = config.run.seed, config.run.eval_batch_size, config.data.max_length
    train_rows, test_rows = encode(task.train, processor, length), encode(test, processor, length)
    out = {"linear-probe": linear_probe(fm, train_rows, test_rows, size, seed)}
    if task.kind != "image":
        out["tf-idf"] = tf_idf(task.train, test, seed)
    return out
