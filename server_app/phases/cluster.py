"""Clusters of the training rows by the sub-FM's features: a way for clients to differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedpft_core.data.grouping import CLUSTERS, write_clusters
from fedpft_core.errors import UserError
from fedpft_core.seeds import derive
from fedpft_core.train.baselines import row_features
from server_app.bench import Bench


def note(bench: Bench) -> None:
    """Put each training row into a cluster, once a run, where its clients are to differ by these.

    Args:
        bench: models and rows; the clusters go into the run folder, from which simulated clients
            read them.

    Raises:
        UserError: there are no training rows here, fewer than clusters, or no run folder.
    """
    config = bench.config
    f, folder = config.federation, config.run.dir
    if f.partition_by != "cluster" or f.partition == "natural":
        return
    if not folder:
        raise UserError("federation.partition-by = cluster needs a run folder (run.dir).")
    if (Path(folder) / CLUSTERS).exists():
        return  # of the part of the run that is continued
    rows = len(bench.rows.data.train)
    if rows < f.clusters:
        raise UserError(
            f"federation.clusters = {f.clusters} is more than the {rows} training rows."
        )
    from sklearn.cluster import KMeans

    means = KMeans(f.clusters, n_init=4, random_state=derive(config.run.seed, "clusters") % 2**31)
    train = bench.rows.encode(bench.rows.data.train)
    found = row_features(bench.models.proxy, train, config.run.eval_batch_size)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    write_clusters(Path(folder), means.fit_predict(found / np.maximum(lengths, 1e-12)))
