"""Files that somebody else named: a pipe that waits for ever, a device without end, a name that can be no file's.

What is wrong is an `OSError` with a reason in words, as of any file that cannot be read: readers have one way to tell
of it. Nothing here raises anything else.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def user_path(path: Path | str) -> Path:
    """`Path.expanduser`, but for ``~name`` of no user of this machine, which stays: files may be called so."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def real_path(path: Path | str) -> Path:
    """`user_path`, absolute and without symbolic links; odd names, and links that lead in a circle, stay."""
    try:
        return Path(os.path.realpath(user_path(path)))
    except ValueError:  # a NUL, or half a character
        return user_path(path)


def is_file(path: Path | str) -> bool:
    """`Path.is_file` that is False, and raises nothing, for names that are too long or otherwise no file's."""
    return os.path.isfile(path)  # noqa: PTH113


def require_file(path: Path | str) -> None:
    """Raises OSError where no regular file is to be read, before anything waits for it or reads on without end."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - thousands of files
    except ValueError:  # a NUL, or half a character
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_one, name in _KINDS:
        if is_one(mode):
            raise OSError(errno.EINVAL, f"it is {name}, no file", str(path))


def read_bytes(path: Path) -> bytes:
    """`Path.read_bytes` of a regular file. Raises OSError alone."""
    require_file(path)
    return Path(path).read_bytes()


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """`Path.read_text` of a regular file. Raises OSError, or UnicodeDecodeError (a ValueError) for what is no text."""
    return read_bytes(path).decode(encoding)
