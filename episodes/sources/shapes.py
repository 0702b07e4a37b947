"""Shape families of the synthetic source: outlines around the origin, drawn with smooth edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from episodes.types import UInt8Array

Points = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outline:
    """A polygon around the origin, about 1 in radius, perhaps with a hole; both float64 (N, 2), x and y."""

    points: Points
    hole: Points | None = None

    @property
    def area(self) -> float:
        """Area in units of the radius squared (the disc has about pi)."""
        return _polygon_area(self.points) - (0.0 if self.hole is None else _polygon_area(self.hole))


def _polygon_area(points: Points) -> float:
    x, y = points[:, 0], points[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _polar(radii: npt.ArrayLike, start: float = -np.pi / 2) -> Points:
    r = np.asarray(radii, dtype=np.float64)
    angle = start + 2 * np.pi * np.arange(len(r)) / len(r)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)


def _crescent() -> Points:
    outer = np.linspace(0.25 * np.pi, 1.75 * np.pi, 48)
    tip = np.array([np.cos(outer[0]), np.sin(outer[0])])
    centre_x = 0.62
    radius = float(np.hypot(tip[0] - centre_x, tip[1]))
    first = float(np.arctan2(tip[1], tip[0] - centre_x))
    inner = np.linspace(2 * np.pi - first, first, 48)
    return np.concatenate(
        [
            np.stack([np.cos(outer), np.sin(outer)], axis=1),
            np.stack([centre_x + radius * np.cos(inner), radius * np.sin(inner)], axis=1),
        ]
    )


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 17.0


def _cross(arm: float = 0.34) -> Points:
    a, b = arm, float(np.sqrt(1 - arm**2))
    quarter = np.array([[a, -b], [a, -a], [b, -a]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])  # a quarter turn of row vectors
    parts = [quarter]
    for _ in range(3):
        parts.append(parts[-1] @ turn)
    return np.concatenate(parts)


_CIRCLE = np.ones(64)

OUTLINES: Mapping[str, Outline] = MappingProxyType(
    {
        "disc": Outline(_polar(_CIRCLE)),
        "star": Outline(_polar([1.0, 0.45] * 5)),
        "triangle": Outline(_polar([1.0] * 3)),
        "ring": Outline(_polar(_CIRCLE), hole=_polar(0.5 * _CIRCLE)),
        "cross": Outline(_cross()),
        "crescent": Outline(_crescent()),
        "heart": Outline(_heart()),
        "flower": Outline(_polar(0.76 + 0.24 * np.cos(6 * np.linspace(0, 2 * np.pi, 96, endpoint=False)))),
    }
)
"""Name -> outline. Order matters: classes are numbered by it."""


Window = tuple[slice, slice]
"""Rows and columns of a part of a picture."""


def coverage(
    outline: Outline, matrix: npt.NDArray[np.float64], centre: Points, size: int, margin: int = 0
) -> tuple[Window, UInt8Array]:
    """How much of each pixel an outline covers.

    Args:
        outline: the shape in its own coordinates.
        matrix: float64 (2, 2), from shape coordinates to pixels.
        centre: float64 (2,), where the origin goes, in pixels (x, y), inside the picture.
        size: side of the square picture.
        margin: pixels around the shape that the window takes in as well.

    Returns:
        The part of the picture around the shape, and its coverage there, uint8 (h, w), 0..255.
    """
    placed = outline.points @ matrix.T + centre
    left, top = np.maximum(np.floor(placed.min(axis=0)).astype(int) - margin, 0).tolist()
    right, bottom = np.minimum(np.ceil(placed.max(axis=0)).astype(int) + margin + 1, size).tolist()
    width, height = right - left, bottom - top
    canvas = Image.new("L", (2 * width, 2 * height), 0)  # at twice the size: the box filter smooths edges
    draw = ImageDraw.Draw(canvas)
    for points, value in ((outline.points, 255), (outline.hole, 0)):
        if points is not None:
            corners = 2 * (points @ matrix.T + centre - (left, top))
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=value)
    window = (slice(top, bottom), slice(left, right))
    return window, np.asarray(canvas.resize((width, height), Image.Resampling.BOX))
