"""LabelMe's JSON: one file per photo with the shapes drawn on it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from episodes.sources.annotation_files import (
    bad_annotation,
    coordinates,
    inner_name,
    kind_of,
    read_json_object,
    shown,
    stated_size,
)
from episodes.sources.decoding import missing_file, open_picture, reason_of, rgb
from episodes.sources.errors import SourceError
from episodes.types import IGNORE, UInt8Array

IGNORE_LABEL = "__ignore__"
"""LabelMe's label of regions that count for no class."""
BACKGROUND_LABEL = "_background_"
"""LabelMe's label of background, which needs no shapes here."""
AREA_TYPES = ("polygon", "rectangle", "circle", "mask")
"""Shapes that say which pixels are the object."""
LINE_TYPES = ("line", "linestrip")
_FILES_KEPT = 1024  # parsed files that a process keeps, without the embedded photos
_TYPES = (*AREA_TYPES, *LINE_TYPES, "point")
_POINTS = {"polygon": (3, None), "linestrip": (2, None), "point": (1, 1)}  # fewest, most; others have exactly two

Points = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shape:
    """One entry of ``shapes``; points and mask are as the JSON has them and looked at when drawn."""

    number: int
    label: str
    type: str
    points: object
    mask: object


@dataclass(frozen=True, slots=True)
class LabelledPhoto:
    """What one file says.

    Attributes:
        file: the JSON.
        photo_name: ``imagePath`` relative to the file's folder, or None when the file names no photo inside it.
        size: (height, width) in pixels, or None when the file does not say.
        embeds_photo: whether the file holds the photo itself, as ``imageData``.
        shapes: in the order drawn.
        flags: names of the image-level flags that are set.
    """

    file: Path
    photo_name: str | None
    size: tuple[int, int] | None
    embeds_photo: bool
    shapes: tuple[Shape, ...]
    flags: frozenset[str]

    def labels(self) -> set[str]:
        """Labels of the shapes that are classes."""
        return {shape.label for shape in self.shapes} - {IGNORE_LABEL, BACKGROUND_LABEL}


def read_labelme(path: Path) -> LabelledPhoto:
    """The content of a LabelMe file, parsed once per process while it does not change.

    Raises:
        SourceError: missing file, broken JSON, or no list of labelled shapes of known types.
    """
    try:
        entry = path.stat()
    except OSError:
        raise missing_file(path) from None
    return _parse(path, entry.st_size, entry.st_mtime_ns)


@lru_cache(maxsize=_FILES_KEPT)
def _parse(path: Path, length: int, mtime: int) -> LabelledPhoto:  # noqa: ARG001  a changed file is another key
    content = read_json_object(path)
    entries = content.get("shapes")
    if not isinstance(entries, list):
        found = kind_of(entries) if "shapes" in content else "no such key"
        raise bad_annotation(
            path, f"expected a list 'shapes', found {found}", "keep only JSON files of LabelMe in this folder"
        )
    shapes = tuple(_shape(entry, number, path) for number, entry in enumerate(entries, start=1))
    sides = content.get("imageWidth"), content.get("imageHeight")
    size = None if sides == (None, None) else stated_size(*sides, path, "imageWidth and imageHeight")
    flags = content.get("flags")
    set_flags = (name for name, value in flags.items() if value is True) if isinstance(flags, dict) else ()
    return LabelledPhoto(
        file=path,
        photo_name=_photo_name(content.get("imagePath"), path),
        size=size,
        embeds_photo=bool(content.get("imageData")),
        shapes=shapes,
        flags=frozenset(set_flags),
    )


def _shape(entry: object, number: int, path: Path) -> Shape:
    where = f"shape {number}"
    if not isinstance(entry, dict):
        raise bad_annotation(path, f"{where} is {kind_of(entry)}, expected an object")
    label, kind = entry.get("label"), entry.get("shape_type") or "polygon"  # files before LabelMe 3.3 have no type
    if not isinstance(label, str) or not label:
        raise bad_annotation(path, f"{where}: expected a label, found {shown(label, 40)}", "give every shape a label")
    if kind not in _TYPES:
        raise bad_annotation(
            path,
            f"{where} ({shown(label, 40)}) is of type {shown(kind, 40)}, expected {', '.join(_TYPES)}",
            "draw it as one of those",
        )
    return Shape(number, label, kind, entry.get("points"), entry.get("mask"))


def _photo_name(name: object, path: Path) -> str | None:
    try:
        return inner_name(name, path, "imagePath")
    except SourceError:
        return None  # LabelMe itself writes '../photos/x.jpg': the photo beside the file or inside it may still do


def embedded_photo(labelled: LabelledPhoto) -> UInt8Array:
    """The photo of ``imageData``, upright, uint8 (H, W, 3).

    Raises:
        SourceError: no picture.
    """
    with _picture(read_json_object(labelled.file).get("imageData"), labelled.file, "imageData") as picture:
        return rgb(ImageOps.exif_transpose(picture))


@contextmanager
def _picture(data: object, file: Path, where: str) -> Iterator[Image.Image]:
    """A picture from its base64; whatever goes wrong in the block while decoding it becomes a `SourceError`."""
    try:
        if not isinstance(data, str):
            raise ValueError(f"found {kind_of(data)}")
        with open_picture(io.BytesIO(base64.b64decode(data, validate=False))) as picture:
            yield picture
    except SourceError:
        raise
    except Exception as error:  # Pillow's decoders each raise their own on damaged data
        raise bad_annotation(file, f"{where} is no picture in base64 ({reason_of(error):.80})") from None


def draw_areas(shapes: list[Shape], size: tuple[int, int], file: Path) -> npt.NDArray[np.bool_]:
    """bool (H, W): the union of polygons, rectangles, circles and masks, drawn as LabelMe's ``shape_to_mask`` does.

    Raises:
        SourceError: a shape that cannot be drawn.
    """
    canvas, draw = _canvas(size)
    union = np.zeros(size, dtype=bool)
    for shape in shapes:
        points = _points(shape, size, file)
        if shape.type == "mask":
            _paste(union, shape, points, file)
        elif shape.type == "circle":
            _disc(draw, points[0], math.dist(points[0], points[1]))
        elif shape.type == "rectangle":
            draw.rectangle(_corners(points), fill=1, outline=1)
        elif shape.type == "polygon":
            draw.polygon([tuple(point) for point in points.tolist()], fill=1, outline=1)
    union |= np.asarray(canvas) == 1
    return union


def draw_marks(shapes: list[Shape], size: tuple[int, int], file: Path, thickness: float) -> npt.NDArray[np.bool_]:
    """bool (H, W): points as discs of radius `thickness`, lines of width `thickness`, in pixels.

    Raises:
        SourceError: a shape that cannot be drawn.
    """
    canvas, draw = _canvas(size)
    for shape in shapes:
        points = _points(shape, size, file)
        if shape.type == "point":
            _disc(draw, points[0], thickness)
        else:
            draw.line([tuple(point) for point in points.tolist()], fill=1, width=round(thickness), joint="curve")
    return np.asarray(canvas).astype(bool)


def draw_boxes(shapes: list[Shape], size: tuple[int, int], file: Path) -> UInt8Array:
    """uint8 (H, W): 255 inside any of the rectangles, 0 outside all.

    Raises:
        SourceError: a shape that cannot be drawn.
    """
    return np.where(draw_areas(shapes, size, file), np.uint8(IGNORE), np.uint8(0))


def _canvas(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("L", (size[1], size[0]))
    return canvas, ImageDraw.Draw(canvas)


def _points(shape: Shape, size: tuple[int, int], file: Path) -> Points:
    where = f"shape {shape.number} ({shown(shape.label, 40)})"
    points = coordinates(shape.points, size, file, where)
    fewest, most = _POINTS.get(shape.type, (2, 2))
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < fewest or (most is not None and len(points) > most):
        wanted = f"{fewest} points or more" if most is None else f"exactly {fewest} point{'s' * (fewest > 1)}"
        raise bad_annotation(file, f"{where}: {shape.type} needs {wanted} [x, y], found {shown(shape.points, 60)}")
    return points


def _corners(points: Points) -> list[float]:
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]


def _disc(draw: ImageDraw.ImageDraw, centre: Points, radius: float) -> None:
    x, y = centre.tolist()
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)


def _paste(union: npt.NDArray[np.bool_], shape: Shape, points: Points, file: Path) -> None:
    """Add a mask shape, a picture of its bounding box whose corners (inclusive) are its points, to `union` in place."""
    where = f"shape {shape.number} ({shown(shape.label, 40)})"
    left, top, right, bottom = (int(value) for value in _corners(points))
    with _picture(shape.mask, file, f"{where}: mask") as mask:
        picture = np.asarray(mask.convert("L")) > 0
    if picture.shape != (bottom - top + 1, right - left + 1) or left < 0 or top < 0:
        raise bad_annotation(
            file,
            f"{where}: mask is {picture.shape[1]}x{picture.shape[0]} pixels, its corners "
            f"{left}, {top} and {right}, {bottom} span {right - left + 1}x{bottom - top + 1}",
        )
    window = union[top : bottom + 1, left : right + 1]
    window |= picture[: window.shape[0], : window.shape[1]]
