"""Marks that somebody drew, as annotations: uint8 (H, W), 1 = object, 0 = known background, 255 = not known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from episodes.types import IGNORE, UInt8Array

_LEAST_WIDTH, _WIDTH = 3.0, 0.015  # of a line: pixels, and part of the photo's short side
_LEAST_RADIUS, _RADIUS = 2.0, 0.01  # of a point: likewise
_TOUCHING = np.ones((3, 3), dtype=bool)  # pixels that meet at a corner belong together


def line_width(shape: tuple[int, ...]) -> float:
    """Width in pixels of a line drawn on a photo of (H, W): thinner ones would not survive resizing.

    >>> line_width((100, 150)), line_width((600, 400))
    (3.0, 6.0)
    """
    return max(_LEAST_WIDTH, _WIDTH * min(shape))


def point_radius(shape: tuple[int, ...]) -> float:
    """Radius in pixels of the disc that stands for a point on a photo of (H, W)."""
    return max(_LEAST_RADIUS, _RADIUS * min(shape))


def box_annotation(drawn: npt.NDArray[np.bool_]) -> UInt8Array:
    """255 in the bounding box of every connected region of `drawn` (H, W), filled or an outline; 0 elsewhere."""
    regions, _ = ndimage.label(drawn, structure=_TOUCHING)
    known = np.zeros(drawn.shape, dtype=np.uint8)
    for window in ndimage.find_objects(regions):
        known[window] = IGNORE
    return known


def stroke_annotation(drawn: npt.NDArray[np.bool_], background: npt.NDArray[np.bool_]) -> UInt8Array:
    """1 where `drawn` (H, W), 0 where `background`, 255 elsewhere.

    >>> stroke_annotation(np.array([[True, False, False]]), np.array([[False, True, False]]))
    array([[  1,   0, 255]], dtype=uint8)
    """
    known = np.full(drawn.shape, IGNORE, dtype=np.uint8)
    known[background] = 0
    known[drawn] = 1
    return known
