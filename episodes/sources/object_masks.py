"""Masks of one object, drawn with any tool: which pixels of the picture are the object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from episodes.sources.errors import SourceError
from episodes.types import IGNORE, UInt8Array

_SOFT_LEVELS = 32  # more grey levels than this are a drawing's soft edges, not labels
_MAX_COLOUR_DIFFERENCE = 8  # between the channels of a grey picture that went through JPEG


def object_mask(picture: Image.Image, path: Path) -> UInt8Array:
    """The object that a picture marks: uint8 (H, W) of 0, 1 and 255 (ignore).

    - Black and white (values 0 and 255 alone): 255 is the object.
    - Labels (palette, or grey with at most 32 values): nonzero is the object, 255 is ignored, unless white
      covers more than all other labels together and the file has no palette.
    - Grey with soft edges (more values, as drawing tools and JPEG leave them): the object from 128 up.
    - Colour files pass when they are grey in truth.

    Args:
        picture: the mask.
        path: its file, for the error.

    Raises:
        SourceError: a coloured picture.
    """
    values = _levels(picture, path)
    present = np.unique(values[values > 0])
    if set(present.tolist()) <= {IGNORE}:
        return np.asarray(values == IGNORE, dtype=np.uint8)
    if picture.mode != "P" and set(present.tolist()) != {1, IGNORE} and _is_drawing(values, present):
        return np.asarray(values >= 128, dtype=np.uint8)
    mask: UInt8Array = (values > 0).astype(np.uint8)
    mask[values == IGNORE] = IGNORE
    return mask


def _levels(picture: Image.Image, path: Path) -> UInt8Array:
    if picture.mode in ("1", "LA"):
        return np.asarray(picture.convert("L"))
    if picture.mode in ("P", "L"):
        return np.asarray(picture)
    if picture.mode in ("RGB", "RGBA"):
        colours = np.asarray(picture.convert("RGB")).astype(np.int16)
        if int((colours.max(axis=2) - colours.min(axis=2)).max()) <= _MAX_COLOUR_DIFFERENCE:
            return np.asarray(picture.convert("L"))
    raise SourceError(
        path,
        "rgb-mask",
        f"mask is coloured (mode {picture.mode}), expected black and white or an index mask",
        "save it as a grey or palette PNG in which nonzero is the object",
    )


def _is_drawing(values: UInt8Array, present: UInt8Array) -> bool:
    white, between = int((values == IGNORE).sum()), int(((values > 0) & (values < IGNORE)).sum())
    return len(present) > _SOFT_LEVELS or white > between
