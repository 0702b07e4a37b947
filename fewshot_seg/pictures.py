"""Overlays, colour maps and labelled panels, as arrays; and picture files that are never half-written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from episodes.types import IGNORE, UInt8Array
from fewshot_seg.runtime import atomic_path

FloatArray = npt.NDArray[np.floating]
Colour = tuple[int, int, int]

# Two colours that people with any colour vision tell apart (Okabe and Ito), and that photos seldom show.
OBJECT: Colour = (230, 159, 0)
TRUTH: Colour = (86, 180, 233)
BACKGROUND: Colour = (204, 121, 167)
"""Tint of the known background of weakly marked supports."""
_IGNORED: Colour = (128, 128, 128)
_CLASSES: tuple[Colour, ...] = (
    OBJECT,
    TRUTH,
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    BACKGROUND,
)
"""Of the first classes, all of Okabe and Ito; the further ones have those of PASCAL VOC's palette."""

_BACKGROUND_ALPHA = 0.35
_UNKNOWN_SHADE = 0.4
_PANEL = 256
_GAP = 10
_LABEL = 22
_TITLE = 28


def colour_map(values: FloatArray) -> UInt8Array:
    """Viridis, a perceptually uniform map: float (H, W) in [0, 1] -> uint8 (H, W, 3), dark blue to yellow.

    >>> colour_map(np.array([[0.0, 1.0]])).tolist()
    [[[68, 1, 84], [253, 231, 37]]]
    """
    levels = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
    coloured = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1]  # OpenCV's order is blue, green, red
    return np.ascontiguousarray(coloured, dtype=np.uint8)


def overlay_mask(image: UInt8Array, mask: UInt8Array, colour: Colour = OBJECT, *, alpha: float = 0.45) -> UInt8Array:
    """The photo with the mask tinted and outlined; ignored pixels are greyed.

    Args:
        image: uint8 (H, W, 3).
        mask: uint8 (H, W), 1 = object, 255 = ignore.
        colour: of the object.
        alpha: strength of the tint in [0, 1].
    """
    painted = np.ascontiguousarray(image).copy()
    _tint(painted, np.asarray(mask == 1, np.uint8), colour, alpha)
    _tint(painted, np.asarray(mask == IGNORE, np.uint8), _IGNORED, alpha)
    _outline(painted, np.asarray(mask == 1, np.uint8), colour)
    return painted


def _tint(painted: UInt8Array, chosen: UInt8Array, tint: Colour, alpha: float) -> None:
    # A table of all 256 levels and OpenCV's masked copy: a photo is tinted for less than it costs to encode.
    table = np.round((1 - alpha) * np.arange(256, dtype=np.float32)[:, None] + alpha * np.array(tint, np.float32))
    if chosen.any():
        cv2.copyTo(cv2.LUT(painted, table.astype(np.uint8)[None]), chosen, painted)


def _outline(painted: UInt8Array, inside: UInt8Array, colour: Colour) -> None:
    thickness = max(1, round(max(inside.shape) / 200))
    kernel = np.ones((2 * thickness + 1, 2 * thickness + 1), np.uint8)
    painted[cv2.dilate(inside, kernel) > inside] = colour


def class_colour(number: int) -> Colour:
    """Colour of class `number`, 1 to 255: seven that people with any colour vision tell apart, then PASCAL VOC's.

    >>> class_colour(1), class_colour(8)
    ((230, 159, 0), (64, 0, 0))
    """
    if number <= len(_CLASSES):
        return _CLASSES[number - 1]
    red, green, blue = (
        sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
    )
    return red, green, blue


def overlay_classes(image: UInt8Array, labels: UInt8Array, names: Sequence[str], *, alpha: float = 0.45) -> UInt8Array:
    """The photo with every class tinted and outlined in its colour, and the names of those it shows, if of several.

    Args:
        image: uint8 (H, W, 3).
        labels: uint8 (H, W), 0 = background, n = class n.
        names: of all classes.
        alpha: strength of the tint in [0, 1].
    """
    painted = np.ascontiguousarray(image).copy()
    shown = [number for number in range(1, len(names) + 1) if (labels == number).any()]
    for number in shown:
        _tint(painted, np.asarray(labels == number, np.uint8), class_colour(number), alpha)
    for number in shown:
        _outline(painted, np.asarray(labels == number, np.uint8), class_colour(number))
    if len(names) == 1 or not shown:
        return painted
    return _with_legend(painted, [(names[number - 1], class_colour(number)) for number in shown])


def _with_legend(picture: UInt8Array, entries: Sequence[tuple[str, Colour]]) -> UInt8Array:
    """Names beside their colours on a light ground, in the top left corner."""
    size = max(10, round(max(picture.shape[:2]) / 40))
    drawn, line, margin = Image.fromarray(picture), round(1.4 * size), size // 2
    font = ImageFont.load_default(size)
    ink = ImageDraw.Draw(drawn)
    width = round(max(ink.textlength(name, font=font) for name, _ in entries)) + line + 3 * margin
    ink.rectangle((0, 0, width, len(entries) * line + margin), fill=(245, 245, 245))
    for row, (name, colour) in enumerate(entries):
        top = margin + row * line
        ink.rectangle((margin, top, margin + size, top + size), fill=colour)
        _text(ink, (2 * margin + size, top - size // 8), name, size, picture.shape[1])
    return np.array(drawn)


def overlay_annotation(image: UInt8Array, annotation: UInt8Array) -> UInt8Array:
    """The photo with a weak annotation: object tinted and outlined, known background tinted, the unknown darkened.

    Args:
        image: uint8 (H, W, 3).
        annotation: uint8 (H, W), 1 = known object, 0 = known background, 255 = not known.
    """
    shown = image.astype(np.float32)
    shown[annotation == IGNORE] *= _UNKNOWN_SHADE
    background = annotation == 0
    tint = np.array(BACKGROUND, np.float32)
    shown[background] = (1 - _BACKGROUND_ALPHA) * shown[background] + _BACKGROUND_ALPHA * tint
    return overlay_mask(np.round(shown).astype(np.uint8), (annotation == 1).astype(np.uint8))


def overlay_map(image: UInt8Array, values: FloatArray, *, alpha: float = 0.65) -> UInt8Array:
    """A map float (H, W) in [0, 1] in viridis over the grey photo, uint8 (H, W, 3)."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    blended = (1 - alpha) * grey[..., None] + alpha * colour_map(values).astype(np.float32)
    return np.asarray(np.round(blended), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A picture uint8 (H, W, 3), the line under it, and whether a viridis scale (low to high) goes with it."""

    picture: UInt8Array
    label: str
    scale: bool = False


def panel_sheet(rows: Sequence[Sequence[Panel]], title: str, *, scale: float = 1) -> UInt8Array:
    """Labelled panels in rows under a title, uint8 (H, W, 3). Pictures keep their proportions.

    Args:
        rows: the panels.
        title: above them.
        scale: 1 is 256 pixels a panel, for the screen; 3 prints well.
    """
    panel, gap, label, above = (round(scale * one) for one in (_PANEL, _GAP, _LABEL, _TITLE))
    columns = max(len(row) for row in rows)
    width = columns * (panel + gap) + gap
    height = above + gap + len(rows) * (panel + label + gap)
    sheet = Image.new("RGB", (width, height), "white")
    ink = ImageDraw.Draw(sheet)
    _text(ink, (gap, round(6 * scale)), title, round(18 * scale), width - 2 * gap)
    for number, row in enumerate(rows):
        top = above + gap + number * (panel + label + gap)
        for column, one in enumerate(row):
            _draw_panel(sheet, ink, one, gap + column * (panel + gap), top, scale)
    return np.asarray(sheet)


def _draw_panel(sheet: Image.Image, ink: ImageDraw.ImageDraw, panel: Panel, left: int, top: int, scale: float) -> None:
    side = round(scale * _PANEL)
    picture = Image.fromarray(panel.picture)
    factor = side / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    picture = picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC)
    sheet.paste(picture, (left + (side - size[0]) // 2, top + (side - size[1]) // 2))
    room = side
    if panel.scale:
        room -= round(80 * scale)
        strip = colour_map(np.linspace(0, 1, round(72 * scale))[None].repeat(round(10 * scale), axis=0))
        sheet.paste(Image.fromarray(strip), (left + side - strip.shape[1], top + side + round(8 * scale)))
    _text(ink, (left, top + side + round(4 * scale)), panel.label, round(14 * scale), room)


def _text(ink: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, room: int) -> None:
    font = ImageFont.load_default(size)
    while ink.textlength(text, font=font) > room and len(text) > 4:
        text = text[:-4] + "..."
    ink.text(place, text, fill=(20, 20, 20), font=font)


def write_picture(path: Path, picture: UInt8Array) -> None:
    """Write uint8 (H, W, 3) as PNG or JPEG by suffix, beside and renamed."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, quality=90)


def write_mask(path: Path, mask: UInt8Array, classes: int = 1) -> None:
    """Write a mask uint8 (H, W) of 0 to `classes` as an index PNG (mode P) whose palette makes it visible."""
    indexed = Image.fromarray(mask)
    indexed.putpalette(bytes([0, 0, 0] + [level for number in range(classes) for level in class_colour(number + 1)]))
    with atomic_path(path) as temporary:
        indexed.save(temporary)


def write_grey(path: Path, values: UInt8Array) -> None:
    """Write uint8 (H, W) as a grey PNG, beside and renamed."""
    with atomic_path(path) as temporary:
        Image.fromarray(values).save(temporary)
