"""What a client keeps on disk of sub-FMs: their manifests, and each tensor and file once.

Layout: `<root>/manifests/<digest>.json` is the manifest of a sub-FM,
`<root>/tensors/<digest>.safetensors` a tensor in the form it came in, `<root>/files/<digest>` a
file. What two sub-FMs share, of whatever run, task or version, lies there once. Every file appears
whole (rename) or not at all; what is found corrupt is removed and asked for again. Any number of
processes may use one root at once; how many sub-FMs stay is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save as save_tensors

from fedpft_core.disk import evict, whole
from fedpft_core.errors import ReplyError
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.coded import Coded, smallest
from fedpft_core.wire.identity import is_digest
from fedpft_core.wire.manifest import Manifest
from fedpft_core.wire.package import Package
from fedpft_core.wire.parcel import Parcel, check_file, opened

_UNUSED_SECONDS = 86_400.0  # how long what belongs to no sub-FM waits for the rest of one


@dataclass(frozen=True)
class Found:
    """What the store has of a sub-FM.

    Attributes:
        manifest: what belongs to it.
        package: the sub-FM; None where something of it is lacking.
        lacking: digests of the tensors and files that are not here.
    """

    manifest: Manifest
    package: Package | None
    lacking: tuple[str, ...]


class Store:
    """Sub-FMs on disk. `keep` bounds how many stay (least recently used go first)."""

    def __init__(self, root: Path, keep: int = 3) -> None:
        self.root = root
        self.keep = keep

    def path(self, digest: str) -> Path:
        """Where a sub-FM's manifest lies or would lie.

        Args:
            digest: the sub-FM's.

        Returns:
            The file, which need not be there.

        Raises:
            ValueError: the digest is no sha256.
        """
        _check(digest)
        return self.root / "manifests" / f"{digest}.json"

    def tensor(self, digest: str) -> Path:
        """Where a tensor lies or would lie.

        Args:
            digest: the tensor's.

        Returns:
            The file, which need not be there.

        Raises:
            ValueError: the digest is no sha256.
        """
        _check(digest)
        return self.root / "tensors" / f"{digest}.safetensors"

    def file(self, digest: str) -> Path:
        """Where a file of a package lies or would lie.

        Args:
            digest: of its content.

        Returns:
            The file, which need not be there.

        Raises:
            ValueError: the digest is no sha256.
        """
        _check(digest)
        return self.root / "files" / digest

    def digests(self) -> tuple[str, ...]:
        """Which sub-FMs are here with all that belongs to them.

        Returns:
            Their digests, sorted.
        """
        return tuple(d for d in self._named() if self._whole(d))

    def touch(self, digest: str) -> bool:
        """Count a sub-FM as just used.

        Args:
            digest: the sub-FM's.

        Returns:
            Whether it is here, with all that belongs to it.

        Raises:
            ValueError: the digest is no sha256.
        """
        try:
            os.utime(self.path(digest))
        except OSError:
            return False
        return self._whole(digest)

    def get(self, digest: str) -> Package | None:
        """Read and verify a sub-FM, which then counts as just used.

        Args:
            digest: the sub-FM's.

        Returns:
            The package; None when it is absent or something of it was corrupt (then that is gone).

        Raises:
            ValueError: the digest is no sha256.
        """
        found = self.read(digest)
        return found.package if found else None

    def read(self, digest: str) -> Found | None:
        """As `get`, saying what is lacking.

        Args:
            digest: the sub-FM's.

        Returns:
            What there is; None where nobody knows what belongs to the sub-FM.

        Raises:
            ValueError: the digest is no sha256.
        """
        manifest = self._manifest(digest)
        if manifest is None:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path(digest))
        return self.fill(manifest)

    def fill(self, manifest: Manifest, parcel: Parcel | None = None) -> Found:
        """Put a sub-FM together from what is here and what has come.

        Args:
            manifest: what belongs to it.
            parcel: what has come of it; None for nothing.

        Returns:
            The package, or what is lacking for it. What was found corrupt is gone.

        Raises:
            ReplyError: something that has come is not what the manifest promises.
        """
        tensors: Tensors = parcel.tensors() if parcel else {}
        files: dict[str, bytes] = dict(parcel.files) if parcel else {}
        lacking = []
        for digest in manifest.entries.keys() - tensors.keys():
            with _removing_what_is_bad(self.tensor(digest)) as path:
                tensors[digest] = opened(manifest, digest, _coded(path))
            if digest not in tensors:
                lacking.append(digest)
        for digest in set(manifest.files.values()) - files.keys():
            with _removing_what_is_bad(self.file(digest)) as path:
                data = path.read_bytes()
                check_file(digest, data)
                files[digest] = data
            if digest not in files:
                lacking.append(digest)
        if lacking:
            return Found(manifest, None, tuple(sorted(lacking)))
        return Found(manifest, Package.made(manifest, tensors, files), ())

    def put(
        self, digest: str, package: Package, digests: Mapping[str, str] | None = None,
        parcel: Parcel | None = None,
    ) -> None:  # fmt: skip
        """Write what is not here of a package; the least recently used sub-FMs make room.

        Args:
            digest: the package's, which the caller has verified.
            package: what is written.
            digests: sha256 of each of its weights, by name; None to hash them here.
            parcel: forms in which weights have come; the others are put into their smallest.

        Raises:
            ValueError: the digest is no sha256.
            OSError: the disk is full. What this call has written is removed; what was here before
                stays.
        """
        path = self.path(digest)
        if self.touch(digest):
            return
        manifest = package.manifest(digests)
        came = parcel.coded if parcel else {}
        tensors = {e.digest: package.weights[name] for name, e in manifest.weights.items()}

        with self._all_or_nothing() as written:
            for each, tensor in tensors.items():
                if self._misses(self.tensor(each)):
                    form = came.get(each) or smallest(tensor)
                    self._write(self.tensor(each), _blob(form), written)
            for name, each in manifest.files.items():
                if self._misses(self.file(each)):
                    self._write(self.file(each), package.files[name], written)
            # Last, so that whoever finds it finds the rest. Another process may write the same
            # first: equal digests, equal bytes. What it evicts meanwhile is asked for.
            whole.write(path, manifest.to_bytes())
        self._evict(path)

    def keep_parts(self, parcel: Parcel) -> None:
        """Write what has come of a package that is not whole yet.

        Args:
            parcel: verified by `fill`.

        Raises:
            OSError: the disk is full; what this call has written is removed.
        """
        with self._all_or_nothing() as written:
            for digest, coded in parcel.coded.items():
                if self._misses(self.tensor(digest)):
                    self._write(self.tensor(digest), _blob(coded), written)
            for digest, data in parcel.files.items():
                if self._misses(self.file(digest)):
                    self._write(self.file(digest), data, written)

    def remove(self, digest: str) -> None:
        """Drop a sub-FM if it is here, with what belongs to no other.

        Args:
            digest: the sub-FM's.

        Raises:
            ValueError: the digest is no sha256.
        """
        path = self.path(digest)
        manifest = self._manifest(digest)
        with contextlib.suppress(OSError):
            used = path.stat().st_mtime
            path.unlink()
            if manifest:
                self._drop(manifest.contents - self._contents(), used)

    # --- inside ---------------------------------------------------------------------------

    def _named(self) -> list[str]:
        names = (p.name.removesuffix(".json") for p in (self.root / "manifests").glob("*.json"))
        return sorted(filter(is_digest, names))

    def _manifest(self, digest: str) -> Manifest | None:
        """A manifest that is here; a corrupt one is removed."""
        with _removing_what_is_bad(self.path(digest)) as path:
            found = Manifest.from_bytes(path.read_bytes())
            if found.digest != digest:
                raise ReplyError("a manifest on the disk is not what its name says")
            return found
        return None

    def _whole(self, digest: str) -> bool:
        manifest = self._manifest(digest)
        return manifest is not None and all(
            (self.tensor(d) if d in manifest.entries else self.file(d)).is_file()
            for d in manifest.contents
        )

    def _contents(self) -> set[str]:
        """Digests of all that belongs to any sub-FM here."""
        out: set[str] = set()
        for digest in self._named():
            manifest = self._manifest(digest)
            out |= manifest.contents if manifest else set()
        return out

    def _paths(self) -> Iterator[tuple[str, Path]]:
        for folder in (self.root / "tensors", self.root / "files"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if is_digest(path.name.partition(".")[0]):
                    yield path.name.partition(".")[0], path

    def _evict(self, spare: Path) -> None:
        paths = map(self.path, self._named())
        for path in evict.least_recently_used(paths, self.keep, spare=spare):
            self.remove(path.name.removesuffix(".json"))
        self._drop({d for d, _ in self._paths()} - self._contents(), time.time() - _UNUSED_SECONDS)
        for path in self.root.iterdir():
            if is_digest(path.name):  # of a version that kept each sub-FM in a folder
                whole.remove(path)

    def _drop(self, digests: set[str] | frozenset[str], before: float) -> None:
        """Remove tensors and files that nobody has used since a moment."""
        for digest, path in self._paths():
            with contextlib.suppress(OSError):
                if digest in digests and path.stat().st_mtime <= before:
                    path.unlink()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[list[Path]]:
        for name in ("manifests", "tensors", "files"):
            folder = self.root / name
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            whole.sweep(folder)
        whole.sweep(self.root)
        written: list[Path] = []
        try:
            yield written
        except OSError:
            for path in written:
                path.unlink(missing_ok=True)
            raise

    def _misses(self, path: Path) -> bool:
        """Whether a file is not here; one that is counts as just used."""
        try:
            os.utime(path)
        except OSError:
            return True
        return False

    def _write(self, path: Path, data: bytes, written: list[Path]) -> None:
        whole.write(path, data)
        written.append(path)


def _check(digest: str) -> None:
    if not is_digest(digest):
        raise ValueError(f"not a digest: {digest[:80]!r}")


def _blob(coded: Coded) -> bytes:
    scale = {} if coded.scale is None else {"scale": coded.scale.contiguous()}
    try:
        return save_tensors({"values": coded.values.contiguous()} | scale)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


def _coded(path: Path) -> Coded:
    found = codec.unpack(path.read_bytes())
    if not {"values"} <= found.keys() <= {"values", "scale"}:
        raise ReplyError("a file of the store is no tensor")
    return Coded(found["values"], found.get("scale"))


@contextlib.contextmanager
def _removing_what_is_bad(path: Path) -> Iterator[Path]:
    """Read a file in the block; if it turns out corrupt it is removed, and the block ends."""
    try:
        seen = path.stat().st_ino
    except OSError:
        seen = -1
    try:
        yield path
    except OSError:
        pass
    except (ReplyError, ValueError, KeyError):
        # Not if another process has put a good one there meanwhile.
        with contextlib.suppress(OSError):
            if path.stat().st_ino == seen:
                path.unlink()


__all__ = ["Found", "Store"]
