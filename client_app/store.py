"""What a client keeps on disk: sub-FMs, each under its digest, and updates not yet sent in full.

Layout: `<root>/<digest>/meta.json`, `weights.safetensors`, `files/…`. A folder appears whole
(rename) or not at all; what is found corrupt is removed and asked for again. Any number of
processes may use one root at once; how many sub-FMs stay is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedpft_core.disk import evict, whole
from fedpft_core.errors import ReplyError
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.identity import combine_digest, is_digest, tensor_digest
from fedpft_core.wire.meta import PackageMeta
from fedpft_core.wire.package import Package

_HEX = frozenset("0123456789abcdef")


class Store:
    """Packages on disk. `keep` bounds how many sub-FMs stay (least recently used go first)."""

    def __init__(self, root: Path, keep: int = 3) -> None:
        self.root = root
        self.keep = keep

    def folder(self, digest: str) -> Path:
        """Where a package lies or would lie.

        Args:
            digest: the package's.

        Returns:
            The folder, which need not be there.

        Raises:
            ValueError: the digest is no sha256.
        """
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest[:80]!r}")
        return self.root / digest

    def digests(self) -> tuple[str, ...]:
        """Which packages are here.

        Returns:
            Their digests, sorted.
        """
        if not self.root.is_dir():
            return ()
        return tuple(sorted(p.name for p in self.root.iterdir() if is_digest(p.name)))

    def touch(self, digest: str) -> bool:
        """Count a package as just used.

        Args:
            digest: the package's.

        Returns:
            Whether it is here.

        Raises:
            ValueError: the digest is no sha256.
        """
        try:
            os.utime(self.folder(digest))
        except OSError:
            return False
        return True

    def get(self, digest: str) -> Package | None:
        """Read and verify a package, which then counts as just used.

        Args:
            digest: the package's.

        Returns:
            The package; None when it is absent or was corrupt (then it is gone).

        Raises:
            ValueError: the digest is no sha256.
        """
        found = self.read(digest)
        return found[0] if found else None

    def read(self, digest: str) -> tuple[Package, dict[str, str]] | None:
        """As `get`, with the sha256 of each tensor, which verifying has to take anyway.

        Args:
            digest: the package's.

        Returns:
            The package, and the sha256 of each of its tensors by name; None as for `get`.

        Raises:
            ValueError: the digest is no sha256.
        """
        folder = self.folder(digest)
        try:
            seen = folder.stat().st_ino
        except OSError:
            return None
        try:
            # Copied out of the mapped file first: what is verified must be what is used.
            mapped = load_file(folder / "weights.safetensors")
            weights = {k: t.clone() for k, t in mapped.items()}
            meta = (folder / "meta.json").read_text(encoding="utf-8")
            files = {p.name: p.read_bytes() for p in sorted((folder / "files").iterdir())}
            package = Package(PackageMeta.from_json(meta), files, weights)
            digests = {k: tensor_digest(t) for k, t in weights.items()}
            good = combine_digest(meta, files, digests) == digest
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError):
            # RuntimeError: how torch reports a file that went away between two of its steps.
            good = False
        if not good:
            # Not if another process has evicted it meanwhile, and perhaps put a good one there.
            with contextlib.suppress(OSError):
                if folder.stat().st_ino == seen:
                    self.remove(digest)
            return None
        self.touch(digest)
        return package, digests

    def put(self, digest: str, package: Package) -> None:
        """Write a package, unless it is here; the least recently used ones make room.

        Args:
            digest: the package's, which the caller has verified.
            package: what is written.

        Raises:
            ValueError: the digest is no sha256.
            OSError: the disk is full. What was half written is removed; what was here before stays.
        """
        folder = self.folder(digest)
        if self.touch(digest):
            return
        self.root.mkdir(parents=True, exist_ok=True)
        whole.sweep(self.root)
        # Another process may write the same content first: equal digests, equal bytes. It may be
        # gone again by the end; whoever misses it asks for it.
        with whole.folder(folder, replace=False, mode=0o700) as temp:
            (temp / "files").mkdir()
            for name, data in package.files.items():
                (temp / "files" / name).write_bytes(data)
            (temp / "meta.json").write_text(package.meta.to_json(), encoding="utf-8")
            weights = {k: t.contiguous() for k, t in package.weights.items()}
            try:
                save_file(weights, temp / "weights.safetensors")
            except SafetensorError as error:
                # How safetensors reports a full disk or any other failure to write.
                raise OSError(errno.EIO, str(error)) from error
        for path in evict.least_recently_used(
            map(self.folder, self.digests()), self.keep, spare=folder
        ):
            whole.remove(path)

    def remove(self, digest: str) -> None:
        """Drop a package if it is here.

        Args:
            digest: the package's.

        Raises:
            ValueError: the digest is no sha256.
        """
        whole.remove(self.folder(digest))


class Residuals:
    """What ternary updates left unsent, by run, client and round (error feedback).

    `get` for round t gives what the newest round before t left, so a round that is repeated, or
    done again after the server came back from a checkpoint, starts from the same bits. All of it
    may be lost at any time: that client's next update starts without a residual.
    """

    def __init__(self, root: Path, keep_rounds: int = 3, keep_runs: int = 4) -> None:
        self.root = root
        self.keep_rounds = keep_rounds
        self.keep_runs = keep_runs

    def _folder(self, run: str, client: str) -> Path:
        """Where one client's residuals of one run lie.

        Args:
            run: names the run, 8 to 64 hex digits; it becomes part of the path.
            client: the client's name, of which a digest becomes part of the path.

        Returns:
            The folder, which need not be there.

        Raises:
            ValueError: the run is no run identifier.
        """
        if not 8 <= len(run) <= 64 or not _HEX.issuperset(run):
            raise ValueError(f"not a run: {run[:80]!r}")
        return self.root / run / hashlib.sha256(client.encode()).hexdigest()[:32]

    def get(self, run: str, client: str, round: int) -> Tensors:
        """The residual to start a round from.

        Args:
            run: names the run, 8 to 64 hex digits.
            client: the client's name.
            round: the round that begins.

        Returns:
            float32 tensors by name; empty when there are none or they are corrupt.

        Raises:
            ValueError: the run is no run identifier.
        """
        rounds = evict.rounds(self._folder(run, client))
        before = [n for n in rounds if n < round]
        if not before:
            return {}
        # Never an older one instead of a corrupt one: that has been sent already.
        try:
            digest, _, data = rounds[max(before)].read_bytes().partition(b"\n")
            if hashlib.sha256(data).hexdigest().encode() == digest:
                return codec.unpack(data)
        except (OSError, ReplyError):
            pass
        return {}

    def put(self, run: str, client: str, round: int, tensors: Tensors) -> None:
        """Keep what a round left; forget later rounds, which are being done again.

        Args:
            run: names the run, 8 to 64 hex digits.
            client: the client's name.
            round: the round that left it.
            tensors: what was not sent, float32, by name.

        Raises:
            ValueError: the run is no run identifier.
            OSError: the disk is full.
        """
        folder = self._folder(run, client)
        folder.mkdir(parents=True, exist_ok=True)
        data = codec.pack(tensors)
        content = hashlib.sha256(data).hexdigest().encode() + b"\n" + data
        whole.write(folder / f"round-{round:06d}", content)
        for path in evict.superseded(folder, round, self.keep_rounds):
            path.unlink(missing_ok=True)
        mine = self.root / run
        with contextlib.suppress(OSError):
            os.utime(mine)
        for old in evict.least_recently_used(self.root.iterdir(), self.keep_runs, spare=mine):
            shutil.rmtree(old, ignore_errors=True)
