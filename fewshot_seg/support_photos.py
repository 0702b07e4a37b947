"""Supports as they are given on the command line: photos with masks, boxes, points, scribbles, or nothing, by class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from episodes.files import is_file, user_path
from episodes.sources.marks import point_radius
from episodes.types import IGNORE, DataError, SupportKind, UInt8Array
from fewshot_seg.photos import Photo, open_photo, read_object_mask

_MASK_COLOURS = 3
"""Black, an object, and perhaps its border; photos have more."""
_ENOUGH_PIXELS = 10_000
"""Most photos show more colours than a mask in their first pixels: the others are looked at whole."""
UNNAMED = "object"
"""Class of supports without a name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """A photo and how its object is marked.

    Attributes:
        photo: uint8 (H, W, 3), a reduced copy where the file has more pixels than `photos.WORKING_PIXELS`.
        marks: uint8 (H, W), 1 = object, 0 = background, 255 = ignored or, unless it is a mask, not known.
        kind: by what it is marked.
    """

    photo: UInt8Array
    marks: UInt8Array
    kind: SupportKind


def read_support(text: str) -> Support:
    """A support as it is given on the command line.

    - ``PHOTO:MASK``: a mask file (`read_object_mask`).
    - ``PHOTO:box=X0,Y0,X1,Y1``: the object is inside, with nothing of it outside; several boxes are joined by ``+``.
    - ``PHOTO:point=X,Y``: a point on the object; several are joined by ``+``.
    - ``PHOTO:scribble=FILE``: a mask file whose object is strokes on the object.
    - ``PHOTO``: the photo shows the object somewhere.

    Coordinates are pixels of the upright photo, from its top left corner.

    Raises:
        DataError: none of these, a missing or broken file, two sizes, marks without the object or outside the photo.
    """
    alone = user_path(text)
    if is_file(alone):
        photo = open_photo(alone)
        _refuse_mask(text, photo.pixels)
        return _support(photo, np.full(photo.shape, IGNORE, np.uint8), "label")
    found = _MARKS.fullmatch(text)
    if found is None:
        photo_path, mask_path = _split_pair(text)
        photo = open_photo(photo_path)
        return _support(photo, _object_mask_of(photo, photo_path, mask_path), "mask")
    photo_path = user_path(found["photo"])
    photo, kind, value = open_photo(photo_path), found["kind"], found["value"]
    if kind == "scribble":
        strokes = _object_mask_of(photo, photo_path, user_path(value))
        return _support(photo, np.where(strokes == 1, 1, IGNORE).astype(np.uint8), "scribble")
    shapes = [_numbers(text, one, 4 if kind == "box" else 2, photo) for one in value.split("+")]
    if kind == "box":
        return _support(photo, _boxes(text, shapes, photo.shape), "box")
    return _support(photo, point_marks(shapes, photo.shape), "point")


def _refuse_mask(text: str, pixels: UInt8Array) -> None:
    """A space instead of the colon of PHOTO:MASK would make the mask an example of its own."""
    colours = _colours(pixels.reshape(-1, 3)[:_ENOUGH_PIXELS])
    if len(colours) <= _MASK_COLOURS:
        colours = _colours(pixels.reshape(-1, 3))
    if 1 < len(colours) <= _MASK_COLOURS and (0, 0, 0) in colours:
        raise DataError(
            f"--support {text!r:.200}: is black with {len(colours) - 1} other colours, so it is a mask and no photo; "
            "write PHOTO:MASK with a colon, for example dog.jpg:dog_mask.png"
        )


def _colours(pixels: UInt8Array) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}


def _support(photo: Photo, marks: UInt8Array, kind: SupportKind) -> Support:
    """With marks of the photo's own size, brought to that of the copy; strokes and points of a pixel stay."""
    if photo.reduced:
        size = (photo.pixels.shape[1], photo.pixels.shape[0])
        smaller = np.asarray(cv2.resize(marks, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
        if kind != "mask":
            shown = (marks == 1).astype(np.float32)
            smaller[cv2.resize(shown, size, interpolation=cv2.INTER_AREA) > 0] = 1
        marks = smaller
    return Support(photo=photo.pixels, marks=marks, kind=kind)


def _boxes(text: str, boxes: Sequence[Sequence[int]], shape: tuple[int, int]) -> UInt8Array:
    marks = np.zeros(shape, np.uint8)
    for left, top, right, bottom in boxes:
        if right <= left or bottom <= top:
            raise DataError(f"--support {text!r:.200}: box must be X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1")
        marks[top:bottom, left:right] = IGNORE
    return marks


def point_marks(points: Sequence[Sequence[float]], shape: tuple[int, int]) -> UInt8Array:
    """1 in a disc around each point (x, y) in pixels, 255 elsewhere: uint8 (H, W)."""
    marks, radius = np.full(shape, IGNORE, np.uint8), point_radius(shape)
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    for x, y in points:
        marks[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = 1
    return marks


_MARKS = re.compile(r"(?P<photo>.+):(?P<kind>box|point|scribble)=(?P<value>.+)", re.DOTALL)


def _numbers(text: str, value: str, count: int, photo: Photo) -> list[int]:
    try:
        numbers = [round(float(one)) for one in value.split(",")]
    except (ValueError, OverflowError):
        numbers = []
    if len(numbers) != count:
        expected = "box=X0,Y0,X1,Y1" if count == 4 else "point=X,Y"
        raise DataError(f"--support {text!r:.200}: expected {expected} in pixels, got {value!r:.100}")
    height, width = photo.shape
    room = 0 if count == 4 else -1  # a box may end at the border, a point must be on a pixel
    if not all(0 <= x <= width + room for x in numbers[::2]) or not all(0 <= y <= height + room for y in numbers[1::2]):
        raise DataError(
            f"--support {text!r:.200}: {value:.100} lies outside the photo, which is {width}x{height} pixels (upright)"
        )
    return numbers


def _object_mask_of(photo: Photo, photo_path: Path, mask_path: Path) -> UInt8Array:
    mask = read_object_mask(mask_path)
    if photo.shape != mask.shape:
        raise DataError(
            f"{mask_path}: mask is {mask.shape[1]}x{mask.shape[0]}, photo {photo_path.name} is "
            f"{photo.shape[1]}x{photo.shape[0]} pixels (upright); draw the mask at the photo's size"
        )
    if not (mask == 1).any():
        raise DataError(f"{mask_path}: mask shows no object; mark the object with a value other than 0 (black)")
    return mask


def _split_pair(pair: str) -> tuple[Path, Path]:
    places = [place for place, letter in enumerate(pair) if letter == ":"]
    candidates = [(user_path(pair[:place]), user_path(pair[place + 1 :])) for place in places]
    for photo, mask in candidates:  # file names may hold colons themselves, as Windows drives do
        if is_file(photo) and is_file(mask):
            return photo, mask
    misspelt = re.fullmatch(r".+:(?P<kind>[a-z]{2,12})=[0-9 .,+-]+", pair)
    if misspelt is not None:
        raise DataError(f"--support {pair!r:.200}: no mark {misspelt['kind']!r}; there are box, point and scribble")
    if not candidates or not pair[places[-1] + 1 :] or not pair[: places[-1]]:
        raise DataError(
            f"--support {pair!r:.200}: no such photo; expected PHOTO:MASK, for example dog.jpg:dog_mask.png, or "
            "PHOTO:box=X0,Y0,X1,Y1, PHOTO:point=X,Y, PHOTO:scribble=FILE, or a PHOTO alone, each with or without NAME= "
            "of its class before it"
        )
    return candidates[-1]


_NAME = re.compile(r"(?P<name>[^=:/\\]+)=(?P<rest>.+)", re.DOTALL)


def split_name(text: str) -> tuple[str, str]:
    """``NAME=REST`` as (NAME, REST); `UNNAMED` and the text where there is no name.

    A text that begins with an existing file, up to its end or to a colon, has no name: file names may hold ``=``.

    >>> split_name("cat=a.jpg:a.png"), split_name("a.jpg:box=1,2,3,4"), split_name("cat=a.jpg:box=1,2,3,4")
    (('cat', 'a.jpg:a.png'), ('object', 'a.jpg:box=1,2,3,4'), ('cat', 'a.jpg:box=1,2,3,4'))
    """
    found = _NAME.fullmatch(text)
    ends = [place for place, letter in enumerate(text) if letter == ":"] + [len(text)]
    if found is None or not found["name"].strip() or any(is_file(text[:end]) for end in ends):
        return UNNAMED, text
    return found["name"].strip(), found["rest"]


def read_supports(texts: Sequence[str]) -> dict[str, list[Support]]:
    """Supports by class, classes in the order in which they first appear; each text is ``[NAME=]`` as `read_support`.

    Raises:
        DataError: as `read_support`.
    """
    classes: dict[str, list[Support]] = {}
    for text in texts:
        name, rest = split_name(text)
        classes.setdefault(name, []).append(read_support(rest))
    return classes
