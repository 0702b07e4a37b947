"""People's own picture files: photos in any orientation, colour mode and size, and masks drawn with any tool."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from episodes.files import is_file, user_path
from episodes.sources.decoding import open_picture, reason_of, rgb, upright_size
from episodes.sources.object_masks import object_mask
from episodes.types import DataError, UInt8Array

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})

MOST_PIXELS = 200_000_000
"""Of a picture; larger ones are refused, for a small file can claim to be any size."""
WORKING_PIXELS = 16_000_000
"""What is worked on has at most so many pixels; a larger photo is reduced."""
_WORKING_SIDE = 16_000

_large_pictures = threading.Lock()
"""Held while Pillow's own limit, which is one for the whole process, is lifted; and while a large picture is decoded,
so that only one is in memory at its own size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """A photo to work on.

    Attributes:
        pixels: uint8 (h, w, 3), upright; the photo itself, or a reduced copy of at most `WORKING_PIXELS`.
        shape: (H, W) of the photo itself, upright.
    """

    pixels: UInt8Array
    shape: tuple[int, int]

    @property
    def reduced(self) -> bool:
        """Whether `pixels` are fewer than the photo has."""
        return self.pixels.shape[:2] != self.shape

    @property
    def scale(self) -> float:
        """Side of the copy by side of the photo, at most 1."""
        return float(max(self.pixels.shape[:2]) / max(self.shape))


@contextmanager
def _decoded(
    path: Path, what: str, *, least: bool = False, most_pixels: int | None = None
) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """The picture, upright, and the (height, width) it has in truth; errors in the block name the file.

    With `least`, a JPEG that `_working_shape` makes much smaller anyway comes at half, a quarter or an eighth.
    """
    if not is_file(path):
        raise DataError(f"{path}: no such file; expected a {what}")
    try:
        with _large_pictures, _pillows_limit_lifted():
            picture = open_picture(path)
        with picture:
            shape = upright_size(picture)
            pixels = shape[0] * shape[1]
            most = MOST_PIXELS if most_pixels is None else most_pixels
            if pixels > most:
                raise DataError(
                    f"{path}: {what} has {shape[1]}x{shape[0]} pixels, and at most {most / 10**6:g} megapixels "
                    "are read; make it smaller or cut it into parts"
                )
            with _alone() if pixels > WORKING_PIXELS else nullcontext():
                working = _working_shape(shape)
                if least and working != shape:
                    factor = max(working) / max(shape)
                    picture.draft(None, (round(picture.width * factor), round(picture.height * factor)))
                picture.load()
                yield ImageOps.exif_transpose(picture), shape
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders each raise their own on damaged files
        raise DataError(
            f"{path}: {what} cannot be decoded ({reason_of(error)}); save it again as JPEG or PNG"
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    with _large_pictures, _pillows_limit_lifted():
        yield


@contextmanager
def _pillows_limit_lifted() -> Iterator[None]:
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _working_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the copy of a photo (H, W) that is worked on."""
    height, width = shape
    factor = min(1.0, (WORKING_PIXELS / (height * width)) ** 0.5, _WORKING_SIDE / max(shape))
    return max(1, round(height * factor)), max(1, round(width * factor))


def open_photo(path: Path, *, most_pixels: int | None = None) -> Photo:
    """A photo as people see it, reduced where it has more than `WORKING_PIXELS`, or a side of more than 16000.

    EXIF orientation is applied, transparency lies on white, of an animation it is the first picture. Grey, palette,
    CMYK, 16-bit and floating-point pictures are converted.

    Raises:
        DataError: missing or undecodable file, or one of more than `most_pixels`, which is `MOST_PIXELS` by default.
    """
    with _decoded(path, "photo", least=True, most_pixels=most_pixels) as (picture, shape):
        pixels, (height, width) = rgb(picture), _working_shape(shape)
        if pixels.shape[:2] != (height, width):
            pixels = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return Photo(pixels=pixels, shape=shape)


def read_photo(path: Path) -> UInt8Array:
    """As `open_photo`, at the photo's own size: uint8 (H, W, 3).

    Raises:
        DataError: as `open_photo`.
    """
    with _decoded(path, "photo") as (picture, _):
        return rgb(picture)


def read_object_mask(path: Path) -> UInt8Array:
    """A mask that marks one object: uint8 (H, W) of 0, 1 and 255 (ignore).

    Which pixels are the object: see `episodes.sources.object_masks.object_mask`.

    Raises:
        DataError: missing, undecodable or coloured file, or one of more than `MOST_PIXELS`.
    """
    with _decoded(path, "mask") as (picture, _):
        return object_mask(picture, path)


def find_queries(queries: Sequence[str]) -> list[Path]:
    """Photos of files, folders (not their subfolders) and globs, each once, in order.

    Raises:
        DataError: a name that stands for nothing, or no photo at all.
    """
    found: dict[Path, None] = {}
    for query in queries:
        path = user_path(query)
        if os.path.isdir(path):  # noqa: PTH112 - as in _decoded
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in PHOTO_SUFFIXES and is_file(f))
            if not files:
                raise DataError(f"--query {query}: folder holds no photos ({', '.join(sorted(PHOTO_SUFFIXES))})")
        elif os.path.exists(path):  # noqa: PTH110 - as in _decoded
            files = [path]
        else:
            files = sorted(_matches(path))
            if not files:
                raise DataError(f"--query {query}: no such file, folder or match; check the path")
        found.update(dict.fromkeys(files))
    return list(found)


def _matches(pattern: Path) -> Iterator[Path]:
    """Files of a glob; hidden ones where the pattern says so. ``**`` follows no links: they may lead in circles."""
    parts = pattern.parts[1:] if pattern.is_absolute() else pattern.parts
    wanted = "/".join((*parts, "*") if parts and parts[-1] == "**" else parts)
    folder = Path(pattern.anchor)
    with suppress(ValueError, NotImplementedError, OSError):  # no pattern at all, or a folder that cannot be read
        for path in folder.glob(wanted):
            shown = all(part in parts for part in path.relative_to(folder).parts if part.startswith("."))
            if shown and is_file(path):
                yield path


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
