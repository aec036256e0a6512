"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedpft_core.disk import whole

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    whole.write(path, b"old")
    with whole.file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and names(tmp_path) == {"a"}


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    path, folder = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"old")
    folder.mkdir()
    (folder / "x").write_bytes(b"old")
    with pytest.raises(RuntimeError), whole.file(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    with pytest.raises(RuntimeError), whole.folder(folder, replace=True) as temporary:
        (temporary / "x").write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and (folder / "x").read_bytes() == b"old"
    assert names(tmp_path) == {"a", "b"}


@pytest.mark.parametrize("sync", [True, False])
def test_a_folder_replaces_or_gives_way(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "a"
    for replace, content in ((False, b"1"), (False, b"2"), (True, b"3")):
        with whole.folder(path, replace=replace, sync=sync) as temporary:
            (temporary / "in").mkdir()
            (temporary / "in" / "x").write_bytes(content)
        wanted = b"1" if content == b"2" else content
        assert (path / "in" / "x").read_bytes() == wanted
        assert names(tmp_path) == {"a"}


def test_everything_is_on_the_disk_before_a_folder_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        seen.append(".new" if name.startswith(".new-") else name)
        assert (tmp_path / "a").exists() == (name == tmp_path.name)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with whole.folder(tmp_path / "a", replace=True, sync=True) as temporary:
        (temporary / "x").write_bytes(b"x")
    assert seen == ["x", ".new", tmp_path.name]


def test_an_error_of_the_system_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    for replace in (True, False):
        with (
            pytest.raises(OSError, match="No space left"),
            whole.folder(tmp_path / "a", replace=replace),
        ):
            pass
    assert names(tmp_path) == set()


def test_a_killed_writer_leaves_what_was_there_and_is_swept_up(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = (
        "import os, sys; from pathlib import Path; from fedpft_core.disk import whole\n"
        "with whole.file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
    assert done.returncode == -9
    (left,) = names(tmp_path) - {"a"}
    assert path.read_bytes() == b"old"
    whole.sweep(tmp_path)
    assert names(tmp_path) == {"a", left}, "it may belong to a living process"
    os.utime(tmp_path / left, (time.time() - 7200,) * 2)
    whole.sweep(tmp_path)
    assert names(tmp_path) == {"a"}


def test_sweeping_takes_folders_too_and_nothing_else(tmp_path: Path) -> None:
    for name in (".new-1", ".gone-1", ".hidden", "round-1"):
        (tmp_path / name / "in").mkdir(parents=True)
    whole.sweep(tmp_path, 0.0)
    assert names(tmp_path) == {".hidden", "round-1"}


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a" / "in").mkdir(parents=True)
    whole.remove(tmp_path / "a")
    whole.remove(tmp_path / "a")
    assert names(tmp_path) == set()


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.md"
    target.write_text("old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        whole.write(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
    assert target.read_text() == "old"
