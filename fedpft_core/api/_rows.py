"""A user's batches, gone through as often as a method asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, repeat

from torch import Tensor

from fedpft_core.errors import UserError
from fedpft_core.model.device import Batch


class Rows:
    """A user's batches, which can be gone through as often as a method asks.

    An iterator, which can be gone through once only, is read at once, `longest` batches at most.

    Args:
        batches: as `fedpft_core.api.Batches` has them.
        labelled: what needs their labels, for messages; empty where nothing does.
        longest: batches of an iterator that are read; 0 for all.

    Raises:
        UserError: one batch was given in the place of batches.
    """

    def __init__(
        self, batches: Iterable[Mapping[str, Tensor]], labelled: str = "", longest: int = 0
    ) -> None:
        if isinstance(batches, Mapping):
            raise UserError("batches: expected a list or a DataLoader of batches, got one batch.")
        if isinstance(batches, Iterator):
            batches = list(islice(batches, longest or None))
        self.batches = batches
        self.labelled = labelled

    def once(self) -> Iterator[Batch]:
        """All batches in order.

        Yields:
            Each as a dictionary of its own.

        Raises:
            UserError: there is none, one is no batch, or labels that are needed are missing.
        """
        number = 0
        for number, batch in enumerate(self.batches, 1):
            if not isinstance(batch, Mapping) or not batch:
                raise UserError(
                    f"batches: batch {number} is {type(batch).__name__}, expected a dictionary of "
                    "tensors."
                )
            if self.labelled and "labels" not in batch:
                raise UserError(f"{self.labelled}: batch {number} has no `labels`.")
            yield dict(batch)
        if not number:
            raise UserError("batches: there is none.")

    def epochs(self, n: int) -> Iterator[Batch]:
        """All batches, several times over.

        Args:
            n: how many times.

        Returns:
            One after the other.
        """
        return chain.from_iterable(self.once() for _ in range(n))

    def take(self, n: int) -> Iterator[Batch]:
        """The first batches, from the start again as often as it takes.

        Args:
            n: how many batches.

        Returns:
            One after the other.
        """
        return islice(chain.from_iterable(self.once() for _ in repeat(None)), n)

    def all_labelled(self) -> bool:
        """Whether every batch has labels.

        Returns:
            True where all have.
        """
        return all("labels" in batch for batch in self.once())
