"""A client's sub-FMs on disk, by digest: content-addressed, bounded, safe under concurrency.

Layout: `<root>/<digest>/meta.json`, `weights.safetensors`, `files/…`. A folder appears whole
(rename) or not at all; what is found corrupt is removed and asked for again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .exchange import Package

_HEX = frozenset("0123456789abcdef")
_STALE_SECONDS = 3600.0


class Store:
    """Packages on disk. `keep` bounds how many sub-FMs stay (least recently used go first)."""

    def __init__(self, root: Path, keep: int = 3) -> None:
        self.root = root
        self.keep = keep

    def folder(self, digest: str) -> Path:
        """Where a package lies or would lie. Raises ValueError for what is no sha256."""
        if len(digest) != 64 or not _HEX.issuperset(digest):
            raise ValueError(f"not a digest: {digest[:80]!r}")
        return self.root / digest

    def digests(self) -> tuple[str, ...]:
        """What is here, sorted."""
        if not self.root.is_dir():
            return ()
        names = (p.name for p in self.root.iterdir())
        return tuple(sorted(n for n in names if len(n) == 64 and _HEX.issuperset(n)))

    def get(self, digest: str) -> Package | None:
        """Read and verify a package; None when it is absent or was corrupt (then it is gone)."""
        folder = self.folder(digest)
        try:
            # The file handle keeps the weights alive even if another process evicts the folder.
            weights = load_file(folder / "weights.safetensors")
            meta = (folder / "meta.json").read_text(encoding="utf-8")
            files = {p.name: p.read_bytes() for p in sorted((folder / "files").iterdir())}
            package = Package(meta, files, weights)
            good = package.digest() == digest
        except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError):
            good = False
        if not good:
            self.remove(digest)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder)
        return package

    def put(self, digest: str, package: Package) -> None:
        """Write a package whose digest the caller has verified. Raises OSError on a full disk,
        after removing what was half written."""
        folder = self.folder(digest)
        if folder.is_dir():
            os.utime(folder)
            return
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        temp = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        try:
            (temp / "files").mkdir()
            for name, data in package.files.items():
                (temp / "files" / name).write_bytes(data)
            (temp / "meta.json").write_text(package.meta, encoding="utf-8")
            save_file(
                {k: t.contiguous() for k, t in package.weights.items()},
                temp / "weights.safetensors",
            )
            try:
                os.rename(temp, folder)
            except OSError:
                # Another process wrote the same content first: equal digests, equal bytes.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        self._evict(spare=digest)

    def remove(self, digest: str) -> None:
        """Drop a package if it is here. Renamed first, so that no reader sees half of it."""
        gone = self.root / f".gone-{digest[:16]}-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.suppress(OSError):
            os.rename(self.folder(digest), gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _evict(self, spare: str) -> None:
        def age(digest: str) -> float:
            try:
                return self.folder(digest).stat().st_mtime
            except OSError:
                return 0.0

        others = sorted((d for d in self.digests() if d != spare), key=age, reverse=True)
        for digest in others[max(0, self.keep - 1) :]:
            self.remove(digest)

    def _sweep(self) -> None:
        """Remove what killed processes left half written."""
        for path in self.root.glob(".*-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
