"""What people draw on a photo in the page, as the annotation uint8 (H, W) that `Predictor.remember` takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt

from episodes.types import IGNORE, SUPPORT_KINDS, DataError, SupportKind, UInt8Array
from fewshot_seg.support_photos import point_marks

Tool = Literal["outline", "brush", "eraser", "box", "point"]

_TOOLS: dict[SupportKind, tuple[Tool, ...]] = {
    "mask": ("outline", "brush", "eraser"),
    "scribble": ("brush", "eraser"),
    "box": ("box",),
    "point": ("point",),
    "label": (),
}
_LEAST_POINTS: dict[Tool, int] = {"outline": 3, "brush": 1, "eraser": 1, "box": 2, "point": 1}
_MOST_SHAPES, _MOST_POINTS = 2_000, 50_000
_NOT_ONE = "the drawing that the page sent cannot be read; reload the page and draw again"


@dataclass(frozen=True, slots=True)
class Shape:
    """One thing drawn.

    Attributes:
        tool: outline: a line around a region, which is filled; brush and eraser: a stroke; box: two opposite corners;
            point: one place.
        points: (x, y) in pixels of the photo, from its top left corner.
        radius: of brush and eraser, in pixels.
    """

    tool: Tool
    points: tuple[tuple[float, float], ...]
    radius: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """What is drawn on one photo, in this order; shapes of tools that are not of `kind` count for nothing."""

    kind: SupportKind = "mask"
    shapes: tuple[Shape, ...] = ()


def read_drawing(value: Any) -> Drawing:
    """A drawing from what the page sends: ``{"kind": ..., "shapes": [{"tool", "points", "radius"}, ...]}``.

    Raises:
        DataError: anything else, numbers that are not finite, or more than a hand can draw.
    """
    if not isinstance(value, dict) or value.get("kind") not in SUPPORT_KINDS:
        raise DataError(_NOT_ONE)
    shapes = value.get("shapes")
    if not isinstance(shapes, list) or len(shapes) > _MOST_SHAPES:
        raise DataError(_NOT_ONE)
    read = tuple(_shape(one) for one in shapes)
    if sum(len(one.points) for one in read) > _MOST_POINTS:
        raise DataError(_NOT_ONE)
    return Drawing(kind=value["kind"], shapes=read)


def _shape(value: Any) -> Shape:
    if not isinstance(value, dict) or value.get("tool") not in get_args(Tool):
        raise DataError(_NOT_ONE)
    tool, points = value["tool"], value.get("points")
    if not isinstance(points, list) or not _LEAST_POINTS[tool] <= len(points) <= _MOST_POINTS:
        raise DataError(_NOT_ONE)
    if not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise DataError(_NOT_ONE)
    return Shape(tool, tuple((_number(x), _number(y)) for x, y in points), max(0.5, _number(value.get("radius", 1.0))))


def _number(value: Any) -> float:
    """Of a place in a photo; what lies far outside is brought to where rasterising cannot overflow."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(_NOT_ONE)
    if not abs(value) <= sys.float_info.max:  # infinite, not a number, or an integer that no float holds
        raise DataError(_NOT_ONE)
    return min(max(float(value), -1e4), 1e4)


def annotation_of(drawing: Drawing, shape: tuple[int, int]) -> UInt8Array:
    """The annotation of a photo of (H, W): 1 = object, 0 = background, 255 = not known.

    Raises:
        DataError: nothing of the drawing's kind is drawn inside the photo.
    """
    shapes = [one for one in drawing.shapes if one.tool in _TOOLS[drawing.kind]]
    if drawing.kind == "label":
        return np.full(shape, IGNORE, np.uint8)
    if drawing.kind == "point":
        points = [_on_photo(one.points[0], shape) for one in shapes]
        marks = point_marks([one for one in points if _inside(one, shape)], shape)
    elif drawing.kind == "box":
        marks = _boxes(shapes, shape)
    else:
        painted = _painted(shapes, shape)
        marks = painted if drawing.kind == "mask" else np.where(painted == 1, 1, IGNORE).astype(np.uint8)
    if not (marks == (IGNORE if drawing.kind == "box" else 1)).any():
        raise DataError(_NOTHING[drawing.kind])
    return marks


_NOTHING: dict[SupportKind, str] = {
    "mask": "nothing is painted yet: draw around the object or paint it, or choose another way to show it",
    "scribble": "there is no stroke yet: draw one on the object, or choose another way to show it",
    "box": "there is no box yet: drag one from corner to corner around the object, or choose another way to show it",
    "point": "there is no point yet: tap on the object, or choose another way to show it",
}


def _on_photo(point: tuple[float, float], shape: tuple[int, int]) -> tuple[float, float]:
    """The page's last place is the photo's edge, one beyond its last pixel: that counts as the last pixel."""
    x, y = point
    return (min(x, shape[1] - 1) if x <= shape[1] else x, min(y, shape[0] - 1) if y <= shape[0] else y)


def _inside(point: tuple[float, float], shape: tuple[int, int]) -> bool:
    return 0 <= point[0] < shape[1] and 0 <= point[1] < shape[0]


def _boxes(shapes: Sequence[Shape], shape: tuple[int, int]) -> UInt8Array:
    marks = np.zeros(shape, np.uint8)
    for one in shapes:
        (x, y), (other_x, other_y) = one.points[0], one.points[-1]
        left, right = sorted((max(0, round(x)), max(0, round(other_x))))
        top, bottom = sorted((max(0, round(y)), max(0, round(other_y))))
        marks[top:bottom, left:right] = IGNORE
    return marks


_BITS = 4
"""Of the fraction of coordinates that OpenCV draws with."""


def _painted(shapes: Sequence[Shape], shape: tuple[int, int]) -> UInt8Array:
    painted = np.zeros(shape, np.uint8)
    for one in shapes:
        places = [_on_photo(point, shape) for point in one.points]
        points = _pixels(places)
        if one.tool == "outline":
            cv2.fillPoly(painted, [points], 1, shift=_BITS)
            continue
        value, radius = int(one.tool == "brush"), one.radius
        cv2.polylines(painted, [points], False, value, max(1, round(2 * radius)), shift=_BITS)
        for x, y in (places[0], places[-1]):  # round ends, and a dot where the stroke is one point
            cv2.circle(painted, (round(x), round(y)), max(0, round(radius)), value, cv2.FILLED)
    return painted


def _pixels(points: Sequence[tuple[float, float]]) -> npt.NDArray[np.int32]:
    return np.asarray(np.round(np.array(points, np.float64) * 2**_BITS)[:, None], np.int32)
