"""The similarity network: frozen features of several levels -> one map of unit-length cell embeddings.

Levels are L2-normalised per cell and joined, so that every level speaks equally loudly whatever its channels and
scale; a residual projection of low rank, trained with a metric loss on base classes, turns the joint embedding.
It starts as the identity: untrained, the network *is* the frozen features. The rank is small on purpose: with
fifteen base classes a full projection overfits to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError


def cell_weights(masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Fraction of every feature cell that is foreground, and that is background; ignored area is in neither.

    Args:
        masks: uint8 (N, H, W), 1 = foreground, 0 = background, 255 = ignore.
        size: (h, w) of the feature grid.

    Returns:
        Two float32 (N, h, w) in [0, 1].

    Example:
        >>> foreground, background = cell_weights(torch.tensor([[[1, 1], [0, 255]]], dtype=torch.uint8), (1, 1))
        >>> foreground.item(), background.item()
        (0.5, 0.25)
    """
    foreground = F.adaptive_avg_pool2d((masks == 1).float()[:, None], size)[:, 0]
    background = F.adaptive_avg_pool2d((masks == 0).float()[:, None], size)[:, 0]
    return foreground, background


def masked_average_pool(maps: Tensor, weights: Tensor) -> Tensor:
    """Mean of the cells, weighted (Zhang et al., SG-One, arXiv 1810.09091, eq. 2). (N, C, h, w), (N, h, w) -> (N, C).

    All-zero weights give the zero vector.
    """
    total = weights.sum(dim=(1, 2))[:, None]
    return torch.einsum("nchw,nhw->nc", maps, weights) / total.clamp_min(1e-6)


def join_levels(levels: Sequence[Tensor]) -> Tensor:
    """Levels at the first (finest) level's grid, each L2-normalised per cell, joined to unit length.

    Args:
        levels: float (N, C_l, h_l, w_l), finest first.

    Returns:
        float (N, sum C_l, h_0, w_0).
    """
    grid = levels[0].shape[-2:]
    resized = [
        level if level.shape[-2:] == grid else F.interpolate(level, grid, mode="bilinear", align_corners=False)
        for level in levels
    ]
    return torch.cat([F.normalize(level, dim=1) for level in resized], dim=1) / math.sqrt(len(levels))


class SimilarityNetwork(nn.Module):
    """Embeds frozen features cell by cell; images and regions are embedded by pooling cells.

    Args:
        channels: channels of the levels, finest first.
        rank: rank of the trainable residual projection; 0 leaves the frozen features as they are.
        seed: seed of its initial values; the global random state is left alone.

    Raises:
        DataError: negative rank or no level.
    """

    def __init__(self, channels: Sequence[int], *, rank: int = 16, seed: int = 0) -> None:
        super().__init__()
        if not channels or rank < 0:
            raise DataError(f"similarity network needs at least one level and rank >= 0, got {channels} and {rank}")
        self.channels, self.rank = tuple(channels), rank
        self.width = sum(channels)
        if rank:
            with torch.random.fork_rng(devices=[]):  # a new convolution draws values, from the global stream
                self.down = nn.Conv2d(self.width, rank, 1, bias=False)
                self.up = nn.Conv2d(rank, self.width, 1, bias=False)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                self.down.weight.normal_(std=self.width**-0.5, generator=generator)
                self.up.weight.zero_()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """float (N, C_l, h_l, w_l) per level -> unit-length cell embeddings float (N, sum C_l, h_0, w_0)."""
        return self.turn(join_levels(levels))

    def turn(self, joined: Tensor) -> Tensor:
        """As `forward`, from `join_levels` of the levels, which stays itself where nothing is trained."""
        if not self.rank:
            return joined
        turned: Tensor = joined + self.up(self.down(joined))
        return F.normalize(turned, dim=1)

    def cosines(self, queries: Tensor, supports: Tensor) -> Tensor:
        """Cosines of turned cells from frozen ones, without ever making the turned cells: what training needs.

        With x + U D x for a turned cell, <x + U D x, y + U D y> = <x, y> + <U'x, D y> + <D x, U'y> + <D x, U'U D y>:
        but for <x, y>, which needs no gradient, everything has `rank` channels. Several times as fast to train as
        cosines of `turn`, and the same up to rounding.

        Args:
            queries: unit-length frozen cells, float (B, M, C).
            supports: unit-length frozen cells, float (B, N, C).

        Returns:
            float (B, M, N).
        """
        with torch.no_grad():
            frozen = torch.einsum("bmc,bnc->bmn", queries, supports)
        if not self.rank:
            return frozen
        down, up = self.down.weight[:, :, 0, 0], self.up.weight[:, :, 0, 0]
        gram = up.T @ up
        query_down, query_up = queries @ down.T, queries @ up
        support_down, support_up = supports @ down.T, supports @ up
        left = torch.cat([query_up + query_down @ gram, query_down], dim=2)
        right = torch.cat([support_down, support_up], dim=2)
        lengths = [
            (1 + 2 * (one_down * one_up).sum(dim=2) + (one_down @ gram * one_down).sum(dim=2)).clamp_min(1e-12).rsqrt()
            for one_down, one_up in ((query_down, query_up), (support_down, support_up))
        ]
        turned = frozen + torch.einsum("bmr,bnr->bmn", left, right)
        return turned * lengths[0][:, :, None] * lengths[1][:, None]

    @staticmethod
    def embed(maps: Tensor, weights: Tensor | None = None) -> Tensor:
        """L2-normalised embedding of whole images (global pooling) or of regions (masked pooling).

        Args:
            maps: float (N, C, h, w) from `forward`.
            weights: float (N, h, w) of the region; None is the whole image.

        Returns:
            float (N, C), the f of the attention formulas.
        """
        pooled = maps.mean(dim=(2, 3)) if weights is None else masked_average_pool(maps, weights)
        return F.normalize(pooled, dim=1)
