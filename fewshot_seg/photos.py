"""People's own files: photos in any orientation and colour mode, and masks drawn with any tool."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from episodes.sources.decoding import rgb
from episodes.types import IGNORE, DataError, UInt8Array

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})

_SOFT_LEVELS = 32  # more grey levels than this are a drawing's soft edges, not labels
_MAX_COLOUR_DIFFERENCE = 8  # between the channels of a grey picture that went through JPEG


def _open(path: Path, what: str) -> Image.Image:
    """The decoded picture, upright. Raises DataError naming the file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a {what}")
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow's decoders each raise their own on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: {what} cannot be decoded ({reason}); save it again as JPEG or PNG") from error


def read_photo(path: Path) -> UInt8Array:
    """A photo as people see it: uint8 (H, W, 3), EXIF orientation applied, transparency on white.

    Grey, palette, CMYK and 16-bit pictures are converted.

    Raises:
        DataError: missing or undecodable file.
    """
    return rgb(_open(path, "photo"))


def read_object_mask(path: Path) -> UInt8Array:
    """A mask that marks one object: uint8 (H, W) of 0, 1 and 255 (ignore).

    - Black and white (values 0 and 255 alone): 255 is the object.
    - Labels (palette, or grey with at most 32 values): nonzero is the object, 255 is ignored, unless white
      covers more than all other labels together and the file has no palette.
    - Grey with soft edges (more values, as drawing tools and JPEG leave them): the object from 128 up.
    - Colour files pass when they are grey in truth.

    Raises:
        DataError: missing, undecodable or coloured file.
    """
    picture = _open(path, "mask")
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
    raise DataError(
        f"{path}: mask is coloured (mode {picture.mode}), expected black and white or an index mask; save it as a "
        "grey or palette PNG in which nonzero is the object"
    )


def _is_drawing(values: UInt8Array, present: UInt8Array) -> bool:
    white, between = int((values == IGNORE).sum()), int(((values > 0) & (values < IGNORE)).sum())
    return len(present) > _SOFT_LEVELS or white > between


def read_support(pair: str) -> tuple[UInt8Array, UInt8Array]:
    """Photo and mask of a ``PHOTO:MASK`` pair.

    Raises:
        DataError: not a pair, a missing or broken file, two sizes, or a mask without the object.
    """
    photo_path, mask_path = _split_pair(pair)
    photo, mask = read_photo(photo_path), read_object_mask(mask_path)
    if photo.shape[:2] != mask.shape:
        raise DataError(
            f"{mask_path}: mask is {mask.shape[1]}x{mask.shape[0]}, photo {photo_path.name} is "
            f"{photo.shape[1]}x{photo.shape[0]} pixels (upright); draw the mask at the photo's size"
        )
    if not (mask == 1).any():
        raise DataError(f"{mask_path}: mask shows no object; mark the object with a value other than 0 (black)")
    return photo, mask


def _split_pair(pair: str) -> tuple[Path, Path]:
    places = [place for place, letter in enumerate(pair) if letter == ":"]
    candidates = [(Path(pair[:place]).expanduser(), Path(pair[place + 1 :]).expanduser()) for place in places]
    for photo, mask in candidates:  # file names may hold colons themselves, as Windows drives do
        if photo.is_file() and mask.is_file():
            return photo, mask
    if not candidates or not pair[places[-1] + 1 :] or not pair[: places[-1]]:
        raise DataError(f"--support {pair!r}: expected PHOTO:MASK, for example dog.jpg:dog_mask.png")
    return candidates[-1]


def find_queries(queries: Sequence[str]) -> list[Path]:
    """Photos of files, folders (not their subfolders) and globs, each once, in order.

    Raises:
        DataError: a name that stands for nothing, or no photo at all.
    """
    found: dict[Path, None] = {}
    for query in queries:
        path = Path(query).expanduser()
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in PHOTO_SUFFIXES and f.is_file())
            if not files:
                raise DataError(f"--query {query}: folder holds no photos ({', '.join(sorted(PHOTO_SUFFIXES))})")
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207 - Path.glob refuses absolute patterns
            if not files:
                raise DataError(f"--query {query}: no such file, folder or match; check the path")
        found.update(dict.fromkeys(files))
    return list(found)


def output_names(paths: Sequence[Path]) -> list[str]:
    """A file name without suffix for every path: its stem, made unique also for file systems that ignore case.

    >>> output_names([Path("a.jpg"), Path("b.jpg"), Path("b.png"), Path("x/b.png")])
    ['a', 'b_jpg', 'b_png', 'b_png-2']
    """
    counts = Counter(path.stem.lower() for path in paths)
    taken: set[str] = {stem for stem, count in counts.items() if count == 1}
    names = []
    for path in paths:
        if counts[path.stem.lower()] == 1:
            names.append(path.stem)
            continue
        base = f"{path.stem}_{path.suffix.lstrip('.').lower()}"
        name, number = base, 1
        while name.lower() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names
