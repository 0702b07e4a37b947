"""Large photos in overlapping tiles: where they lie, and how their maps become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_OVERLAP = 0.25
"""Of neighbours, at least, by the side of a tile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A part of a photo, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Rows of the photo."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Columns of the photo."""
        return slice(self.left, self.left + self.width)


def cut_tiles(shape: tuple[int, int], side: int) -> tuple[Tile, ...]:
    """Tiles that cover a photo, evenly spaced, row after row; neighbours overlap by a quarter or more.

    All have `side` pixels in height and width, or the photo's where it has fewer. A photo that is no larger than one
    tile has none: it is looked at as a whole anyway.

    Args:
        shape: (H, W) of the photo.
        side: at least 1.

    Example:
        >>> [(tile.top, tile.left) for tile in cut_tiles((100, 150), 100)]
        [(0, 0), (0, 50)]
    """
    if max(shape) <= side:
        return ()
    tops, lefts = (_starts(length, side) for length in shape)
    height, width = (min(length, side) for length in shape)
    return tuple(Tile(top=top, left=left, height=height, width=width) for top in tops for left in lefts)


def _starts(length: int, side: int) -> list[int]:
    room = length - side
    if room <= 0:
        return [0]
    step = max(1, int(side * (1 - _OVERLAP)))
    steps = -(-room // step)
    return [round(number * room / steps) for number in range(steps + 1)]


def blend_tiles(maps: Iterable[Tensor], tiles: Sequence[Tile], shape: tuple[int, int]) -> Tensor:
    """One map of overlapping ones: their mean, in which a tile counts the less the nearer its border is.

    A pixel's weight is the product of its distances in rows and in columns to the nearest outside of its tile. So there
    are no seams, and where all tiles say the same the blend says it, too.

    Args:
        maps: float (h, w) of each tile, at its size; read one at a time.
        tiles: of `cut_tiles`, covering the photo.
        shape: (H, W) of the photo.

    Returns:
        float (H, W).
    """
    first = tiles[0]
    weight = _distances(first.height)[:, None] * _distances(first.width)
    total, weights = torch.zeros(shape), torch.zeros(shape)
    for tile, values in zip(tiles, maps, strict=True):
        total[tile.rows, tile.columns] += values * weight
        weights[tile.rows, tile.columns] += weight
    return total.div_(weights)


def _distances(length: int) -> Tensor:
    """float (length,): of each pixel to the nearest outside, 1 at both ends."""
    ascending = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(ascending, ascending.flip(0))
