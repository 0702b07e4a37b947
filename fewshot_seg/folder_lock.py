"""One run at a time in a folder: a lock that dies with its owner, so that nothing is left to clean up by hand."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from episodes.types import DataError
from episodes.writing import is_open_at, lock_file, write_error

LOCK_NAME = ".fewshot-seg.lock"

_held: set[int] = set()
"""Open lock files of this process."""


@contextlib.contextmanager
def folder_of_one_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made when missing and removed again if the block leaves it empty.

    The lock is the system's (flock) on ``.fewshot-seg.lock`` in the folder, not the file itself: a file that a killed
    run left locks nobody out. Where the system has no such locks (Windows, some network file systems), nothing is kept
    out. Something else than a folder is left to the block to complain about.

    Raises:
        DataError: another run has the folder, which the message names with that process, or it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        yield
        return
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(folder)
    except OSError as error:
        _remove_empty(missing)
        raise write_error(folder, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is still locked: nobody else can have taken it
            (folder / LOCK_NAME).unlink()
        _held.discard(handle)
        os.close(handle)
        _remove_empty(missing)


def _take(folder: Path) -> int:
    path = folder / LOCK_NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if lock_file(handle) is False:
                raise DataError(
                    f"{folder} is in use by another run{_owner(handle)}; wait until it has ended, or choose another "
                    "folder"
                )
            if is_open_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                _held.add(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner removed it in the moment before it was locked here


def _owner(handle: int) -> str:
    noted = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
    return f" (process {noted})" if noted.isdecimal() else ""


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty
        for folder in folders:
            folder.rmdir()


def _close_in_child() -> None:
    """Processes that load photos inherit open files, and may outlive a killed run for a moment: not with its lock."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
