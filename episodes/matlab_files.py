"""MATLAB files, whose compressed parts are weighed before SciPy unpacks them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

from episodes.files import read_bytes

_HEAD, _COMPRESSED = 128, 15  # bytes before the first part of a version 5 file; what its tag calls a compressed part


def read_matlab(path: Path, *, most_bytes: int, **options: Any) -> dict[str, Any]:
    """Variables by name, as `scipy.io.loadmat` gives them; arguments of it are passed on.

    Args:
        path: a file of version 4, 6 or 7.
        most_bytes: what it may hold, unpacked.
        options: of `loadmat`.

    Raises:
        Exception: whatever SciPy raises on damaged files; an `OSError` for what is no file; a `ValueError` for one that
            unpacks to more than `most_bytes`.
    """
    from scipy.io import loadmat  # slow to import, and for some data sets alone

    content = read_bytes(path)
    if unpacked_bytes(content, most_bytes) > most_bytes:
        raise ValueError(f"unpacks to more than {most_bytes / 1e6:g} MB")
    found: dict[str, Any] = loadmat(io.BytesIO(content), **options)
    return found


def unpacked_bytes(content: bytes, most: int) -> int:
    """Bytes of a file of version 5 once its parts are unpacked; counting ends soon after `most`.

    Parts that are cut off or damaged count as far as they go: SciPy complains of them.
    """
    total, place = len(content), _HEAD
    order = ">" if content[126:128] == b"MI" else "<"
    while place + 8 <= len(content) and total <= most:
        kind, size = struct.unpack(f"{order}II", content[place : place + 8])
        if kind == _COMPRESSED:
            total += _inflated(content[place + 8 : place + 8 + size], most)
        place += 8 + size
    return total


def _inflated(part: bytes, most: int) -> int:
    stream, total = zlib.decompressobj(), 0
    try:
        while part and total <= most:
            total += len(stream.decompress(part, 1 << 20))
            part = stream.unconsumed_tail
    except zlib.error:
        pass
    return total
