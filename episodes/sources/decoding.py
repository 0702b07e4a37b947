"""Pictures from files: one error for whatever can be wrong with them, one rule for odd colour modes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
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
    """uint8 (H, W, 3) of any picture: 16 bits are scaled, transparency lies on white."""
    if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip, not scale
        values = np.asarray(picture).astype(np.float64)
        grey = values / 257 if values.max(initial=0) > 255 else values
        return np.repeat(np.clip(np.round(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return np.array(picture.convert("RGB"))
