"""What outlives a message within one worker process: sub-FMs, processors, rows and features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from fedpft_core.data.encoded import Encoded
from fedpft_core.disk import evict
from fedpft_core.proxy.package import ClientModel

Portions = Iterable[tuple[Tensor, Tensor]]
"""Features float64 [n, D] and answers [n, ...] of some rows after the other."""


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
    """Models, processors, encoded rows and their features, for the messages after this one."""

    def __init__(
        self, max_models: int = 2, max_clients: int = 64, max_features: int = 64 * 2**20
    ) -> None:
        self.models: dict[str, Held] = {}
        self.rows: dict[Any, Rows] = {}
        self.features: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        self.processors: dict[str, Any] = {}
        self.max_models = max_models
        self.max_clients = max_clients
        self.max_features = max_features  # bytes

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

    def seen(self, key: Any, make: Callable[[], Portions]) -> Portions:
        """Features of a client's rows: those in memory, or made and kept there if they are few.

        Args:
            key: equal for equal rows, seen by the same sub-FM with the same adapter.
            make: gives features and answers, so many rows at a time.

        Returns:
            The same as `make` gives, or would.
        """
        kept = self.features.pop(key, None)
        if kept is None:
            kept, size = [], 0
            made = iter(make())
            for portion in made:
                kept.append(portion)
                size += _bytes([portion])
                if size > self.max_features:
                    return chain(kept, made)
        self.features[key] = kept  # at the end: what was not used for longest makes room
        while sum(_bytes(k) for k in self.features.values()) > self.max_features:
            del self.features[next(iter(self.features))]
        return kept


def _bytes(portions: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for portion in portions for t in portion)


PROCESS_CACHE = ProcessCache()
