"""Weak supports derived from masks, by rule: equal masks give equal annotations.

An *annotation* is uint8 (H, W): 1 = known object, 0 = known background, 255 = not known. Ignored pixels of the mask
(255) are known in no annotation. An *object part* is an 8-connected region of pixels of value 1; parts with less than
5 % of the pixels of the largest are left out, as a person in a hurry would.

======== ================================================================= =====================================
kind     what is known                                                     in the literature
======== ================================================================= =====================================
mask     the mask                                                          the usual support
box      0 outside the tight boxes of all parts, nothing inside            PANet (Wang et al. 2019): box of one random
                                                                           instance, all of it taken for object
scribble 1 on one line through the middle of every part                    ScribbleSup (Lin et al. 2016): drawn by
                                                                           people; PANet: random, from the mask
point    1 on a disc about the pole of inaccessibility of the largest part What's the Point (Bearman et al. 2016): a
                                                                           click that people make, near the middle
label    nothing: only that the object is somewhere                        image-level labels
======== ================================================================= =====================================

The scribble joins the two points of a part that are furthest from each other by way of the part, along the cheapest
path if a step near the outline costs more than one through the middle; a tenth of it is cut off at either end, as
people do not draw to the tips, and it is smoothed. Its width is 1.5 % of the picture's short side, at least 3 pixels.
The disc's radius is 1 % of the short side, at least 2 pixels. Both are clipped to the object.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from episodes.types import IGNORE, SUPPORT_KINDS, DataError, MaskSource, SupportKind, UInt8Array, WeaklyAnnotated

_TOUCHING = np.ones((3, 3), dtype=np.uint8)  # pixels that meet at a corner belong together
_LEAST_PART = 0.05  # of the largest part's pixels
_CELLS = 80  # scribbles are planned on a grid of at most this many cells a side
_MIDDLE = 8.0  # a step along the outline costs 1 + this many times a step through the middle
_TIP = 0.1  # share of a scribble that is cut off at either end

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]


def derive_annotation(mask: UInt8Array, kind: SupportKind) -> UInt8Array:
    """What a person who marks the object by `kind` would have drawn; see the module for the rules.

    Args:
        mask: uint8 (H, W), 1 = object, 0 = background, 255 = ignored.
        kind: how the object is marked.

    Returns:
        A new uint8 (H, W) of 0, 1 and 255.

    Raises:
        DataError: unknown kind, or one other than ``mask`` of a mask without object.

    Example:
        >>> mask = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], dtype=np.uint8)
        >>> derive_annotation(mask, "box")
        array([[  0,   0,   0,   0],
               [  0, 255, 255,   0],
               [  0, 255, 255,   0]], dtype=uint8)
    """
    if kind not in SUPPORT_KINDS:
        raise DataError(f"no kind of support {kind!r}; known are: {', '.join(SUPPORT_KINDS)}")
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise DataError(f"expected a uint8 mask (H, W) to derive a {kind} from, got {mask.dtype} {mask.shape}")
    if kind == "mask":
        return mask.copy()
    if not (mask == 1).any():
        raise DataError(
            f"expected a mask with object pixels (value 1) to derive a {kind} from, got none; "
            "leave this image out of the supports of the class"
        )
    if kind == "box":
        return _boxes(mask)
    annotation = np.full_like(mask, IGNORE)
    if kind == "scribble":
        annotation[_scribble(mask)] = 1
    elif kind == "point":
        annotation[_point(mask)] = 1
    return annotation


def annotation_of(source: MaskSource, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array:
    """The annotation that somebody drew, if the source has one of this kind; else the one derived from the mask.

    Raises:
        DataError: neither drawn nor derivable, naming the image.
    """
    if kind != "mask" and isinstance(source, WeaklyAnnotated):
        drawn = source.annotation(image_id, class_id, kind)
        if drawn is not None:
            return drawn
    mask = source.mask(image_id, class_id)
    try:
        return derive_annotation(mask, kind)
    except DataError as error:
        raise DataError(f"image {image_id!r}, class {class_id}: {error}") from error


def _parts(mask: UInt8Array) -> list[tuple[tuple[slice, slice], BoolArray]]:
    """Window and pixels (within the window) of every part that counts; the largest first, ties in row order."""
    regions, _ = ndimage.label(mask == 1, structure=_TOUCHING)
    sizes = np.bincount(regions.ravel())[1:]
    windows = ndimage.find_objects(regions)
    kept = [n for n in np.argsort(-sizes, kind="stable").tolist() if sizes[n] >= _LEAST_PART * sizes.max()]
    return [(windows[n], regions[windows[n]] == n + 1) for n in kept]


def _boxes(mask: UInt8Array) -> UInt8Array:
    annotation = np.where(mask == IGNORE, mask, np.uint8(0))
    for window, _ in _parts(mask):
        annotation[window] = IGNORE
    return annotation


def _point(mask: UInt8Array) -> BoolArray:
    window, pixels = _parts(mask)[0]
    depth = _depth(pixels)
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    radius = max(2.0, 0.01 * min(mask.shape))
    away = (rows - row - window[0].start) ** 2 + (columns - column - window[1].start) ** 2
    disc: BoolArray = (away <= radius**2) & (mask == 1)
    return disc


def _depth(pixels: BoolArray) -> FloatArray:
    """Distance of every pixel to the nearest one outside; beyond the window all is outside."""
    padded = np.pad(pixels, 1).astype(np.uint8)
    return np.asarray(cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1])


def _scribble(mask: UInt8Array) -> BoolArray:
    cell = -(-max(mask.shape) // _CELLS)
    width = max(3, round(0.015 * min(mask.shape)))
    drawn = np.zeros(mask.shape, dtype=np.uint8)
    for window, pixels in _parts(mask):
        canvas = np.zeros(pixels.shape, dtype=np.uint8)
        line = _middle_line(pixels, cell)
        smooth = ndimage.gaussian_filter1d(line.astype(np.float64), 2.0, axis=0, mode="nearest")
        points = np.round(smooth[:, ::-1]).astype(np.int32)  # OpenCV's points are (x, y)
        cv2.polylines(canvas, [points], isClosed=False, color=1, thickness=width)
        canvas[tuple(line[len(line) // 2])] = 1  # smoothing may cut a bend short: something must be left of it
        drawn[window] |= canvas & pixels.astype(np.uint8)
    scribble: BoolArray = drawn == 1
    return scribble


def _middle_line(pixels: BoolArray, cell: int) -> IntArray:
    """(row, column) of the pixels that the scribble passes, (N, 2): the deepest pixel of each cell on the path."""
    depth = _depth(pixels)
    height, width = (-(-side // cell) for side in depth.shape)
    padding = ((0, height * cell - depth.shape[0]), (0, width * cell - depth.shape[1]))
    blocks = np.pad(depth, padding).reshape(height, cell, width, cell).swapaxes(1, 2).reshape(height, width, -1)
    deepest, within = blocks.max(axis=2), blocks.argmax(axis=2)
    rows, columns = np.nonzero(deepest > 0)
    path = _path(deepest)
    rows, columns = rows[path], columns[path]
    inside = within[rows, columns]
    return np.stack([rows * cell + inside // cell, columns * cell + inside % cell], axis=1)


def _path(depth: FloatArray) -> IntArray:
    """Numbers of the cells, counted in row order among those with depth > 0, on the path through the middle."""
    deepest = depth[depth > 0]
    plain, central = _grid_graphs(depth)
    middle = int(deepest.argmax())
    start = int(csgraph.dijkstra(plain, indices=middle).argmax())
    end = int(csgraph.dijkstra(plain, indices=start).argmax())
    _, before = csgraph.dijkstra(central, indices=start, return_predecessors=True)
    path = [end]
    while path[-1] != start:
        path.append(int(before[path[-1]]))
    tip = round(_TIP * len(path))
    return np.array(path[tip : len(path) - tip])


def _grid_graphs(depth: FloatArray) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Cells with depth > 0, joined to their eight neighbours: by length, and by length times cost of being outside.

    Cells of one part always hang together: blocks of pixels that touch are neighbours.
    """
    count = int((depth > 0).sum())
    number = np.full((depth.shape[0] + 2, depth.shape[1] + 2), -1)
    number[1:-1, 1:-1][depth > 0] = np.arange(count)
    cost = 1 + _MIDDLE * (1 - depth[depth > 0] / depth.max()) ** 2
    here, there, length = [], [], []
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        one = number[1:-1, 1:-1]
        other = number[1 + down : number.shape[0] - 1 + down, 1 + right : number.shape[1] - 1 + right]
        joined = (one >= 0) & (other >= 0)
        here.append(one[joined])
        there.append(other[joined])
        length.append(np.full(here[-1].size, np.hypot(down, right)))
    ends = np.concatenate(here + there), np.concatenate(there + here)
    lengths = np.concatenate(length + length)
    weighted = lengths * (cost[ends[0]] + cost[ends[1]]) / 2
    shape = (count, count)
    return sparse.csr_array((lengths, ends), shape=shape), sparse.csr_array((weighted, ends), shape=shape)
