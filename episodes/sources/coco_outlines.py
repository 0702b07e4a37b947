"""Objects of COCO's JSON format as pixels: polygons, run lengths (plain and compressed) and boxes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as run_length

from episodes.sources.annotation_files import bad_annotation, check_outline, coordinates, kind_of, shown
from episodes.sources.coco_annotations import CocoObject, CocoPhoto
from episodes.types import IGNORE, UInt8Array

_LONGEST_NUMBER = 60  # bits of one number in compressed run lengths: no photo needs more


def class_mask(file: Path, photo: CocoPhoto, class_id: int) -> UInt8Array:
    """uint8 (H, W) of the JSON's size: 1 on the union of the class's objects, 255 where more may be, else 0.

    255 are crowd regions (``iscrowd`` 1) of this class and the boxes of objects of this class without an
    outline, where no outlined object covers them. Crowds of *other* classes are background: they do not show
    this one.

    Raises:
        SourceError: an outline or box that cannot be drawn, naming file and annotation.
    """
    objects: list[dict[str, Any]] = []
    unknown: list[dict[str, Any]] = []
    mask: UInt8Array = np.zeros(photo.size, dtype=np.uint8, order="F")  # as pycocotools decodes
    for thing in photo.objects:
        if thing.class_id != class_id:
            continue
        outline = _outline(file, photo, thing)
        if outline is None:
            mask[_box(file, photo, thing)] = IGNORE
        else:
            (unknown if thing.crowd else objects).append(outline)
    for outlines, value in ((unknown, IGNORE), (objects, 1)):
        if outlines:
            np.copyto(mask, value, where=run_length.decode(run_length.merge(outlines)).view(np.bool_))
    return np.ascontiguousarray(mask)


def class_boxes(file: Path, photo: CocoPhoto, class_id: int) -> UInt8Array | None:
    """uint8 (H, W): 255 inside the ``bbox`` of any object or crowd of the class, 0 outside; None without an object.

    Raises:
        SourceError: a box that cannot be drawn, naming file and annotation.
    """
    things = [thing for thing in photo.objects if thing.class_id == class_id and thing.bbox]
    if all(thing.crowd for thing in things):
        return None
    boxes: UInt8Array = np.zeros(photo.size, dtype=np.uint8)
    for thing in things:
        boxes[_box(file, photo, thing)] = IGNORE
    return boxes


def _outline(file: Path, photo: CocoPhoto, thing: CocoObject) -> dict[str, Any] | None:
    """Run lengths of an object as pycocotools keeps them; None when it has a box alone."""
    where = f"annotation {shown(thing.number, 40)}"
    height, width = photo.size
    outline = thing.segmentation
    if isinstance(outline, dict):
        runs = _run_lengths(outline, photo, file, where).tolist()
        encoded: dict[str, Any] = run_length.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        return encoded
    if isinstance(outline, list) and outline:
        polygons = [coordinates(polygon, photo.size, file, where) for polygon in outline]
        for polygon in polygons:
            if polygon.ndim != 1 or polygon.size < 6 or polygon.size % 2:
                raise bad_annotation(
                    file, f"{where}: polygon has {polygon.size} numbers, expected x and y of three points or more"
                )
        check_outline([polygon.reshape(-1, 2) for polygon in polygons], file, where)
        merged: dict[str, Any] = run_length.merge(
            run_length.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
        )
        return merged
    if outline not in (None, []):
        raise bad_annotation(file, f"{where}: expected polygons or run lengths, found {kind_of(outline)}")
    if not thing.bbox:
        raise bad_annotation(file, f"{where} has neither an outline (segmentation) nor a box (bbox)")
    return None


def _box(file: Path, photo: CocoPhoto, thing: CocoObject) -> tuple[slice, slice]:
    """Rows and columns of all pixels that a box touches."""
    where = f"annotation {shown(thing.number, 40)}"
    numbers = coordinates(thing.bbox, photo.size, file, where)
    if numbers.shape != (4,) or (numbers[2:] < 0).any():
        raise bad_annotation(file, f"{where}: expected bbox as x, y, width, height; found {shown(thing.bbox, 60)}")
    x, y, width, height = numbers.tolist()
    first = np.floor([max(y, 0.0), max(x, 0.0)]).astype(int)
    last = np.ceil([max(y + height, 0.0), max(x + width, 0.0)]).astype(int)
    return slice(first[0], last[0]), slice(first[1], last[1])


def _run_lengths(outline: Mapping[str, Any], photo: CocoPhoto, file: Path, where: str) -> npt.NDArray[np.int64]:
    """Lengths of runs of 0 and 1 in turn, down the columns, that fill the photo exactly.

    pycocotools leaves the pixels after a short list as memory happened to be, so the sum must be known.
    """
    height, width = photo.size
    if outline.get("size") != [height, width]:
        raise bad_annotation(
            file,
            f"{where}: run lengths are for size {shown(outline.get('size'), 40)}, the image has [{height}, {width}]",
        )
    counts = outline.get("counts")
    try:
        runs = np.asarray(decompress(counts) if isinstance(counts, str) else counts)
    except ValueError:
        runs = np.empty(0)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any() or (runs > height * width).any():
        raise bad_annotation(file, f"{where}: counts are no run lengths: {shown(counts, 60)}")
    if runs.sum() != height * width:
        raise bad_annotation(
            file, f"{where}: run lengths cover {runs.sum()} pixels, the image of {width}x{height} has {height * width}"
        )
    return runs.astype(np.int64)


def decompress(text: str) -> list[int]:
    """Run lengths of COCO's compressed text (``rleFrString`` in maskApi.c).

    Each number takes characters of 6 bits from ``0`` on, the lowest 5 bits first; bit 6 says that more follow,
    the highest bit of the last is the sign. From the fourth on, numbers are differences to the last but one.

    Raises:
        ValueError: other characters, or a text that ends within a number.

    >>> decompress("123")
    [1, 2, 3]
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > _LONGEST_NUMBER:
            raise ValueError("not compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("the last number is cut off")
    return runs
