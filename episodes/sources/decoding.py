"""Pictures from files: one error for whatever can be wrong with them, one rule for odd colour modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from episodes.files import require_file
from episodes.sources.errors import SourceError
from episodes.types import DataError, UInt8Array

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")
"""What is decoded, by content, whatever the file is called. Pillow knows fifty more, and for one of them, EPS, it
starts another program on what is in the file."""

_ORIENTATION = 0x0112  # EXIF
_SIDEWAYS = range(5, 9)  # orientations that swap width and height
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def missing_file(path: Path) -> SourceError:
    """The error of a file that is not there."""
    return SourceError(path, "missing", "no such file", "put it there or drop its id from the split's list")


def open_picture(file: Path | IO[bytes]) -> Image.Image:
    """`PIL.Image.open` for the formats of photos and masks alone, and of regular files alone.

    Raises:
        Exception: whatever Pillow's decoders raise on damaged files, each its own; a `DecompressionBombError` for more
            than twice `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(file, Path):
        require_file(file)
    return Image.open(file, formats=FORMATS)


def reason_of(error: BaseException) -> str:
    """What an error of a decoder says, in one line of sensible length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def opened(path: Path, what: str) -> Iterator[Image.Image]:
    """An open picture; whatever goes wrong in the block while decoding it becomes a `SourceError`."""
    try:
        with open_picture(path) as picture:
            yield picture
    except DataError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise missing_file(path) from None
    except Exception as error:  # Pillow's decoders each raise their own on damaged files
        raise SourceError(
            path, "undecodable", f"{what} cannot be decoded ({reason_of(error)})", "fetch or save the file again"
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
