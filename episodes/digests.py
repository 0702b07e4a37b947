"""Digests of files' contents, each file read once: what was read is remembered until the file changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from episodes.files import user_path

_FEW_BYTES = 64 * 2**20
"""Files of so many bytes in all are read every time: that takes no longer than remembering."""
_READERS = 8
_PLACES = 500
"""Paths in one question to the memory; SQLite takes at least 999."""
_TABLE = "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, state TEXT NOT NULL, digest TEXT NOT NULL)"


def default_cache() -> Path:
    """``$FEWSHOT_SEG_CACHE``, else ``~/.cache/fewshot-seg``."""
    return user_path(os.environ.get("FEWSHOT_SEG_CACHE") or "~/.cache/fewshot-seg")


def content_digests(files: Mapping[str, os.stat_result], *, memory: Path | None = None) -> dict[str, str]:
    """SHA-256 of every file.

    As git's index does, it takes a file whose size, times and inode are as before for unchanged, and does not read it.
    The memory is only a help: where it cannot be written or read, all files are read.

    Args:
        files: path and `os.stat` of it.
        memory: file of remembered digests (SQLite); by default `digests.sqlite` in `default_cache`.

    Returns:
        path -> hex digest.

    Raises:
        OSError: a file that cannot be read.
    """
    if sum(entry.st_size for entry in files.values()) <= _FEW_BYTES:
        return _read(list(files))
    states = {os.path.abspath(path): _state(entry) for path, entry in files.items()}  # noqa: PTH100  thousands
    with _opened(memory or default_cache() / "digests.sqlite") as kept:
        known = _remembered(kept, states)
        fresh = _read([path for path in states if path not in known])
        _remember(kept, {path: (states[path], digest) for path, digest in fresh.items()})
    found = known | fresh
    return {path: found[os.path.abspath(path)] for path in files}  # noqa: PTH100


def _state(entry: os.stat_result) -> str:
    return f"{entry.st_size} {entry.st_mtime_ns} {entry.st_ctime_ns} {entry.st_ino}"


def _read(paths: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_READERS) as pool:  # reading and hashing leave Python's lock
        return dict(zip(paths, pool.map(_digest, paths), strict=True))


def _digest(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123  thousands of files
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(memory: Path) -> Iterator[sqlite3.Connection | None]:
    """The memory, or None where there can be none."""
    kept = None
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        kept = sqlite3.connect(memory, timeout=5)
        with kept:
            kept.execute(_TABLE)
    except (OSError, sqlite3.Error):
        _close(kept)
        kept = None
    try:
        yield kept
    finally:
        _close(kept)


def _close(kept: sqlite3.Connection | None) -> None:
    if kept is not None:
        with contextlib.suppress(sqlite3.Error):
            kept.close()


def _remembered(kept: sqlite3.Connection | None, states: Mapping[str, str]) -> dict[str, str]:
    known: dict[str, str] = {}
    paths = list(states)
    for start in range(0, len(paths) if kept else 0, _PLACES):
        some = paths[start : start + _PLACES]
        question = f"SELECT path, state, digest FROM digests WHERE path IN ({','.join('?' * len(some))})"
        with contextlib.suppress(sqlite3.Error):
            assert kept is not None
            rows = kept.execute(question, some).fetchall()
            known |= {path: digest for path, state, digest in rows if state == states[path]}
    return known


def _remember(kept: sqlite3.Connection | None, fresh: Mapping[str, tuple[str, str]]) -> None:
    if kept is None or not fresh:
        return
    rows = [(path, state, digest) for path, (state, digest) in fresh.items()]
    with contextlib.suppress(sqlite3.Error), kept:
        kept.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)
