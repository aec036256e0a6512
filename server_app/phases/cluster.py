"""Clusters of the training rows by the sub-FM's features: a way for clients to differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedpft_core.data.batches import batches
from fedpft_core.data.grouping import CLUSTERS, write_clusters
from fedpft_core.errors import UserError
from fedpft_core.model.batch import by_row, real_positions
from fedpft_core.model.device import device_of, to_device
from fedpft_core.model.families import family_of_model
from fedpft_core.model.taps import run_to
from fedpft_core.seeds import derive
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
    write_clusters(Path(folder), means.fit_predict(features(bench)))


@torch.no_grad()
def features(bench: Bench) -> np.ndarray:
    """What the sub-FM's last block makes of each training row, in the mean over its positions.

    Args:
        bench: models and rows.

    Returns:
        float32 [rows, D], each of norm 1.
    """
    proxy = bench.models.proxy.eval()
    last = family_of_model(proxy).block_list(proxy)[-1]
    encoded = bench.rows.encode(bench.rows.data.train)
    found = torch.zeros(len(encoded), 0)
    for batch in batches(encoded, bench.config.run.eval_batch_size, None):
        batch = to_device(batch, device_of(proxy))
        h = by_row(run_to(proxy, batch, {"last": last})["last"], batch)
        real = real_positions(batch, h.shape[1]).to(h)[..., None]
        mean = (h * real).sum(1) / real.sum(1)
        if not found.shape[1]:
            found = torch.zeros(len(encoded), mean.shape[1])
        found[batch["index"].cpu()] = torch.nn.functional.normalize(mean).float().cpu()
    return found.numpy()
