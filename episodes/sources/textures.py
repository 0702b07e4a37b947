"""Texture families of the synthetic source: scalar fields in [0, 1] that mix a class's two colours."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image

from episodes.types import UInt8Array

Field = npt.NDArray[np.float32]
Texture = Callable[[Field, Field, np.random.Generator], Field]
"""(u, v, random) -> values in [0, 1]; u and v are shape coordinates, about -1..1 over the object."""


def _soft_sign(wave: Field) -> Field:
    """A sine made nearly two-valued, with smooth flanks so that thin stripes do not alias."""
    return np.asarray(np.clip(0.5 + 1.6 * wave, 0, 1), dtype=np.float32)


def _stripes(u: Field, v: Field, random: np.random.Generator) -> Field:
    del v
    return _soft_sign(np.sin(np.pi * 4.0 * random.uniform(0.85, 1.15) * u + random.uniform(0, 6.28)))


def _checker(u: Field, v: Field, random: np.random.Generator) -> Field:
    k = np.pi * 3.2 * random.uniform(0.85, 1.15)
    return _soft_sign(2.0 * np.sin(k * u) * np.sin(k * v))


def _dots(u: Field, v: Field, random: np.random.Generator) -> Field:
    k = np.pi * 3.4 * random.uniform(0.85, 1.15)
    return np.asarray(np.clip(2.2 * (np.cos(k * u) + np.cos(k * v)) - 1.4, 0, 1), dtype=np.float32)


def _marble(u: Field, v: Field, random: np.random.Generator) -> Field:
    field = np.zeros_like(u)
    for octave in (2.5, 4.5, 8.0):
        angle, phase = random.uniform(0, 6.28, 2)
        field = field + np.sin(octave * (np.cos(angle) * u + np.sin(angle) * v) + phase + 1.5 * field)
    return np.asarray(0.5 + 0.5 * np.sin(2.5 * field), dtype=np.float32)


def _rings(u: Field, v: Field, random: np.random.Generator) -> Field:
    return _soft_sign(np.sin(np.pi * 6.0 * random.uniform(0.85, 1.15) * np.hypot(u, v)))


def _zigzag(u: Field, v: Field, random: np.random.Generator) -> Field:
    bend = np.abs(np.mod(2.2 * v + random.uniform(0, 1), 1.0) - 0.5)
    return _soft_sign(np.sin(np.pi * 4.6 * (u + 0.9 * bend)))


TEXTURES: Mapping[str, Texture] = MappingProxyType(
    {
        "striped": _stripes,
        "dotted": _dots,
        "checkered": _checker,
        "marbled": _marble,
        "ringed": _rings,
        "zigzag": _zigzag,
    }
)
"""Name -> texture. Order matters: classes are numbered by it."""


def colour(hue: float, saturation: float, value: float) -> npt.NDArray[np.float32]:
    """RGB in [0, 255], float32 (3,), from hue (any real, period 1), saturation and value in [0, 1]."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32)


def cloth(size: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """A cluttered background: soft colour clouds, a faint weave, grain. float32 (size, size, 3) in 0..255."""
    hue = random.uniform()
    picture = np.zeros((size, size, 3), dtype=np.float32)
    for cells, weight in ((4, 0.6), (11, 0.4)):
        hues = hue + random.normal(0, 0.12, cells * cells)
        saturations = random.uniform(0.05, 0.5, cells * cells)
        values = random.uniform(0.25, 0.95, cells * cells)
        looks = zip(hues.tolist(), saturations.tolist(), values.tolist(), strict=True)
        grid = np.stack([colour(*look) for look in looks])
        small: UInt8Array = grid.reshape(cells, cells, 3).astype(np.uint8)
        picture += weight * np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle, count = random.uniform(0, np.pi), random.uniform(8, 26)
    along = np.float32(np.cos(angle)) * axis[None, :] + np.float32(np.sin(angle)) * axis[:, None]
    weave = np.sin(np.float32(count) * along)
    grain = 5 * random.standard_normal((size, size), dtype=np.float32)
    picture += (np.float32(random.uniform(0, 14)) * weave + grain)[..., None]
    return picture
