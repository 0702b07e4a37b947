"""Label maps: one class id per pixel, 0 for background and 255 for ignore, and the files that hold them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from episodes.sources.decoding import opened, upright_size
from episodes.sources.errors import SourceError
from episodes.types import IGNORE, UInt8Array

_COLOUR_MODES = ("RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")


def read_label_map(path: Path) -> UInt8Array:
    """Labels of a palette or grey PNG with 8 bits: uint8 (H, W), its values as they are.

    Raises:
        SourceError: missing, damaged or colour-coded file.
    """
    with opened(path, "mask") as picture:
        if picture.mode in _COLOUR_MODES:
            raise SourceError(
                path,
                "rgb-mask",
                f"mask is colour-coded ({picture.mode}), expected a palette or grey PNG of class ids",
                "convert it: map each colour to its class id and save as mode P or L",
            )
        if picture.mode not in ("P", "L"):
            raise SourceError(
                path,
                "undecodable",
                f"mask has mode {picture.mode}, expected P or L with 8 bits",
                "save it as mode L",
            )
        if any(str(tile.args).startswith(("L;2", "L;4")) for tile in getattr(picture, "tile", ())):
            # Pillow spreads these levels over 0..255: what was class 3 would be read as 255
            raise SourceError(path, "undecodable", "mask is grey with fewer than 8 bits", "save it as mode L")
        return np.asarray(picture)


def one_class(labels: UInt8Array, class_id: int) -> UInt8Array:
    """uint8 (H, W): 1 where the label is `class_id`, 255 where it is 255, 0 elsewhere.

    >>> one_class(np.array([[0, 7, 9, 255]], dtype=np.uint8), 7)
    array([[  0,   1,   0, 255]], dtype=uint8)
    """
    result: UInt8Array = (labels == class_id).astype(np.uint8)
    result[labels == IGNORE] = IGNORE
    return result


def label_areas(labels: UInt8Array, known: Collection[int], path: Path, expected: str, mend: str) -> dict[int, int]:
    """Label -> pixels, ascending, without 0 and 255.

    Raises:
        SourceError: a label that is not `known`; `path`, `expected` and `mend` go into its text.
    """
    counts = np.bincount(labels.ravel(), minlength=256)
    present = [int(label) for label in np.flatnonzero(counts) if label not in (0, IGNORE)]
    unknown = [label for label in present if label not in known]
    if unknown:
        found = ", ".join(map(str, unknown[:5]))
        raise SourceError(path, "unknown-label", f"expected {expected}, found {found}", mend)
    return {label: int(counts[label]) for label in present}


def photo_size(path: Path, *, upright: bool = False) -> tuple[int, int]:
    """Width and height from the head of a photo; `upright` applies the orientation that its EXIF data asks for."""
    with opened(path, "photo") as picture:
        if not upright:
            return picture.size
        height, width = upright_size(picture)
        return width, height


def check_size(mask: UInt8Array, mask_path: Path, photo_path: Path, size: tuple[int, int]) -> None:
    """Raises SourceError when a mask is not of its photo's `size` (width, height)."""
    width, height = size
    if mask.shape != (height, width):
        raise SourceError(
            mask_path,
            "size-mismatch",
            f"mask is {mask.shape[1]}x{mask.shape[0]}, photo {photo_path.name} is {width}x{height} pixels",
            "resize one to the other (nearest neighbour for the mask) or drop the id from the split",
        )
