"""Reading files that somebody else has named, whatever lies under the name."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read(path: Path) -> bytes:
    """Read a regular file whole.

    Args:
        path: its name. A pipe or a device is refused at once, where opening it as a file would
            wait for ever or never end.

    Returns:
        The content.

    Raises:
        OSError: there is no such file, it is no regular file or cannot be read, or no file can
            have that name.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a zero byte, or a character that no encoding has
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from error
    with open(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            why = "this is a folder" if stat.S_ISDIR(mode) else "this is a pipe or a device"
            raise OSError(errno.EINVAL, f"{why}, a file is needed", str(path))
        return file.read()
