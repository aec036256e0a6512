"""Room on the disk and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app.check import room
from fedpft_core.errors import UserError


def test_folders(tmp_path: Path) -> None:
    assert "is writable" in room.folder(tmp_path / "new" / "cache", 10)
    assert not list((tmp_path / "new" / "cache").iterdir())
    with pytest.raises(UserError, match=r"free, but 4 sub-FMs .* need 10000000\.0 GB"):
        room.folder(tmp_path, 10**16)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        room.folder(tmp_path / "file", 0)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.available_memory() > 10**6
    assert "a message needs about 1 MB" in room.memory(10**6)
    with pytest.raises(UserError, match="of memory are free, but a message needs about"):
        room.memory(10**16)
