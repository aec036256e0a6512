"""What outlives a message within one worker process: sub-FMs, processors and encoded rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedpft_core.data.encoded import Encoded
from fedpft_core.disk import evict
from fedpft_core.proxy.package import ClientModel


@dataclass(frozen=True)
class Held:
    """A sub-FM in memory: the model, and the verified files its inputs are read with."""

    model: ClientModel
    files: dict[str, bytes]
    reader: str  # digest of `files`


@dataclass(frozen=True)
class Rows:
    """A node's encoded rows: what it trains on, and what it keeps from training."""

    train: Encoded
    validation: Encoded


class ProcessCache:
    """Models, processors and encoded rows that outlive a message within one worker process."""

    def __init__(self, max_models: int = 2, max_clients: int = 64) -> None:
        self.models: dict[str, Held] = {}
        self.rows: dict[Any, Rows] = {}
        self.processors: dict[str, Any] = {}
        self.max_models = max_models
        self.max_clients = max_clients

    def keep_model(self, digest: str, model: Held) -> None:
        """Keep a sub-FM in memory; the one kept first makes room.

        Args:
            digest: the sub-FM's.
            model: the sub-FM with the files its inputs are read with.
        """
        evict.put(self.models, digest, model, self.max_models)

    def keep_rows(self, key: Any, rows: Rows) -> None:
        """Keep encoded rows in memory; those kept first make room.

        Args:
            key: equal for equal rows, encoded in the same way.
            rows: the rows of one client.
        """
        evict.put(self.rows, key, rows, self.max_clients)


PROCESS_CACHE = ProcessCache()
