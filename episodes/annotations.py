"""Weak supports, derived from masks by rules without any chance: equal masks give equal annotations.

An *annotation* says for every pixel what is known: 1 = object, 0 = background, 255 = not known. What the kinds know:

========  =========================================================  =============================  ==============
kind      drawn on                                                   1                              0
========  =========================================================  =============================  ==============
mask      every pixel                                                the object                     the background
box       every kept region: its bounding box                        nowhere                        outside boxes
scribble  every kept region: a line through its middle               the line                       nowhere
point     the largest region: a disc where it is widest              the disc                       nowhere
label     nothing: the photo shows an object of the class somewhere  nowhere                        nowhere
========  =========================================================  =============================  ==============

All else is 255. The rules:

- A *region* is an 8-connected component of the pixels that are 1. It is *kept* if it has at least 5% of the pixels of
  the largest: crumbs of a mask are no objects that a person would mark. All other pixels, the ignored ones too, count
  as outside, and so does what is beyond the edge of the photo.
- Box: tight. What is outside all boxes is 0, crumbs included: who draws boxes says so. Only ignored pixels stay 255,
  since they may be padding, or of classes that a protocol hides.
- Scribble: the two ends of a region are found by going as far as possible inside it, twice. The path from one to the
  other is the cheapest where a step costs the more, the closer it is to the border (squared inverse of the distance),
  on a grid whose long side has at most 100 cells. A tenth is left off at both ends, since nobody draws to the very
  edge. The line is max(3, 1.5% of the photo's short side) pixels wide and clipped to the region.
- Point: at the region's pole of inaccessibility, the maximum of the Euclidean distance to the border (of several the
  first in row order), a disc with a radius of max(2, 1% of the photo's short side) pixels, clipped to the object.

What the literature does beside: ScribbleSup (Lin et al., CVPR 2016) had people draw scribbles for PASCAL VOC, on the
background too. What's the Point (Bearman et al., ECCV 2016) had them click on objects. PANet (Wang et al., ICCV 2019)
tests few-shot segmentation with scribbles that the DAVIS robot draws along the longest path of the medial axis, and
with boxes of instances: in its code the largest instance's box is all object, and what is outside the boxes of all
instances is background. Here no instances are needed, nothing is drawn on the background, and a box leaves open what
is inside. Numbers of papers that use other rules can therefore be compared only roughly.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.graph import MCP_Geometric

from episodes.sources.marks import line_width, point_radius
from episodes.types import IGNORE, SUPPORT_KINDS, DataError, MaskSource, SupportKind, UInt8Array, WeaklyAnnotated

_Region = npt.NDArray[np.bool_]
_Window = tuple[slice, slice]
_Cell = tuple[np.intp, ...]
_Distances = npt.NDArray[np.float32]

_TOUCHING = np.ones((3, 3), dtype=bool)  # pixels that meet at a corner belong together
_KEPT_ONE_IN = 20  # a region is kept if it has at least one pixel for so many of the largest
_GRID_SIDE = 100  # most cells along the photo's long side when the path of a scribble is searched
_LEFT_OFF_ONE_IN = 10  # part of a scribble's path that is left off at either end


def derive_annotation(mask: UInt8Array, kind: SupportKind) -> UInt8Array:
    """What a support of this kind knows of a mask, by the rules of this module.

    Args:
        mask: uint8 (H, W), 1 = object, 0 = background, 255 = ignored; left as it is.
        kind: one of `SUPPORT_KINDS`.

    Returns:
        uint8 (H, W), a new array: 1 = object, 0 = known background, 255 = not known.

    Raises:
        DataError: an unknown kind; no mask of this form; no object in the mask, which "mask" (it says: all background)
            and "label" (it says nothing about pixels) do without.

    Example:
        >>> mask = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], dtype=np.uint8)
        >>> derive_annotation(mask, "box")
        array([[  0,   0,   0,   0],
               [  0, 255, 255,   0],
               [  0, 255, 255,   0]], dtype=uint8)
    """
    _require_kind(kind)
    _require_mask(mask)
    if kind == "mask":
        return mask.copy()
    if kind == "label":
        return np.full(mask.shape, IGNORE, dtype=np.uint8)
    if not (mask == 1).any():
        raise DataError(
            f"a support marked by a {kind} needs an object; got a mask of {mask.shape[0]} x {mask.shape[1]} pixels of "
            "which none is 1: choose another image or class, or mark it by mask or label"
        )
    draw = {"box": _boxes, "scribble": _scribbles, "point": _point}[kind]
    return draw(mask)


def annotation_of(source: MaskSource, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array:
    """What a support knows: what the source has drawn of this kind, else what is derived from its mask.

    Drawn marks are looked for in a `WeaklyAnnotated` source, and then no mask is read; kind "mask" is always the mask.

    Returns:
        uint8 (H, W): 1 = object, 0 = known background, 255 = not known.

    Raises:
        DataError: an unknown kind; nothing drawn and a mask that cannot be marked (names image and class); whatever
            the source raises.
    """
    _require_kind(kind)
    if kind != "mask" and isinstance(source, WeaklyAnnotated):
        drawn = source.annotation(image_id, class_id, kind)
        if drawn is not None:
            return drawn
    mask = source.mask(image_id, class_id)
    try:
        return derive_annotation(mask, kind)
    except DataError as error:
        raise DataError(f"{source.name}: image {image_id!r}, class {class_id}: {error}") from error


def _require_kind(kind: str) -> None:
    if kind not in SUPPORT_KINDS:
        raise DataError(f"supports are marked by {', '.join(SUPPORT_KINDS)}; got {kind!r}: name one of these")


def _require_mask(mask: UInt8Array) -> None:
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise DataError(f"a mask must be uint8 (H, W); got {mask.dtype} of shape {mask.shape}: convert it before")
    foreign = mask[(mask > 1) & (mask != IGNORE)]
    if foreign.size:
        raise DataError(
            f"a mask has the values 0, 1 and {IGNORE}; got {int(foreign[0])}: take the mask of one class, not the "
            "labels of an image"
        )


def _kept_regions(mask: UInt8Array) -> Iterator[tuple[_Window, _Region]]:
    """Window in the mask and pixels in the window of every kept region, the largest first, then in row order."""
    labels, _ = ndimage.label(mask == 1, structure=_TOUCHING)
    sizes = np.bincount(labels.ravel())[1:]
    windows = ndimage.find_objects(labels)
    for n in np.argsort(-sizes, kind="stable").tolist():
        if _KEPT_ONE_IN * sizes[n] >= sizes.max():
            yield windows[n], labels[windows[n]] == n + 1


def _boxes(mask: UInt8Array) -> UInt8Array:
    known = np.where(mask == IGNORE, np.uint8(IGNORE), np.uint8(0))  # padding and VOC's outlines are no background
    for window, _ in _kept_regions(mask):
        known[window] = IGNORE
    return known


def _point(mask: UInt8Array) -> UInt8Array:
    window, region = next(_kept_regions(mask))
    room = _distance_to_border(region)
    y, x = np.unravel_index(room.argmax(), room.shape)
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    squares = (rows - window[0].start - y) ** 2 + (columns - window[1].start - x) ** 2
    radius = point_radius(mask.shape)
    known = np.full(mask.shape, IGNORE, dtype=np.uint8)
    known[(squares <= radius**2) & (mask == 1)] = 1
    return known


def _scribbles(mask: UInt8Array) -> UInt8Array:
    cell = -(-max(mask.shape) // _GRID_SIDE)
    reach = (line_width(mask.shape) - 1) / 2  # to either side of a thread of one pixel
    known = np.full(mask.shape, IGNORE, dtype=np.uint8)
    for window, region in _kept_regions(mask):
        thread = _thread(region.shape, _middle_line(region, cell))
        known[window][(cv2.distanceTransform(1 - thread, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= reach) & region] = 1
    return known


def _thread(shape: tuple[int, ...], pixels: npt.NDArray[np.intp]) -> UInt8Array:
    """uint8 (h, w): 1 on the pixels (N, 2), y and x, and on straight lines of one pixel between them."""
    thread = np.zeros(shape, dtype=np.uint8)
    corners = np.ascontiguousarray(pixels[:, ::-1], dtype=np.int32)  # OpenCV has x before y
    cv2.polylines(thread, [corners], isClosed=False, color=1)
    thread[pixels[:, 0], pixels[:, 1]] = 1  # OpenCV draws nothing in pictures of one pixel
    return thread


def _distance_to_border(region: _Region) -> _Distances:
    """Euclidean distance, float32 (h, w), of every pixel to the nearest outside; beyond the window all is outside."""
    padded = np.pad(region.astype(np.uint8), 1)
    return np.asarray(cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)[1:-1, 1:-1]


def _middle_line(region: _Region, cell: int) -> npt.NDArray[np.intp]:
    """Pixels (N, 2), y and x, of the region, N >= 1, along its middle between two far ends."""
    room, pixels = _widest_of_cells(_distance_to_border(region), cell)
    inside = np.where(room > 0, 1.0, -1.0)  # a negative cost is a wall
    one_end = _farthest(inside, np.unravel_index(room.argmax(), room.shape))
    other_end = _farthest(inside, one_end)
    search = MCP_Geometric(np.where(room > 0, (room.max() / np.maximum(room, 1)) ** 2, -1.0))
    search.find_costs([one_end], [other_end])
    path = np.array(search.traceback(other_end))
    left_off = len(path) // _LEFT_OFF_ONE_IN
    middle = path[left_off : len(path) - left_off]
    return np.asarray(pixels[middle[:, 0], middle[:, 1]])


def _farthest(costs: npt.NDArray[np.float64], start: _Cell) -> _Cell:
    lengths, _ = MCP_Geometric(costs).find_costs([start])
    return np.unravel_index(np.where(np.isfinite(lengths), lengths, -1).argmax(), lengths.shape)


def _widest_of_cells(distance: _Distances, cell: int) -> tuple[_Distances, npt.NDArray[np.intp]]:
    """Maxima (h, w) of square cells, and the pixels (h, w, 2) where they are; connected regions stay connected."""
    padded = np.pad(distance, [(0, -side % cell) for side in distance.shape])
    height, width = padded.shape[0] // cell, padded.shape[1] // cell
    cells = padded.reshape(height, cell, width, cell).swapaxes(1, 2).reshape(height, width, cell * cell)
    widest = cells.argmax(axis=2)
    y, x = widest // cell + cell * np.arange(height)[:, None], widest % cell + cell * np.arange(width)
    return cells.max(axis=2), np.stack([y, x], axis=2)
