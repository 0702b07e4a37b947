"""Files that are there whole or not at all: written beside and renamed, cleared up after runs that were killed.

A temporary file is locked (flock) by whoever writes it. The lock ends with its owner, however that ends: a temporary
file without a lock is one that a killed run left, and the next run that writes into the folder removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from episodes.types import DataError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing is cleared
    fcntl = None  # type: ignore[assignment]

_LEFT = re.compile(r"\..*-[a-z0-9_]{8}\.writing(\.[^.]*)?")
_MENDS = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EFBIG: "files of this size are not allowed there (see ulimit -f); choose another place",
    errno.EIO: "the disk may be failing; choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "it was there before: something else removed it; put it back, or choose another place",
    errno.ESTALE: "it was there before: something else removed it; put it back, or choose another place",
}

_cleared: set[tuple[int, str]] = set()
"""(process, folder) where this process has looked for what killed runs left: once is enough."""


def reason_of(error: OSError) -> str:
    """What went wrong and how to mend it: ``No space left on device; make room there, or choose another place``."""
    mend = _MENDS.get(error.errno or 0, "choose a folder you may write to")
    return f"{error.strerror or error}; {mend}"


def write_error(path: Path, error: OSError) -> DataError:
    """The error of a file that could not be written."""
    return DataError(f"cannot write {path}: {reason_of(error)}")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds, removed when it fails.

    A process that is killed leaves a hidden file ``.NAME-xxxxxxxx.writing.SUFFIX``, which the next one that writes into
    the folder removes.

    Raises:
        DataError: the folder cannot be written, `path` is itself a folder, or the system refuses while the block
            writes (no space left, a failing disk, a folder that vanished).
    """
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder; give the path of a file, in that folder or elsewhere")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path.parent)
        handle, temporary = _locked_beside(path)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            raise write_error(path, error) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone or read-only by now
            temporary.unlink(missing_ok=True)
        os.close(handle)


def _locked_beside(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open and locked."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=f".writing{path.suffix}")
        if lock_file(handle) is not False and is_open_at(handle, Path(name)):
            return handle, Path(name)
        os.close(handle)  # another process took it for one that was left, in the moment before it was locked


def lock_file(handle: int) -> bool | None:
    """Lock an open file for this process alone: True; False where another has it, None where there are no locks.

    The lock ends when the file is closed or the process ends, killed or not.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def is_open_at(handle: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    """Remove temporary files whose writers are gone; once per process and folder."""
    key = (os.getpid(), str(folder.absolute()))
    if key in _cleared:
        return
    _cleared.add(key)
    with os.scandir(folder) as entries:
        left = [Path(entry.path) for entry in entries if _LEFT.fullmatch(entry.name)]
    for path in left:
        with contextlib.suppress(OSError):  # another process is clearing, too, or it is not ours to remove
            handle = os.open(path, os.O_RDONLY)
            try:
                if lock_file(handle) and is_open_at(handle, path):
                    path.unlink()
            finally:
                os.close(handle)
