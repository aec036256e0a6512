"""Aggregation: how the clients' adapters become the next one, one file a rule.

A rule is a function `aggregate(replies)` that returns the next adapter. It never holds all
replies: they lie on disk and are read one at a time, or all of them a slice at a time. What it
may know besides them is `replies.start`, the adapter that the clients were sent, and
`replies.settings`. A file may have a function `withstands(replies)`, how many hostile ones among so
many replies it stands, and `NEEDS_OWN = True` where it calls `replies.settings.own`.

Some files say more of themselves: `factors(round)`, which of LoRA's factors clients train (`both`,
`a` or `b`); `AVERAGES = True`, that the rule is the mean of the replies by their weights, which can
be had as a running sum; `BY_TENSOR = True`, that it heeds `replies.partly`, which tensors some
clients alone have trained, so that clients may train LoRA in fewer blocks; `GROWS = True`, that
what it returns has another rank than it was given; `MERGING = "fisher"` or `"gram"`, that clients
send such figures beside their adapters (`fedpft_core.train.merging`), which `replies.beside(name)`
gives. Figures that a rule finds on its way go into `replies.figures`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fedpft_core import registry
from fedpft_core.aggregation._weights import weights_of
from fedpft_core.tensors import Tensors

_PIECE = 2**15  # values of one reply that are read at once, few enough for a cache
_SLICE = 2**20  # values a coordinate-wise rule is given at once, over all replies


@dataclass(frozen=True)
class RuleSettings:
    """What a rule may know besides the replies.

    Attributes:
        weighting: federation.weighting, what a reply weighs.
        weight_cap: federation.weight-cap, the largest share of one reply when weights are capped.
        attackers: federation.attackers, the share of replies that are taken to be hostile.
        distance: federation.distance, where a rule measures distances: `product` (of LoRA's
            product BA, and of the head), `factors` (of all values as they are) or `both`.
        scaling: LoRA's alpha / rank, by which its product is multiplied in the model.
        density: federation.density, the share of a change's values that a sparse merge keeps.
        seed: of what a rule draws at random in this round.
        own: gives the server's own adapter, trained from `Replies.start` on the server's
            validation rows; None where it has none.
        factor: what the weight of a client is multiplied by, by its name; None = 1 for all.
    """

    weighting: str = "examples"
    weight_cap: float = 0.5
    attackers: float = 0.0
    distance: str = "both"
    scaling: float = 1.0
    density: float = 1.0
    seed: int = 0
    own: Callable[[], Tensors] | None = None
    factor: Callable[[str], float] | None = None


class Replies:
    """The valid replies of one round, kept on disk and read in the order of the clients' names.

    Floating-point sums depend on their order, and replies arrive in any: with a fixed order a run
    repeats to the bit. Each reply is a slot of float32 values in one unnamed temporary file, which
    is gone when it is closed or the process ends, so memory does not grow with the replies.

    Args:
        like: an adapter with the names and shapes of all that will be added, float32.
            It is what the clients were sent.
        folder: where the file lies; the system's folder for temporary files when None.
        settings: what a rule may know besides.
        beside: shapes of the merging figures that come with each adapter, by name.

    Raises:
        OSError: when the folder cannot be written.
    """

    def __init__(
        self,
        like: Mapping[str, Tensor],
        folder: Path | None = None,
        settings: RuleSettings | None = None,
        beside: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.start = {name: like[name] for name in sorted(like)}
        self.settings = settings or RuleSettings()
        self.figures: dict[str, float] = {}  # what the rule has found, by name
        self.shapes = {name: tuple(like[name].shape) for name in sorted(like)}
        self._at: dict[str, int] = {}  # values before each tensor, in a slot
        self._size = 0
        for name in self.shapes:
            self._at[name] = self._size
            self._size += like[name].numel()
        self._beside: dict[str, tuple[int, tuple[int, ...]]] = {}  # values before, shape
        self._stride = self._size  # values of a slot: an adapter's, and the figures beside it
        for name, shape in sorted((beside or {}).items()):
            self._beside[name] = self._stride, shape
            self._stride += _count(shape)
        self._slots: dict[str, tuple[int, int]] = {}  # by client: slot, examples
        # By client that trained some of the tensors only: their names.
        self.partly: dict[str, frozenset[str]] = {}
        self._used = 0  # slots written so far
        self._file = self._open(folder)

    def _open(self, folder: Path | None) -> IO[bytes]:
        """The file of the slots; here one without a name."""
        return tempfile.TemporaryFile(dir=folder)

    def __enter__(self) -> Replies:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._slots)

    def add(
        self, name: str, examples: int, adapter: Mapping[str, Tensor],
        trained: frozenset[str] = frozenset(), beside: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Keep the adapter of client `name`, which was trained on so many examples.

        Args:
            name: which client; the names set the order in which replies are read.
            examples: its rows, by which a rule may weigh the reply.
            adapter: float32 tensors on the CPU, by FM name.
            trained: the tensors that the client has trained, where these are not all; the others
                are as it was sent them.
            beside: the merging figures, float32, where there are any.

        Raises:
            ValueError: when names, shapes or types are not those agreed, or the client is known.
            OSError: when the disk is full.
        """
        beside = beside or {}
        fits = adapter.keys() == self.shapes.keys() and beside.keys() == self._beside.keys()
        if name in self._slots or not fits:
            raise ValueError(f"the reply of {name} does not fit the round")
        slot = self._used
        self._file.seek(4 * slot * self._stride)
        whole = [(key, shape, adapter[key]) for key, shape in self.shapes.items()]
        whole += [(key, shape, beside[key]) for key, (_, shape) in self._beside.items()]
        for key, shape, t in whole:
            if t.dtype != torch.float32 or tuple(t.shape) != shape:
                raise ValueError(f"{key} is {t.dtype}{list(t.shape)}, not float32{list(shape)}")
            self._file.write(t.detach().contiguous().numpy().reshape(-1).view(np.uint8).data)
        self._slots[name] = slot, examples
        self._used = slot + 1
        if trained:
            self.partly[name] = trained

    def drop(self, name: str) -> None:
        """Leave out a reply that was added.

        Args:
            name: whose it is.

        Raises:
            KeyError: there is none of that client.
        """
        del self._slots[name]
        self.partly.pop(name, None)

    @property
    def names(self) -> list[str]:
        """The clients whose replies there are, in the order in which they are read."""
        return sorted(self._slots)

    @property
    def weights(self) -> list[float]:
        """What each reply weighs by `settings.weighting`, in the order of the names."""
        found = weights_of(self.examples, self.settings.weighting, self.settings.weight_cap)
        if self.settings.factor is None:
            return found
        return [w * self.factor(name) for w, name in zip(found, self.names, strict=True)]

    def factor(self, name: str) -> float:
        """What the weight of one client is multiplied by.

        Args:
            name: which client's.

        Returns:
            At least 0; 1 for all where widths do not matter.
        """
        return 1.0 if self.settings.factor is None else self.settings.factor(name)

    @property
    def hostile(self) -> int:
        """How many replies are taken to be hostile: `settings.attackers` of them, rounded up."""
        return math.ceil(self.settings.attackers * len(self) - 1e-9)

    @property
    def examples(self) -> list[int]:
        """How many examples each reply was trained on, in the order of the names."""
        return [self._slots[name][1] for name in sorted(self._slots)]

    def __iter__(self) -> Iterator[tuple[Tensors, float]]:
        """(adapter, weight) of one reply after the other, in the order of the names."""
        for name, weight in zip(self.names, self.weights, strict=True):
            yield self.adapter(name), weight

    def adapter(self, name: str) -> Tensors:
        """The adapter of one reply.

        Args:
            name: which client's.

        Returns:
            Float32 tensors by FM name.

        Raises:
            KeyError: there is no reply of that client.
        """
        return self.split(self._read(self._slots[name][0] * self._stride, self._size))

    def beside(self, name: str) -> Tensors:
        """The merging figures of one reply.

        Args:
            name: which client's.

        Returns:
            Float32 tensors by name; empty where the rule asks for none.

        Raises:
            KeyError: there is no reply of that client.
        """
        start = self._slots[name][0] * self._stride
        return {
            key: self._read(start + at, _count(shape)).reshape(shape)
            for key, (at, shape) in self._beside.items()
        }

    def stacked_beside(self, key: str) -> Tensor | None:
        """One tensor of the merging figures of every reply.

        Args:
            key: the tensor's name.

        Returns:
            float32 [replies, *shape], in the order of the names; None where there are no such
            figures.
        """
        if key not in self._beside:
            return None
        at, shape = self._beside[key]
        found = [
            self._read(self._slots[n][0] * self._stride + at, _count(shape)) for n in self.names
        ]
        return torch.stack(found).reshape(len(found), *shape)

    @property
    def size(self) -> int:
        """How many values one reply has, over all its tensors."""
        return self._size

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The values of one reply piece by piece, for rules that look at each of them once.

        Args:
            name: which client's.

        Yields:
            Where among the reply's values the piece begins, and float32 values [n]. All pieces lie
            in the same memory, so that one is gone when the next is asked for.

        Raises:
            KeyError: there is no reply of that client.
        """
        slot, _ = self._slots[name]
        buffer = np.empty(min(_PIECE, self._size), np.float32)
        self._file.seek(4 * slot * self._stride)
        for start in range(0, self._size, _PIECE):
            values = buffer[: min(_PIECE, self._size - start)]
            self._fill(values)
            yield start, values

    def split(self, values: Tensor) -> Tensors:
        """The values of one reply, or of what is made of replies, as tensors.

        Args:
            values: [size], in the order in which :meth:`pieces` gives them.

        Returns:
            Views of them, by FM name.
        """
        return {
            key: values[at : at + _count(self.shapes[key])].reshape(self.shapes[key])
            for key, at in self._at.items()
        }

    def stacked(self, key: str) -> Tensor:
        """One tensor of every reply.

        Args:
            key: the tensor's name.

        Returns:
            float32 [replies, *shape], in the order of the names: memory for this tensor of all.
        """
        count = _count(self.shapes[key])
        found = [
            self._read(self._slots[n][0] * self._stride + self._at[key], count) for n in self.names
        ]
        return torch.stack(found).reshape(len(found), *self.shapes[key])

    def coordinatewise(self, rule: Callable[[Tensor], Tensor]) -> Tensors:
        """An adapter each of whose values follows from the same value in every reply.

        Args:
            rule: from values [replies, n] float32, the replies in the order of their names, to the
                values [n] of the result. It is called for slices of every tensor.

        Returns:
            The tensors by name, float32.
        """
        width = max(1, _SLICE // max(1, len(self)))
        slots = [self._slots[name][0] for name in sorted(self._slots)]
        out: Tensors = {}
        for key, at in self._at.items():
            whole = torch.empty(_count(self.shapes[key]))
            for start in range(0, len(whole), width):
                n = min(width, len(whole) - start)
                values = [self._read(slot * self._stride + at + start, n) for slot in slots]
                whole[start : start + n] = rule(torch.stack(values))
            out[key] = whole.reshape(self.shapes[key])
        return out

    def _read(self, start: int, count: int) -> Tensor:
        values = np.empty(count, np.float32)
        self._file.seek(4 * start)
        self._fill(values)
        return torch.from_numpy(values)

    def _fill(self, values: np.ndarray) -> None:
        """Read float32 values from where the file stands."""
        if self._file.readinto(values.view(np.uint8).data) != 4 * len(values):  # type: ignore[attr-defined]
            raise OSError("the file of the round's replies is shorter than what was written")


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def aggregate(rule: str, replies: Replies) -> Tensors:
    """The next adapter, by the rule of that name (`federation.aggregate`).

    Args:
        rule: name of a rule, which is a file of this folder.
        replies: the valid replies of the round.

    Returns:
        Float32 tensors by FM name.

    Raises:
        KeyError: when there is no such rule.
        ValueError: when there is no reply.
    """
    if not len(replies):
        raise ValueError("nothing to aggregate")
    made: Tensors = registry.load("aggregation", rule).aggregate(replies)
    return made


def needs_own(rule: str) -> bool:
    """Whether a rule calls `RuleSettings.own`.

    Args:
        rule: its name.

    Returns:
        True if its file says so.
    """
    return bool(getattr(registry.load("aggregation", rule), "NEEDS_OWN", False))


def withstands(rule: str, replies: int) -> int | None:
    """How many hostile replies a rule stands.

    Args:
        rule: its name.
        replies: how many there are in all.

    Returns:
        The number its file gives; None where it makes no such claim.
    """
    claim = getattr(registry.load("aggregation", rule), "withstands", None)
    return None if claim is None else int(claim(replies))


def factors(rule: str, round: int) -> str:
    """Which of LoRA's factors clients train in a round under a rule.

    Args:
        rule: name of a rule, or `none`.
        round: the round's number, from 1.

    Returns:
        `both`, `a` or `b`; the head is trained in any case.
    """
    if rule not in registry.names("aggregation"):
        return "both"
    made = getattr(registry.load("aggregation", rule), "factors", None)
    return made(round) if made else "both"


def merging(rule: str) -> str:
    """Which merging figures clients send beside their adapters under a rule.

    Args:
        rule: name of a rule, or `none`.

    Returns:
        `fisher`, `gram`, or empty for none.
    """
    if rule not in registry.names("aggregation"):
        return ""
    return str(getattr(registry.load("aggregation", rule), "MERGING", ""))


def grows(rule: str) -> bool:
    """Whether the adapter that a rule returns has another rank than those it was given.

    Args:
        rule: name of a rule, or `none`.

    Returns:
        Whether it has, so that clients could not train on.
    """
    if rule not in registry.names("aggregation"):
        return False
    return bool(getattr(registry.load("aggregation", rule), "GROWS", False))
