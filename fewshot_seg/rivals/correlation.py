"""HSNet (Min et al., ICCV 2021, arXiv 2104.01538): 4D correlations of every level, squeezed to a mask.

As the paper and its code have it: cosines of every query cell with every support cell, support features masked, ReLU;
squeezing blocks of three centre-pivot 4D convolutions (group normalisation, ReLU) per level, which stride over the
support's dimensions until about 2 x 2 are left; mixing blocks from coarse to fine; mean over what is left of the
support; a 2D decoder that doubles the grid. K shots: one mask a support, by vote.

Other than there, for the CPU: 8, 32 and 64 channels instead of 16, 64 and 128; the levels that are stored (two with the
default backbone) instead of three, and one correlation map a level (the last layer of each stage) instead of three to
six. The convolutions are 4D, and with the default backbone no grid is reduced; the support's grid is pooled to at most
26 x 26 where it is finer. One logit for the two of a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.protocols import ShotRule
from episodes.types import DataError
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.rivals.model import EpisodeModel, support_weights

SUPPORT_SIDE = 26
"""Largest side of a support's grid in a correlation."""

_GROUPS = 4


def masked_correlation(query: Tensor, support: Tensor, foreground: Tensor) -> Tensor:
    """ReLU of the cosine of every query cell with every masked support cell (eq. 1).

    Args:
        query: float (N, C, h, w).
        support: float (N, C, a, b).
        foreground: float (N, a, b), fraction of each support cell that is object; cells without object give 0.

    Returns:
        float (N, h, w, a, b) in [0, 1].
    """
    # The cosine does not change with the fraction; 1e-5 as in the code.
    masked = support * foreground[:, None]
    masked = masked / (masked.norm(dim=1, keepdim=True) + 1e-5)
    unit = query / (query.norm(dim=1, keepdim=True) + 1e-5)
    return torch.einsum("nchw,ncab->nhwab", unit, masked).relu()


class CentrePivotConvolution(nn.Module):
    """4D convolution whose kernel is zero but where one of its two halves is at its centre (eq. 3 and 4).

    That makes it the sum of a 2D convolution over the query's dimensions and one over the support's. The stride is
    the support's.

    Args:
        inputs, outputs: channels.
        kernel: odd side of the kernel in all four dimensions.
        stride: over the support's dimensions.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.over_query = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.over_support = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2)

    def forward(self, tensor: Tensor) -> Tensor:
        """float (N, inputs, h, w, a, b) -> (N, outputs, h, w, ceil(a / stride), ceil(b / stride))."""
        pivots = tensor[..., :: self.stride, :: self.stride]
        return _over_last(self.over_support, tensor) + _query_last(_over_last(self.over_query, _query_last(pivots)))


def _query_last(tensor: Tensor) -> Tensor:
    """The two pairs of dimensions change places."""
    return tensor.permute(0, 1, 4, 5, 2, 3)


def _over_last(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A 2D layer over the last two of six dimensions."""
    count, channels, height, width, *last = tensor.shape
    maps = layer(tensor.permute(0, 2, 3, 1, 4, 5).reshape(count * height * width, channels, *last))
    return maps.reshape(count, height, width, *maps.shape[1:]).permute(0, 3, 1, 2, 4, 5)  # type: ignore[no-any-return]


def squeezing_steps(side: int) -> tuple[tuple[int, int], ...]:
    """(kernel, stride) of a squeezing block's three convolutions, by the side of the support's grid.

    The code's own for ResNet at 400 pixels, whose sides are 13, 25 and 50: all three end at 2.
    """
    if side <= 16:
        return ((3, 2), (3, 2), (3, 2))
    return ((5, 4), (3, 2), (3, 2)) if side <= 32 else ((5, 4), (5, 4), (3, 2))


class CorrelationNetwork(EpisodeModel):
    """HSNet-style squeezing of multi-level correlations.

    Args:
        sides: of the levels' square grids, finest first.
        widths: channels after each of the three convolutions of a block, multiples of 4.
        seed: of the initial values; the global random state is left alone.

    Raises:
        DataError: no level, or widths that are not three multiples of 4.
    """

    shot_rule: ShotRule = "vote"

    def __init__(self, sides: Sequence[int], *, widths: tuple[int, int, int] = (8, 32, 64), seed: int = 0) -> None:
        super().__init__()
        if not sides:
            raise DataError("correlations need at least one level")
        if len(widths) != 3 or any(width < _GROUPS or width % _GROUPS for width in widths):
            raise DataError(f"widths must be three multiples of {_GROUPS}, got {tuple(widths)}")
        self.sides, self.widths = tuple(min(side, SUPPORT_SIDE) for side in sides), tuple(widths)
        _, middle, last = widths
        mixing = ((3, 1), (3, 1), (3, 1))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
            self.squeeze = nn.ModuleList(_block(1, widths, squeezing_steps(side)) for side in self.sides)
            self.mix = nn.ModuleList(_block(last, (last, last, last), mixing) for _ in self.sides[1:])
            self.decode = nn.Sequential(_layer(last, last), nn.ReLU(), _layer(last, middle), nn.ReLU())
            self.exit = nn.Sequential(_layer(middle, middle), nn.ReLU(), _layer(middle, 1))

    def description(self) -> dict[str, Any]:
        """See `EpisodeModel.description`."""
        return {"support_sides": self.sides, "widths": self.widths}

    def forward(self, batch: FeatureBatch) -> Tensor:
        """See `EpisodeModel.forward`; one map a support, on twice the finest grid.

        Raises also:
            DataError: another number of levels than the network was built for.
        """
        if len(batch.query_levels) != len(self.sides):
            raise DataError(f"the network reads {len(self.sides)} levels, the features have {len(batch.query_levels)}")
        shots = batch.support_masks.shape[1]
        mixed: Tensor | None = None
        for number in reversed(range(len(self.sides))):
            correlation = self._correlation(batch, number, shots)
            squeezed = self.squeeze[number](correlation[:, None])
            mixed = squeezed if mixed is None else self.mix[number](_added(mixed, squeezed))
        assert mixed is not None
        decoded = self.decode(mixed.mean(dim=(4, 5)))
        doubled = F.interpolate(decoded, scale_factor=2, mode="bilinear", align_corners=True)
        logits: Tensor = self.exit(doubled)
        return logits.reshape(-1, shots, *logits.shape[2:])

    def _correlation(self, batch: FeatureBatch, number: int, shots: int) -> Tensor:
        """float (B*K, h, w, a, b) of a level."""
        query, support = batch.query_levels[number], batch.support_levels[number]
        size = (support.shape[2], support.shape[3])
        weights = support_weights(batch, size)[0].flatten(0, 1)
        if max(size) > SUPPORT_SIDE:
            size = (min(size[0], SUPPORT_SIDE), min(size[1], SUPPORT_SIDE))
            support = F.adaptive_avg_pool2d(support * weights[:, None], size)  # the object's cells only
            weights = F.adaptive_avg_pool2d(weights[:, None], size)[:, 0]
        return masked_correlation(query.repeat_interleave(shots, dim=0), support, weights)


def _added(coarse: Tensor, fine: Tensor) -> Tensor:
    """The coarser level's query grid enlarged to the finer one's, plus the finer; supports of one size, the smaller."""
    left = tuple(min(coarse.shape[axis], fine.shape[axis]) for axis in (4, 5))
    coarse, fine = (_pooled_support(one, left) for one in (coarse, fine))
    enlarge = nn.Upsample(size=tuple(fine.shape[2:4]), mode="bilinear", align_corners=True)
    return fine + _query_last(_over_last(enlarge, _query_last(coarse)))


def _pooled_support(tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape[4:]) == size:
        return tensor
    return _over_last(nn.AdaptiveAvgPool2d(size), tensor)


def _block(inputs: int, widths: Sequence[int], steps: Sequence[tuple[int, int]]) -> nn.Sequential:
    layers = list[nn.Module]()
    for width, (kernel, stride) in zip(widths, steps, strict=True):
        layers += [CentrePivotConvolution(inputs, width, kernel, stride), nn.GroupNorm(_GROUPS, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def _layer(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
