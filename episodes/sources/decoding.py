"""Pictures from files: one error for whatever can be wrong with them, one rule for odd colour modes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from episodes.sources.errors import SourceError
from episodes.types import UInt8Array

# What Pillow's decoders raise on damaged files, by experience: each plugin has its own habits.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_ORIENTATION = 0x0112  # EXIF
_SIDEWAYS = range(5, 9)  # orientations that swap width and height
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def missing_file(path: Path) -> SourceError:
    """The error of a file that is not there."""
    return SourceError(path, "missing", "no such file", "put it there or drop its id from the split's list")


@contextmanager
def opened(path: Path, what: str) -> Iterator[Image.Image]:
    """An open picture; whatever goes wrong in the block while decoding it becomes a `SourceError`."""
    try:
        with Image.open(path) as picture:
            yield picture
    except SourceError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise missing_file(path) from None
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            path, "undecodable", f"{what} cannot be decoded ({reason})", "fetch or save the file again"
        ) from None


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(height, width) once EXIF orientation is applied, from the file's head."""
    width, height = picture.size
    return (width, height) if picture.getexif().get(_ORIENTATION) in _SIDEWAYS else (height, width)


def rgb(picture: Image.Image) -> UInt8Array:
    """uint8 (H, W, 3) of any picture: more than 8 bits are scaled, transparency lies on white."""
    if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow's own conversion would clip, not scale
        return np.repeat(_eight_bits(np.asarray(picture))[..., None], 3, axis=2)
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return np.array(picture.convert("RGB"))


def _eight_bits(values: npt.NDArray[Any]) -> UInt8Array:
    """Grey of any depth, scaled by what its largest value says of the depth: 1.0, 8 bits, 16 bits, or that value."""
    levels = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    highest = float(levels.max(initial=0))
    fraction = values.dtype.kind == "f" and highest <= 1
    white = 1.0 if fraction else next((one for one in (255.0, 65535.0) if highest <= one), highest)
    return np.clip(np.round(levels / (white / 255)), 0, 255).astype(np.uint8)
