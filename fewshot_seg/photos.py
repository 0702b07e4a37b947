"""People's own files: photos in any orientation and colour mode, and masks drawn with any tool."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from episodes.sources.decoding import rgb
from episodes.sources.marks import point_radius
from episodes.sources.object_masks import object_mask
from episodes.types import IGNORE, DataError, SupportKind, UInt8Array

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})


def _open(path: Path, what: str) -> Image.Image:
    """The decoded picture, upright. Raises DataError naming the file."""
    if not os.path.isfile(path):  # noqa: PTH113 - as in read_support
        raise DataError(f"{path}: no such file; expected a {what}")
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow's decoders each raise their own on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: {what} cannot be decoded ({reason}); save it again as JPEG or PNG") from error


def read_photo(path: Path) -> UInt8Array:
    """A photo as people see it: uint8 (H, W, 3), EXIF orientation applied, transparency on white.

    Grey, palette, CMYK and 16-bit pictures are converted.

    Raises:
        DataError: missing or undecodable file.
    """
    return rgb(_open(path, "photo"))


def read_object_mask(path: Path) -> UInt8Array:
    """A mask that marks one object: uint8 (H, W) of 0, 1 and 255 (ignore).

    Which pixels are the object: see `episodes.sources.object_masks.object_mask`.

    Raises:
        DataError: missing, undecodable or coloured file.
    """
    return object_mask(_open(path, "mask"), path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """A photo and how its object is marked.

    Attributes:
        photo: uint8 (H, W, 3).
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
    alone = Path(text).expanduser()
    if os.path.isfile(alone):  # noqa: PTH113 - Path.is_file raises for names that are too long to be any
        photo = read_photo(alone)
        return Support(photo=photo, marks=np.full(photo.shape[:2], IGNORE, np.uint8), kind="label")
    found = _MARKS.fullmatch(text)
    if found is None:
        photo_path, mask_path = _split_pair(text)
        photo = read_photo(photo_path)
        return Support(photo=photo, marks=_object_mask_of(photo, photo_path, mask_path), kind="mask")
    photo_path = Path(found["photo"]).expanduser()
    photo, kind, value = read_photo(photo_path), found["kind"], found["value"]
    if kind == "scribble":
        strokes = _object_mask_of(photo, photo_path, Path(value).expanduser())
        return Support(photo=photo, marks=np.where(strokes == 1, 1, IGNORE).astype(np.uint8), kind="scribble")
    shapes = [_numbers(text, one, 4 if kind == "box" else 2, photo) for one in value.split("+")]
    if kind == "box":
        marks = np.zeros(photo.shape[:2], np.uint8)
        for left, top, right, bottom in shapes:
            if right <= left or bottom <= top:
                raise DataError(f"--support {text!r}: box must be X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1")
            marks[top:bottom, left:right] = IGNORE
        return Support(photo=photo, marks=marks, kind="box")
    marks = np.full(photo.shape[:2], IGNORE, np.uint8)
    radius = point_radius(marks.shape)
    height, width = photo.shape[:2]
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    for x, y in shapes:
        marks[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = 1
    return Support(photo=photo, marks=marks, kind="point")


_MARKS = re.compile(r"(?P<photo>.+):(?P<kind>box|point|scribble)=(?P<value>.+)", re.DOTALL)


def _numbers(text: str, value: str, count: int, photo: UInt8Array) -> list[int]:
    try:
        numbers = [round(float(one)) for one in value.split(",")]
    except (ValueError, OverflowError):
        numbers = []
    if len(numbers) != count:
        expected = "box=X0,Y0,X1,Y1" if count == 4 else "point=X,Y"
        raise DataError(f"--support {text!r}: expected {expected} in pixels, got {value!r}")
    height, width = photo.shape[:2]
    room = 0 if count == 4 else -1  # a box may end at the border, a point must be on a pixel
    if not all(0 <= x <= width + room for x in numbers[::2]) or not all(0 <= y <= height + room for y in numbers[1::2]):
        raise DataError(
            f"--support {text!r}: {value} lies outside the photo, which is {width}x{height} pixels (upright)"
        )
    return numbers


def _object_mask_of(photo: UInt8Array, photo_path: Path, mask_path: Path) -> UInt8Array:
    mask = read_object_mask(mask_path)
    if photo.shape[:2] != mask.shape:
        raise DataError(
            f"{mask_path}: mask is {mask.shape[1]}x{mask.shape[0]}, photo {photo_path.name} is "
            f"{photo.shape[1]}x{photo.shape[0]} pixels (upright); draw the mask at the photo's size"
        )
    if not (mask == 1).any():
        raise DataError(f"{mask_path}: mask shows no object; mark the object with a value other than 0 (black)")
    return mask


def _split_pair(pair: str) -> tuple[Path, Path]:
    places = [place for place, letter in enumerate(pair) if letter == ":"]
    candidates = [(Path(pair[:place]).expanduser(), Path(pair[place + 1 :]).expanduser()) for place in places]
    for photo, mask in candidates:  # file names may hold colons themselves, as Windows drives do
        if os.path.isfile(photo) and os.path.isfile(mask):  # noqa: PTH113 - as in read_support
            return photo, mask
    if not candidates or not pair[places[-1] + 1 :] or not pair[: places[-1]]:
        raise DataError(
            f"--support {pair!r}: no such photo; expected PHOTO:MASK, for example dog.jpg:dog_mask.png, or "
            "PHOTO:box=X0,Y0,X1,Y1, PHOTO:point=X,Y, PHOTO:scribble=FILE, or a PHOTO alone"
        )
    return candidates[-1]


def find_queries(queries: Sequence[str]) -> list[Path]:
    """Photos of files, folders (not their subfolders) and globs, each once, in order.

    Raises:
        DataError: a name that stands for nothing, or no photo at all.
    """
    found: dict[Path, None] = {}
    for query in queries:
        path = Path(query).expanduser()
        if os.path.isdir(path):  # noqa: PTH112 - as in read_support
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in PHOTO_SUFFIXES and f.is_file())
            if not files:
                raise DataError(f"--query {query}: folder holds no photos ({', '.join(sorted(PHOTO_SUFFIXES))})")
        elif os.path.exists(path):  # noqa: PTH110 - as in read_support
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207 - Path.glob refuses absolute patterns
            if not files:
                raise DataError(f"--query {query}: no such file, folder or match; check the path")
        found.update(dict.fromkeys(files))
    return list(found)


def output_names(paths: Sequence[Path]) -> list[str]:
    """A file name without suffix for every path: its stem, made unique also for file systems that ignore case.

    >>> output_names([Path("a.jpg"), Path("b.jpg"), Path("b.png"), Path("x/b.png")])
    ['a', 'b_jpg', 'b_png', 'b_png-2']
    """
    counts = Counter(path.stem.lower() for path in paths)
    taken: set[str] = {stem for stem, count in counts.items() if count == 1}
    names = []
    for path in paths:
        if counts[path.stem.lower()] == 1:
            names.append(path.stem)
            continue
        base = f"{path.stem}_{path.suffix.lstrip('.').lower()}"
        name, number = base, 1
        while name.lower() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names
