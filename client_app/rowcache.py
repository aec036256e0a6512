"""A node's encoded rows on disk, so that the next message need not tokenise or decode again.

Layout: `<root>/<key>.safetensors`, the key a digest of everything the rows depend on. A file
appears whole (rename) or not at all; what is damaged, foreign or of another format is made anew.
Any number of processes may share a folder; how many files and bytes stay is bounded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Captioned, Examples, Input
from fedpft_core.disk import evict, whole

if TYPE_CHECKING:
    import torch

FORMAT = "fedpft rows 1"
"""To be changed with anything that changes what a file holds."""
_FOLDS = "//folds"
_PARTS = frozenset(
    ("labels", "ids", "offsets", "token_types", "token_labels", "pixels", "scale", "shift",
     "prompts", _FOLDS)
)  # fmt: skip


def folds_of(examples: Examples) -> np.ndarray:
    """A number in [0, 2⁶²) for each row, evenly spread: a digest of its input.

    Rows with the same input have the same number whatever file they lie in, so a share of the
    rows chosen by it stays the same when rows come or go.

    Args:
        examples: the rows; their labels have no part in it.

    Returns:
        int64 (rows,).
    """
    found = (hashlib.sha256(b"fedpft fold\n" + _bytes(row)).digest() for row in examples.inputs)
    return np.fromiter(
        (int.from_bytes(d[:8], "big") >> 2 for d in found), np.int64, len(examples)
    )  # fmt: skip


def held_out(folds: np.ndarray, share: float) -> np.ndarray:
    """Which rows a node keeps from training.

    Args:
        folds: int64 (rows,), as `folds_of` gives them.
        share: about what part of the rows is kept, in [0, 1].

    Returns:
        bool (rows,), True for those kept.
    """
    return folds < int(share * 2**62)


def content_of(examples: Examples) -> str:
    """A digest of the content of some rows.

    Args:
        examples: the rows.

    Returns:
        sha256 over all labels and inputs, 64 hex digits.
    """
    h = hashlib.sha256(examples.labels.tobytes())
    for row in examples.inputs:
        data = _bytes(row)
        h.update(f"\n{len(data)} ".encode())
        h.update(data)
    return h.hexdigest()


def content_of_file(path: Path) -> str:
    """A digest of a file.

    Args:
        path: the file.

    Returns:
        sha256 over its bytes, 64 hex digits.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*what: Any) -> str:
    """The key of rows that depend on some values.

    Args:
        *what: everything they depend on, as JSON has it.

    Returns:
        sha256 over these and the format of the files, 64 hex digits.
    """
    return hashlib.sha256(json.dumps([FORMAT, *what]).encode()).hexdigest()


def _bytes(row: Input) -> bytes:
    if isinstance(row, bytes):
        return row
    if isinstance(row, Captioned):
        return json.dumps([row.prompt, len(row.image)]).encode() + row.image
    return json.dumps(row).encode()


class RowCache:
    """Encoded rows by key, `keep` files and `keep_bytes` at most; least recently used go first."""

    def __init__(self, root: Path, keep: int = 4, keep_bytes: int = 4_000_000_000) -> None:
        self.root = root
        self.keep = keep
        self.keep_bytes = keep_bytes

    def path(self, key: str) -> Path:
        """Where rows lie or would lie.

        Args:
            key: the rows' key.

        Returns:
            The file, which need not be there.
        """
        return self.root / f"{key}.safetensors"

    def get(self, key: str) -> tuple[Encoded, np.ndarray] | None:
        """Rows and their folds, verified.

        The tensors lie in the mapped file, which no process ever writes to again.

        Args:
            key: the rows' key.

        Returns:
            Rows and folds int64 (rows,); None when they are not here or of no use (then gone).
        """
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            found = self._read(path, key)
        except Exception:
            # Any bytes may lie there, and what safetensors or torch make of them is their secret.
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def _read(self, path: Path, key: str) -> tuple[Encoded, np.ndarray]:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if meta.get("format") != FORMAT or meta.get("key") != key:
            raise ValueError("rows of another format or key")
        if not tensors.keys() <= _PARTS or meta.get("check") != _check(meta, tensors):
            raise ValueError("damaged rows")
        folds = tensors.pop(_FOLDS).numpy()
        rows = Encoded.from_tensors(tensors, int(meta["pad_id"]), int(meta["pad_token_type"]))
        if len(rows) != len(folds):
            raise ValueError("rows without folds")
        return rows, folds

    def put(self, key: str, rows: Encoded, folds: np.ndarray) -> None:
        """Keep rows, unless they are larger than all that may be kept.

        Args:
            key: the rows' key.
            rows: the rows as model inputs.
            folds: int64 (rows,), as `folds_of` gives them.

        Raises:
            OSError: the disk is full; nothing half written stays.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {k: t.contiguous() for k, t in rows.tensors().items()}
        tensors[_FOLDS] = torch.from_numpy(np.ascontiguousarray(folds))
        if sum(t.numel() * t.element_size() for t in tensors.values()) > self.keep_bytes:
            return
        meta = {
            "format": FORMAT,
            "key": key,
            "pad_id": str(rows.pad_id),
            "pad_token_type": str(rows.pad_token_type),
        }
        meta["check"] = _check(meta, tensors)
        self.root.mkdir(parents=True, exist_ok=True)
        with whole.file(self.path(key)) as temporary:
            try:
                save_file(tensors, temporary, metadata=meta)
            except SafetensorError as error:
                # How safetensors reports a full disk or any other failure to write.
                raise OSError(str(error)) from error
        whole.sweep(self.root)
        for path in evict.least_recently_used(
            self.root.glob("*.safetensors"),
            self.keep,
            spare=self.path(key),
            keep_bytes=self.keep_bytes,
        ):
            path.unlink(missing_ok=True)


def _check(meta: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over everything a file says."""
    import torch

    h = hashlib.sha256(json.dumps(sorted((k, v) for k, v in meta.items() if k != "check")).encode())
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        # memoryview knows no bytes of an empty tensor.
        if t.numel():
            h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


__all__: Sequence[str] = (
    "FORMAT", "RowCache", "content_of", "content_of_file", "folds_of", "held_out", "key_of",
)  # fmt: skip
