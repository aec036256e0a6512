"""The ledger of an FM's neurons that have left, over all runs of its owner.

One file an FM, named by the digest of its FFNs. It is read, changed and written whole under a
lock, so that any number of runs may go on at once: no two of them can both take what is left of a
budget.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpft_core import config as configs
from fedpft_core.config import Config
from fedpft_core.disk import lock, whole
from fedpft_core.errors import UserError
from fedpft_core.wire.identity import is_digest

_PATIENCE = 30.0  # seconds that another run may hold the ledger

Masks = tuple[Tensor, ...]


@dataclass(frozen=True)
class Entry:
    """A run that has disclosed neurons.

    Attributes:
        run: its folder.
        began: when it first did, Unix seconds.
        neurons: how many its sub-FM holds.
        copied: how many of them with the FM's bits.
    """

    run: str
    began: float
    neurons: int
    copied: int = 0


@dataclass(frozen=True)
class Disclosed:
    """The state of an FM's ledger.

    Attributes:
        neurons: by FM block, bool [F], those that have left, changed or not.
        copied: by FM block, bool [F], those that have left with the FM's bits.
        runs: that disclosed them, in order of time.
    """

    neurons: Masks
    copied: Masks
    runs: tuple[Entry, ...] = field(default=())

    @property
    def total(self) -> int:
        """Neurons of the FM."""
        return sum(len(m) for m in self.neurons)

    @property
    def count(self) -> int:
        """Neurons that have left."""
        return count(self.neurons)


def count(masks: Sequence[Tensor]) -> int:
    """How many neurons masks name.

    Args:
        masks: bool [F] of each block.

    Returns:
        Their number.
    """
    return sum(int(m.sum()) for m in masks)


def folder(config: Config) -> Path:
    """Where the ledgers of a server lie.

    Args:
        config: of a run.

    Returns:
        plan.ledger, or `disclosed` in $FEDPFT_HOME; it need not exist.
    """
    given = config.plan.ledger
    return Path(given).expanduser() if given else configs.home() / "disclosed"


class Ledger:
    """The ledger of one FM.

    Args:
        root: the folder of ledgers.
        fm: digest of the FM's FFNs.
        widths: neurons of each of its blocks.
    """

    def __init__(self, root: Path, fm: str, widths: Sequence[int]) -> None:
        self.root = root
        self.fm = fm
        self.widths = list(widths)
        self.path = root / f"{fm}.json"

    def read(self) -> Disclosed:
        """What has left so far.

        Returns:
            The ledger's state; nothing of an FM that has none.

        Raises:
            UserError: the file is damaged, or of another FM.
        """
        if not self.path.is_file():
            nothing = tuple(torch.zeros(w, dtype=torch.bool) for w in self.widths)
            return Disclosed(nothing, nothing)
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            runs = tuple(Entry(**run) for run in raw["runs"])
            own = raw["fm"] == self.fm and raw["widths"] == self.widths
            masks = [_masks(raw[k], self.widths) for k in ("neurons", "copied")] if own else []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(str(error)) from error
        if not own:
            raise self._damaged("it is of another FM")
        return Disclosed(masks[0], masks[1], runs)

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self.path}: the ledger of disclosed neurons is damaged ({why}); put back a copy of "
            "it, or remove it and with it the knowledge of what has left."
        )

    def add(self, neurons: Masks, copied: Masks, run: str, budget: float = 1.0) -> Disclosed:
        """Note neurons that a run sends, before it does.

        Args:
            neurons: by FM block, bool [F], those that its sub-FM holds.
            copied: those of them with the FM's bits.
            run: the run's folder, which is one entry however often it is noted.
            budget: the share of the FM's neurons that may have left afterwards.

        Returns:
            The ledger's state before.

        Raises:
            UserError: the budget does not suffice (nothing is noted then), the ledger is damaged,
                held by others for too long, or cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                before = self.read()
                within(before, neurons, budget)
                self._write(_with(before, neurons, copied, run))
                return before
        except OSError as error:
            raise UserError(
                f"plan.ledger = {self.root}: cannot be written ({error.strerror}), and nothing "
                "is sent that it does not know of."
            ) from error

    def _write(self, state: Disclosed) -> None:
        raw = {
            "fm": self.fm,
            "widths": self.widths,
            "neurons": [_hex(m) for m in state.neurons],
            "copied": [_hex(m) for m in state.copied],
            "runs": [vars(e) for e in state.runs],
        }
        with whole.file(self.path) as part, open(part, "w", encoding="utf-8") as out:
            json.dump(raw, out)
            out.flush()
            os.fsync(out.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Wait for the ledger and hold it."""
        held, deadline = self.root / f".{self.fm}.lock", time.monotonic() + _PATIENCE
        refusal = f"plan.ledger = {self.root}: held by another run for {_PATIENCE:g} s."
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(lock.held(held, refusal))
                    break
                except UserError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
            yield


def within(before: Disclosed, neurons: Masks, budget: float) -> None:
    """Refuse to disclose more than may ever leave.

    Args:
        before: what has left.
        neurons: what a run would send.
        budget: plan.disclosure-budget.

    Raises:
        UserError: with the shares before and after.
    """
    after = count([a | b for a, b in zip(before.neurons, neurons, strict=True)])
    if after > budget * before.total:
        shares = [100 * n / before.total for n in (after, before.count)]
        raise UserError(
            f"plan.disclosure-budget = {budget:g}: with this run {shares[0]:.1f} % of the FM's FFN "
            f"neurons would have left, after {shares[1]:.1f} % in the runs before "
            "(plan.keep-share, plan.retained-layers and plan.prefer-disclosed decide; `fedpft "
            "audit` shows them)."
        )


def known(root: Path) -> list[tuple[str, Disclosed]]:
    """The ledgers of a folder.

    Args:
        root: the folder, which need not exist.

    Returns:
        Digest and state of each, by digest.

    Raises:
        UserError: one of them is damaged.
    """
    out = []
    for path in sorted(root.glob("*.json")) if root.is_dir() else ():
        if not is_digest(path.stem):
            continue
        try:
            widths = [int(w) for w in json.loads(path.read_text(encoding="utf-8"))["widths"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: the ledger is damaged ({error}).") from error
        out.append((path.stem, Ledger(root, path.stem, widths).read()))
    return out


def _with(before: Disclosed, neurons: Masks, copied: Masks, run: str) -> Disclosed:
    earlier = next((e for e in before.runs if e.run == run), None)
    rest = tuple(e for e in before.runs if e.run != run)
    own = Entry(
        run, earlier.began if earlier else time.time(), count(neurons),
        max(count(copied), earlier.copied if earlier else 0),
    )  # fmt: skip
    return Disclosed(
        tuple(a | b for a, b in zip(before.neurons, neurons, strict=True)),
        tuple(a | b for a, b in zip(before.copied, copied, strict=True)),
        (*rest, own),
    )


def _hex(mask: Tensor) -> str:
    return np.packbits(mask.numpy()).tobytes().hex()


def _masks(raw: Any, widths: Sequence[int]) -> Masks:
    out = []
    for text, width in zip(raw, widths, strict=True):
        packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
        if len(packed) != -(-width // 8):
            raise ValueError("a block has another number of neurons")
        out.append(torch.from_numpy(np.unpackbits(packed, count=width).astype(bool)))
    return tuple(out)
