"""PFENet (Tian et al., TPAMI 2020, arXiv 2008.01449): a training-free prior, and a feature enrichment decoder.

As the paper and its code have it: middle features of query and support reduced by a 1 x 1 convolution each, the
support's pooled over its mask; the feature enrichment module reads query, prototype and prior at several scales, each
scale takes from the one before it (finest first) and has a head of its own for the auxiliary loss; the scales are
joined, refined and classified. K shots: prototypes and priors are averaged.

Other than there: 64 channels instead of 256; scales 1, 1/2, 1/4, 1/8 of the feature grid, as the code has 60, 30, 15, 8
of 60; prior (`fewshot_seg.priors.pfenet_prior`) and middle features are both of all stored levels joined, where the
paper takes its prior from the last block and its features from the two before; one logit for the two of a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.priors import pfenet_prior
from fewshot_seg.rivals.model import EpisodeModel, joined_maps, query_loss, support_weights

SCALES = (1.0, 0.5, 0.25, 0.125)
"""Sides of the enrichment's scales as parts of the feature grid's."""


class EnrichmentNetwork(EpisodeModel):
    """PFENet-style prior and decoder.

    Args:
        channels: of the backbone's levels.
        width: channels of everything that is trained.
        auxiliary: weight of the mean loss of the scales' own heads.
        seed: of the initial values; the global random state is left alone.

    Raises:
        DataError: no level, or a width below 1.
    """

    def __init__(self, channels: Sequence[int], *, width: int = 64, auxiliary: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not channels or width < 1:
            raise DataError(f"the decoder needs at least one level and a width of 1, got {tuple(channels)} and {width}")
        self.features, self.width, self.auxiliary = sum(channels), width, auxiliary
        scales = len(SCALES)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
            self.reduce_query = nn.Sequential(_convolution(self.features, width, 1), nn.Dropout2d(0.5))
            self.reduce_support = nn.Sequential(_convolution(self.features, width, 1), nn.Dropout2d(0.5))
            self.merge = nn.ModuleList(_convolution(2 * width + 1, width, 1) for _ in range(scales))
            self.inherit = nn.ModuleList(_convolution(2 * width, width, 1) for _ in range(scales - 1))
            self.enrich = nn.ModuleList(_two_convolutions(width) for _ in range(scales))
            self.inner_heads = nn.ModuleList(_head(width) for _ in range(scales))
            self.join = _convolution(scales * width, width, 1)
            self.refine = _two_convolutions(width)
            self.head = _head(width)

    def description(self) -> dict[str, Any]:
        """See `EpisodeModel.description`."""
        return {"width": self.width, "scales": SCALES, "auxiliary": self.auxiliary}

    def forward(self, batch: FeatureBatch) -> Tensor:
        """See `EpisodeModel.forward`; one map."""
        return self.head(self._enriched(batch)[0])  # type: ignore[no-any-return]

    def losses(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Loss of the mask plus the mean of those of the scales' own heads."""
        enriched, scales = self._enriched(batch)
        mask_loss = query_loss(self.head(enriched), batch)
        inner = [query_loss(head(maps), batch) for head, maps in zip(self.inner_heads, scales, strict=True)]
        auxiliary = torch.stack(inner).mean()
        return {
            "loss": mask_loss + self.auxiliary * auxiliary,
            "mask_loss": mask_loss.detach(),
            "auxiliary_loss": auxiliary.detach(),
        }

    def _enriched(self, batch: FeatureBatch) -> tuple[Tensor, list[Tensor]]:
        query, supports = joined_maps(batch)
        foreground, _ = support_weights(batch, (supports.shape[3], supports.shape[4]))
        prior = pfenet_prior(query, supports, foreground)[:, None]
        unit = self.features**0.5  # cells are of unit length; this gives the channels about unit variance
        reduced = self.reduce_support(supports.flatten(0, 1) * unit).reshape(*supports.shape[:2], -1, *query.shape[2:])
        area = foreground.sum(dim=(2, 3))[:, :, None] + 5e-4  # as in the code
        prototype = (torch.einsum("bkchw,bkhw->bkc", reduced, foreground) / area).mean(dim=1)
        return self.enriched(self.reduce_query(query * unit), prototype, prior)

    def enriched(self, query: Tensor, prototype: Tensor, prior: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The feature enrichment module.

        Args:
            query: float (B, C, h, w), reduced.
            prototype: float (B, C).
            prior: float (B, 1, h, w) in [0, 1].

        Returns:
            float (B, C, h, w), and what each scale's own head reads, float (B, C, s, s) each.
        """
        whole = (query.shape[2], query.shape[3])
        scales, enlarged = list[Tensor](), list[Tensor]()
        for number, part in enumerate(SCALES):
            size = (max(1, round(part * whole[0])), max(1, round(part * whole[1])))
            seen = prototype[:, :, None, None].expand(-1, -1, *size)
            merged = self.merge[number](
                torch.cat([F.adaptive_avg_pool2d(query, size), seen, _resized(prior, size)], dim=1)
            )
            if number:
                finer = _resized(enlarged[-1], size)
                merged = merged + self.inherit[number - 1](torch.cat([merged, finer], dim=1))
            merged = merged + self.enrich[number](merged)
            scales.append(merged)
            enlarged.append(_resized(merged, whole))
        joined = self.join(torch.cat(enlarged, dim=1))
        return joined + self.refine(joined), scales


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)  # as in the code


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.ReLU())


def _two_convolutions(width: int) -> nn.Sequential:
    return nn.Sequential(_convolution(width, width, 3), _convolution(width, width, 3))


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(_convolution(width, width, 3), nn.Dropout2d(0.1), nn.Conv2d(width, 1, 1))
