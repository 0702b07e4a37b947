"""Several frozen backbones side by side on the same photo: their levels together, as those of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.backbones.frozen import Backbone
from fewshot_seg.backbones.levels import Grid, LevelEncoder


class JointEncoder(LevelEncoder):
    """Encoders side by side; levels by stride, finest first, members in their order within a stride.

    Args:
        members: the backbones; each normalises, and enlarges if need be, for itself.
        mean, std: what the images that it is given were normalised by.
    """

    def __init__(self, members: Sequence[Backbone], *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._members = nn.ModuleList(members)
        self._mean, self._std = tuple(mean), tuple(std)
        places = [
            (stride, number, level) for number, one in enumerate(members) for level, stride in enumerate(one.strides)
        ]
        self._order = [(number, level) for _, number, level in sorted(places)]
        self.strides = tuple(members[number].strides[level] for number, level in self._order)
        self.channels = tuple(members[number].channels[level] for number, level in self._order)
        self.multiple = math.lcm(*(one.multiple for one in members))
        self.plan = tuple(one.strides for one in members)

    @property
    def members(self) -> tuple[Backbone, ...]:
        """The backbones, in their order."""
        return tuple(one for one in self._members if isinstance(one, Backbone))

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """Size of every level for photos of this size, as its member makes it."""
        of_each = [one.grids(height, width) for one in self.members]
        return tuple(of_each[number][level] for number, level in self._order)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised float (B, 3, H, W) -> one float (B, C, h, w) per level."""
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self._mean, self._std))
        photos = images * std + mean
        of_each = [one.levels(photos) for one in self.members]
        return [of_each[number][level] for number, level in self._order]


def join_backbones(members: Sequence[Backbone]) -> Backbone:
    """One backbone of several; its name is theirs, joined by ``+``.

    `join_levels` gives every level the same weight, so a member speaks as loudly as it has levels.

    Raises:
        DataError: fewer than two members, or the same one twice.
    """
    names = [one.name for one in members]
    if len(members) < 2 or len(set(names)) != len(names):
        raise DataError(f"a joint backbone needs two or more different members, got {'+'.join(names) or 'none'}")
    mean = [fmean(of_all) for of_all in zip(*(one.mean for one in members), strict=True)]
    std = [fmean(of_all) for of_all in zip(*(one.std for one in members), strict=True)]
    encoder = JointEncoder(members, mean=mean, std=std)
    return Backbone(encoder, name="+".join(names), strides=encoder.strides, mean=mean, std=std)
