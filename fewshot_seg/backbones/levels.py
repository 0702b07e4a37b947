"""What the backbone asks of an encoder that is no pyramid of stages, and sizes that an encoder can cut into cells."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
"""Height and width of a map, in cells."""

Plan = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Strides as `build_backbone` takes them: of one encoder, or of every member of a joint one."""


class LevelEncoder(nn.Module):
    """An encoder that returns the levels it was made for, of photos of any size.

    Attributes:
        strides: of the levels, not descending.
        channels: of the levels.
        multiple: sides that are multiples of it are cut into cells as they are; others are enlarged inside.
        plan: the strides as `build_backbone` takes them.
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]
    multiple: int
    plan: Plan

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """Size of every level for photos of this size."""
        return grids_of(height, width, strides=self.strides, multiple=self.multiple)


def grids_of(height: int, width: int, *, strides: tuple[int, ...], multiple: int) -> tuple[Grid, ...]:
    """ceil(H'/s), ceil(W'/s) per stride s, where H' and W' are the sides rounded up to a multiple.

    >>> grids_of(100, 75, strides=(16, 32), multiple=1), grids_of(100, 75, strides=(14,), multiple=14)
    (((7, 5), (4, 3)), ((8, 6),))
    """
    tall, wide = -(-height // multiple) * multiple, -(-width // multiple) * multiple
    return tuple((-(-tall // stride), -(-wide // stride)) for stride in strides)


def enlarge_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images float (B, C, H, W), stretched to the next multiple; as they are where both sides are multiples.

    Stretching, not padding: the cells of every level then cover the photo and nothing else, and a transformer sees no
    border that is not in the photo. It only enlarges, so that nothing can alias.
    """
    height, width = images.shape[2:]
    if multiple == 1 or (height % multiple == 0 and width % multiple == 0):
        return images
    size = [-(-height // multiple) * multiple, -(-width // multiple) * multiple]
    return F.interpolate(images, size, mode="bilinear", align_corners=False)
