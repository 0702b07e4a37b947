"""MATLAB files of version 5 (as versions 6 and 7 of MATLAB write them), read without trust.

`scipy.io.loadmat` follows the lengths in a file without looking whether they fit: one changed byte ends the process with
a segmentation fault, which no caller can catch (scripts/fuzz_readers.py). What data sets use of the format is little:
numbers, texts, cells and structs. See "MAT-File Format", The MathWorks; the tests compare with SciPy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from episodes.files import read_bytes

_HEAD = 128
_MATRIX, _COMPRESSED = 14, 15
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _CHAR = 1, 2, 4
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800
_DEEPEST = 32


def read_matlab(path: Path, *, most_bytes: int) -> dict[str, Any]:
    """Variables by name.

    Numbers are arrays of the variable's shape and type; texts are str, of several rows a list of str; cells are lists,
    in MATLAB's order; structs are dicts of lists, a value per element; None is what else there may be.

    Args:
        path: the file.
        most_bytes: what it may hold, unpacked.

    Raises:
        OSError: no regular file, or one that cannot be read.
        ValueError: not of this format, damaged, complex numbers, or more than `most_bytes`.
    """
    content = read_bytes(path)
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if len(content) < _HEAD or order is None or int(_numbers(content[124:126], 4, order)[0]) != 0x0100:
        raise ValueError("not of version 5 of the format")
    found: dict[str, Any] = {}
    room = most_bytes - len(content)
    for kind, data in _elements(memoryview(content)[_HEAD:], order):
        parts = [(kind, data)]
        if kind == _COMPRESSED:
            unpacked = _unpacked(data, room)
            room -= len(unpacked)
            parts = list(_elements(memoryview(unpacked), order))
        for inner, matrix in parts:
            if inner == _MATRIX:
                name, value = _matrix(matrix, order, 0)
                found[name] = value
    return found


def _unpacked(part: memoryview, room: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        unpacked = stream.decompress(part, max(room, 1))
    except zlib.error as error:
        raise ValueError(f"a compressed part is damaged: {error}") from None
    if stream.unconsumed_tail:
        raise ValueError("it unpacks to more than such a file holds")
    if not stream.eof:
        raise ValueError("a compressed part is cut off")
    return unpacked


def _elements(view: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, content) one after another; small ones are packed into their own tags."""
    place = 0
    while place + 8 <= len(view):
        first, second = (int(one) for one in _numbers(view[place : place + 8], 6, order))
        if first >> 16:
            kind, size, start, following = first & 0xFFFF, first >> 16, place + 4, place + 8
            fits = size <= 4
        else:
            kind, size, start = first, second, place + 8
            following = start + size if kind == _COMPRESSED else start + -(-size // 8) * 8
            fits = start + size <= len(view)
        if not fits:
            raise ValueError("a part is longer than what it is in")
        yield kind, view[start : start + size]
        place = following


def _numbers(data: memoryview | bytes, kind: int, order: str) -> npt.NDArray[Any]:
    if kind not in _TYPES:
        raise ValueError(f"numbers of type {kind}")
    return np.frombuffer(data, np.dtype(_TYPES[kind]).newbyteorder(order))  # raises ValueError for a broken number


def _matrix(view: memoryview, order: str, depth: int) -> tuple[str, Any]:
    """Name and value of a variable, or of what is inside one."""
    if not len(view):
        return "", np.zeros((0, 0))
    if depth > _DEEPEST:
        raise ValueError("parts in parts in parts")
    parts = _elements(view, order)
    try:
        flags, shape, name = (_numbers(*_of_type(next(parts), kind), order) for kind in (6, 5, 1))
        class_and_flags, sides = int(flags[0]), [int(side) for side in shape]
        if len(sides) < 2 or min(sides) < 0:
            raise ValueError(f"a shape of {sides}")
        value = _value(class_and_flags, sides, parts, order, depth)
    except (StopIteration, IndexError):
        raise ValueError("a part is missing") from None
    return name.tobytes().decode("latin-1"), value


def _of_type(part: tuple[int, memoryview], kind: int) -> tuple[memoryview, int]:
    if part[0] != kind:
        raise ValueError(f"expected a part of type {kind}, found {part[0]}")
    return part[1], kind


def _value(
    class_and_flags: int, sides: list[int], parts: Iterator[tuple[int, memoryview]], order: str, depth: int
) -> Any:
    kind, count = class_and_flags & 0xFF, math.prod(sides)
    if kind == _CELL:
        return [_inner(parts, order, depth) for _ in range(count)]
    if kind == _STRUCT:
        return _struct(count, parts, order, depth)
    if kind == _CHAR:
        return _text(sides, *next(parts), order)
    if kind not in _CLASSES:
        return None
    if class_and_flags & _COMPLEX:
        raise ValueError("complex numbers")
    stored, data = next(parts)
    numbers = _numbers(data, stored, order)
    if numbers.size != count:
        raise ValueError(f"{numbers.size} numbers for a shape of {sides}")
    return numbers.reshape(sides, order="F").astype(_CLASSES[kind])


def _inner(parts: Iterator[tuple[int, memoryview]], order: str, depth: int) -> Any:
    return _matrix(_of_type(next(parts), _MATRIX)[0], order, depth + 1)[1]


def _struct(count: int, parts: Iterator[tuple[int, memoryview]], order: str, depth: int) -> dict[str, list[Any]]:
    length = int(_numbers(*_of_type(next(parts), 5), order)[0])
    names = bytes(_of_type(next(parts), 1)[0])
    if length < 1 or len(names) % length:
        raise ValueError(f"names of fields of length {length}")
    fields = [names[n : n + length].split(b"\0")[0].decode("latin-1") for n in range(0, len(names), length)]
    found: dict[str, list[Any]] = {field: [] for field in fields}
    for _ in range(count if fields else 0):
        for field in fields:
            found[field].append(_inner(parts, order, depth))
    return found


def _text(sides: list[int], kind: int, data: memoryview, order: str) -> str | list[str]:
    if kind not in _TEXTS:
        raise ValueError(f"text of type {kind}")
    encoding = _TEXTS[kind] + ({"<": "-le", ">": "-be"}[order] if _TEXTS[kind] in ("utf-16", "utf-32") else "")
    letters = bytes(data).decode(encoding)
    if len(letters) != math.prod(sides) or len(sides) != 2:
        raise ValueError(f"{len(letters)} letters for a shape of {sides}")
    rows = [letters[row :: sides[0]] for row in range(sides[0])]
    return "".join(rows) if len(rows) < 2 else rows
