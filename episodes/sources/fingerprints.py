"""Digests of data sets by the names and contents of their files: the same wherever the data set lies."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from episodes.digests import content_digests
from episodes.sources.decoding import missing_file
from episodes.sources.errors import SourceError


def fingerprint_files(groups: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Hex digest that changes when the content of one of the files changes, and with nothing else.

    Args:
        groups: for every file a key that does not depend on where the data set lies, and the places where the
            file may be, as strings; the first that exists counts.

    Returns:
        SHA-256 of (key, SHA-256 of the content) of all files, in order. Files that have not
        changed since they were read last are not read again; see `digests.content_digests`.

    Raises:
        SourceError: a file that is at none of its places, or cannot be read.
    """
    named: list[tuple[str, str]] = []
    entries: dict[str, os.stat_result] = {}
    for key, places in groups:
        first = None
        for place in places:
            first = place if first is None else first
            try:
                entries[place] = os.stat(place)  # noqa: PTH116  thousands of files: a Path each would double the time
            except (OSError, ValueError):  # not there, or a name that no file can have
                continue
            named.append((key, place))
            break
        else:
            raise missing_file(Path(str(first))) from None
    for place, entry in entries.items():
        if not stat.S_ISREG(entry.st_mode):
            raise SourceError(Path(place), "undecodable", "is not a regular file", "put the file there")
    try:
        contents = content_digests(entries)
    except OSError as error:
        said = f"cannot be read ({error.strerror})"
        raise SourceError(
            Path(str(error.filename)), "undecodable", said, "mend its permissions or copy it anew"
        ) from error
    digest = hashlib.sha256()
    for key, place in named:
        digest.update(f"{key}\0{contents[place]}\n".encode())
    return digest.hexdigest()
