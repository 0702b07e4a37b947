"""JSON of annotation tools, read without trust: whatever its shape, what is wrong becomes a `SourceError`."""

from __future__ import annotations

import json
import os
import reprlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from episodes.files import read_bytes
from episodes.sources.decoding import reason_of
from episodes.sources.errors import SourceError

_EXPORT_AGAIN = "correct it or export the annotations again"
_MOST_OUTLINE = 5e6  # pixels along the polygons of one object; around a large photo it is 5e4
_MOST_MASK_BYTES = 2**31
_MAX_PIXELS = 179_000_000  # as Pillow's limit for photos: a mask is made of what the JSON claims


def bad_annotation(file: Path, message: str, mend: str = _EXPORT_AGAIN) -> SourceError:
    """The error of annotations that do not mean anything."""
    return SourceError(file, "bad-annotation", message, mend)


def read_json_object(
    path: Path, object_hook: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The object that a JSON file holds (UTF-8, UTF-16 or UTF-32).

    Args:
        path: the file.
        object_hook: what replaces each object as soon as it is read, as in `json.loads`.

    Raises:
        SourceError: missing file, broken JSON, or anything else than an object.
    """
    try:
        value = json.loads(read_bytes(path), object_hook=object_hook)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(path, "missing", "no such file", "put the annotations there") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_of(error)
        raise bad_annotation(path, f"not readable as JSON ({reason})", "export the annotations again") from None
    if not isinstance(value, dict):
        raise bad_annotation(path, f"expected a JSON object at the top, found {kind_of(value)}")
    return value


def kind_of(value: object) -> str:
    """What a JSON value is, in words.

    >>> kind_of([1]), kind_of(None)
    ('a list', 'null')
    """
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100


def shown(value: object, most: int) -> str:
    """The first characters of a JSON value, for an error: however deep or large it is, only its beginning is looked at.

    >>> shown(["a", [1, 2]], 60), shown("x" * 1000, 8)
    ("['a', [1, 2]]", "'xxxxxxx")
    """
    return _Short().repr(value)[:most]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number (``true`` is none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def stated_size(width: object, height: object, file: Path, where: str) -> tuple[int, int]:
    """(height, width) as positive numbers of a sensible size. `where` names the place in the file.

    Raises:
        SourceError: anything else.
    """
    sides = [int(side) if isinstance(side, float) and side.is_integer() else side for side in (height, width)]
    if not all(is_whole(side) and side > 0 for side in sides):
        raise bad_annotation(
            file, f"{where}: expected width and height in pixels, found {shown(width, 40)}, {shown(height, 40)}"
        )
    rows, columns = (side for side in sides if is_whole(side))
    if rows * columns > _MAX_PIXELS:
        claimed = f"{shown(columns, 20)}x{shown(rows, 20)}"
        raise bad_annotation(file, f"{where}: {claimed} pixels are more than a photo has")
    return rows, columns


def coordinates(values: object, size: tuple[int, int], file: Path, where: str) -> npt.NDArray[np.float64]:
    """Numbers of a JSON list (nested as it is) or an array, float64, finite and near a photo of `size` (height, width).

    The limit of four times the longer side is far from what tools write; the rasterisers need some limit.

    Raises:
        SourceError: anything else.
    """
    numbers = None
    if isinstance(values, list | array):
        try:
            numbers = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            numbers = None
    if numbers is None or not np.isfinite(numbers).all():
        found = values.tolist() if isinstance(values, array) else values
        raise bad_annotation(file, f"{where}: expected numbers, found {shown(found, 60)}")
    if numbers.size and np.abs(numbers).max() > 4 * max(size):
        raise bad_annotation(
            file,
            f"{where}: coordinate {np.abs(numbers).max():g} is far outside the photo of {size[1]}x{size[0]} pixels",
        )
    return numbers


def check_outline(polygons: Sequence[npt.NDArray[np.float64]], file: Path, where: str) -> None:
    """Raises SourceError for polygons, float64 (N, 2) each, that are too long together.

    pycocotools keeps five places for every pixel of an outline, and does not notice when there is no memory for them.
    """
    around = sum(float(np.abs(polygon - np.roll(polygon, 1, axis=0)).max(axis=1).sum()) for polygon in polygons)
    if around > _MOST_OUTLINE:
        raise bad_annotation(file, f"{where}: outline of {around:.3g} pixels, expected at most {_MOST_OUTLINE:.3g}")


def check_room(classes: int, size: tuple[int, int], file: Path) -> None:
    """Raises SourceError where the masks of so many classes at `size` (height, width) are more than memory should hold.

    The size is what the annotations claim; the photo itself has not been looked at.
    """
    if classes * size[0] * size[1] > _MOST_MASK_BYTES:
        raise bad_annotation(
            file,
            f"says that a photo of {size[1]}x{size[0]} pixels shows {classes} classes, whose masks would take more "
            f"than {_MOST_MASK_BYTES / 1e9:.1f} GB",
            "correct the size, or divide the photo",
        )


def inner_name(name: object, file: Path, where: str) -> str:
    """A photo's name relative to its folder, with ``/`` between its parts.

    Raises:
        SourceError: no text, or a name that leads out of the folder (absolute, with a drive, or with ``..``).
    """
    if not isinstance(name, str) or not name.strip():
        raise bad_annotation(file, f"{where}: expected the name of a photo's file, found {shown(name, 60)}")
    parts = PurePosixPath(name.replace("\\", "/"))
    unsafe = parts.is_absolute() or ".." in parts.parts or not parts.name or bool(PureWindowsPath(name).drive)
    if unsafe or not _can_be_a_file_name(name):
        raise SourceError(
            file,
            "unsafe-name",
            f"{where}: {shown(name, 100)} leads out of the folder of the photos",
            "name the photo relative to that folder, without '..'",
        )
    return str(parts)


def _can_be_a_file_name(name: str) -> bool:
    try:
        return "\0" not in name and bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False
