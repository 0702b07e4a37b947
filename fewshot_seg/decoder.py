"""From prior maps to mask logits: a small convolutional decoder, and the readout of one prior alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.attention import scale_map
from fewshot_seg.distributed import current_rows


class PriorReadout(nn.Module):
    """One prior map as the logits, nothing learned: the prior alone.

    Args:
        channel: which map.
        scaled: rectify it and scale it to [0, 1] per image, as an attention map is shown.
    """

    def __init__(self, channel: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.channel, self.scaled = channel, scaled

    def description(self) -> dict[str, Any]:
        """Arguments that build it again."""
        return {"channel": self.channel, "scaled": self.scaled}

    def forward(self, priors: Tensor, query_maps: Tensor, prototype: Tensor) -> Tensor:  # noqa: ARG002
        """float (B, P, h, w) -> float (B, h, w); the other arguments are the `MaskDecoder`'s."""
        chosen = priors[:, self.channel]
        return scale_map(chosen.relu()) if self.scaled else chosen


class MapDropout(nn.Dropout2d):
    """`torch.nn.Dropout2d`, the same whether a batch is one process's or split over ranks.

    Inside `distributed.split_rows` it draws what Dropout2d would draw for the batch of all ranks, and uses its rows.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """float (B, C, h, w), same shape."""
        rows = current_rows()
        if rows is None or not self.training or self.p in (0, 1):
            return super().forward(maps)
        kept = self.draw(rows.total, maps.shape[1], maps)
        return maps * kept[rows.before : rows.before + len(maps)]

    def draw(self, rows: int, channels: int, like: Tensor) -> Tensor:
        """What maps are multiplied by, float (rows, channels, 1, 1): 0, or 1 / (1 - p)."""
        return like.new_empty(rows, channels, 1, 1).bernoulli_(1 - self.p).div_(1 - self.p)


class ConvolutionBlock(nn.Module):
    """Convolution that keeps the size, group normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 * dilation, dilation=dilation)
        self.normalisation = nn.GroupNorm(8, outputs)  # batch statistics would tie the episodes of a batch together

    def forward(self, maps: Tensor) -> Tensor:
        """float (B, inputs, h, w) -> (B, outputs, h, w)."""
        normalised: Tensor = self.normalisation(self.convolution(maps))
        return F.relu(normalised)


class MaskDecoder(nn.Module):
    """Refines prior maps, and reduced features if asked to, into logits at twice the feature grid.

    The first prior is added to the output with a learned gain: the network starts as that prior and learns a
    correction. (With fifteen base classes it would otherwise learn the base classes.)

    Args:
        prior_channels: number of prior maps P; 0 for a decoder on features and prototype alone.
        feature_channels: channels D of the query maps and of the support prototype.
        appearance: channels that query features and prototype are each reduced to; 0 shows neither.
        width: hidden channels, a multiple of 8.
        blocks: residual 3 x 3 blocks.
        dropout: probability of dropping a hidden map.
        seed: seed of the initial values; the global random state is left alone.

    Raises:
        DataError: nothing to read, a negative size, or a width that is no multiple of 8.
    """

    def __init__(
        self,
        *,
        prior_channels: int,
        feature_channels: int,
        appearance: int = 0,
        width: int = 32,
        blocks: int = 2,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(prior_channels, appearance, blocks) < 0:
            raise DataError(
                f"decoder sizes must not be negative, got {prior_channels} prior maps, {appearance} appearance "
                f"channels, {blocks} blocks"
            )
        if prior_channels + appearance < 1:
            raise DataError("the decoder has nothing to read: give it a prior, or appearance channels")
        if width < 8 or width % 8:
            raise DataError(f"decoder width must be a multiple of 8, got {width}")
        self.prior_channels, self.feature_channels, self.appearance = prior_channels, feature_channels, appearance
        self._description = {
            "prior_channels": prior_channels,
            "feature_channels": feature_channels,
            "appearance": appearance,
            "width": width,
            "blocks": blocks,
            "dropout": dropout,
        }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
            if appearance:
                self.reduce = nn.Sequential(MapDropout(dropout), nn.Conv2d(feature_channels, appearance, 1))
            self.entry = ConvolutionBlock(prior_channels + 2 * appearance, width, 1)
            self.blocks = nn.ModuleList(ConvolutionBlock(width, width, 3) for _ in range(blocks))
            self.dropout = MapDropout(dropout)
            self.refine = ConvolutionBlock(width, width, 3)
            self.exit = nn.Conv2d(width, 1, 1)
        self.to(memory_format=torch.channels_last)  # 1.5 to 2 times as fast on CPUs, whatever the input's layout
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)  # type: ignore[arg-type]  # a convolution with bias
        self.gain = nn.Parameter(torch.ones(()))

    def description(self) -> dict[str, Any]:
        """Arguments that build it again, all but the seed."""
        return dict(self._description)

    def forward(self, priors: Tensor, query_maps: Tensor, prototype: Tensor) -> Tensor:
        """Logits of the mask.

        Args:
            priors: float (B, P, h, w).
            query_maps: float (B, D, h, w), frozen features of the query.
            prototype: float (B, D), frozen features pooled over the supports' foreground.

        Returns:
            float (B, 2h, 2w).
        """
        inputs = [priors]
        if self.appearance:
            # Cells are of unit length; this gives the channels about unit variance.
            scale = query_maps.shape[1] ** 0.5
            seen = prototype[:, :, None, None].expand_as(query_maps)
            inputs += [self.reduce(query_maps * scale), self.reduce(seen * scale)]
        hidden = self.entry(torch.cat(inputs, dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = _double(self.dropout(hidden))
        logits: Tensor = self.exit(self.refine(hidden))[:, 0]
        if self.prior_channels:
            logits = logits + self.gain * _double(priors[:, :1])[:, 0]
        return logits


def _double(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)


class ContextDecoder(nn.Module):
    """Reads every cell's priors in the light of how they are distributed over the whole photo.

    The same margin means different things in different photos: how large the object is, how unlike its supports it is,
    what else is there. Statistics of all maps over the photo shift the hidden units of a small network that is applied
    to every cell, and the logit itself: a threshold per episode. (An oracle for it is worth ten points of mIoU.) The
    first prior is added to the output with a learned gain, as in `MaskDecoder`; there is no convolution, priors of
    frozen features are smooth as they are.

    Args:
        prior_channels: number of prior maps P.
        width: hidden units of a cell.
        context: hidden units between the statistics and what they shift.
        dropout: probability of dropping a statistic or a hidden unit of the context.
        seed: seed of the initial values; the global random state is left alone.

    Raises:
        DataError: a size below 1.
    """

    def __init__(
        self, *, prior_channels: int, width: int = 32, context: int = 32, dropout: float = 0.2, seed: int = 0
    ) -> None:
        super().__init__()
        if min(prior_channels, width, context) < 1:
            raise DataError(
                f"context decoder needs sizes of at least 1, got {prior_channels} prior maps, width {width}, "
                f"context {context}"
            )
        self.prior_channels = prior_channels
        self._description = {"prior_channels": prior_channels, "width": width, "context": context, "dropout": dropout}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
            self.entry, self.hidden = nn.Linear(prior_channels, width), nn.Linear(width, width)
            self.exit = nn.Linear(width, 1)
            self.context = nn.Sequential(
                nn.Dropout(dropout),
                nn.Linear(_STATISTICS * prior_channels, context),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(context, 2 * width + 1),
            )
        for last in (self.exit, self.context[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("scale", torch.ones(prior_channels))
        self.register_buffer("statistics_mean", torch.zeros(_STATISTICS * prior_channels))
        self.register_buffer("statistics_scale", torch.ones(_STATISTICS * prior_channels))
        self.scale: Tensor
        self.statistics_mean: Tensor
        self.statistics_scale: Tensor

    def description(self) -> dict[str, Any]:
        """Arguments that build it again, all but the seed."""
        return dict(self._description)

    @torch.no_grad()
    def fit_scales(self, priors: Tensor) -> None:
        """Set the units of the maps from priors float (B, P, h, w) like those it will be trained on.

        The first map keeps its unit: its zero and its slope mean something. One episode does not tell how statistics
        differ between photos: they keep theirs, too.

        Raises:
            DataError: no episode.
        """
        if not len(priors):
            raise DataError("the units of the priors are set from at least one episode, got none")
        values = priors.float().transpose(0, 1).flatten(1)
        spread = values.std(dim=1).clamp_min(1e-3) if values.shape[1] > 1 else torch.ones_like(values[:, 0])
        spread[0] = 1
        self.scale.copy_(spread)
        seen = map_statistics(priors.float() / spread[:, None, None])
        self.statistics_mean.copy_(seen.mean(dim=0))
        self.statistics_scale.copy_(seen.std(dim=0).clamp_min(0) + 1e-3 if len(seen) > 1 else torch.ones_like(seen[0]))

    def forward(self, priors: Tensor, query_maps: Tensor, prototype: Tensor) -> Tensor:  # noqa: ARG002
        """float (B, P, h, w) -> logits float (B, h, w); the other arguments are the `MaskDecoder`'s."""
        maps = priors / self.scale[:, None, None]
        seen = (map_statistics(maps) - self.statistics_mean) / self.statistics_scale
        width = self.entry.out_features
        first, second, shift = self.context(seen)[:, None, None].split([width, width, 1], dim=3)
        cells = maps.permute(0, 2, 3, 1)
        hidden = F.relu(self.entry(cells) + first)
        hidden = F.relu(hidden + self.hidden(hidden) + second)
        logits: Tensor = (self.exit(hidden) + shift)[..., 0] + self.gain * maps[:, 0]
        return logits


_STATISTICS = 8


def map_statistics(maps: Tensor) -> Tensor:
    """How P maps are distributed over each photo: float (B, P, h, w) -> float (B, 8 P).

    Mean, standard deviation, largest, smallest; mean where the first map says object, where it says so with more
    certainty, and where it says background; and mean excess over the mean.
    """
    mean = maps.mean(dim=(2, 3))
    centred = maps - mean[:, :, None, None]
    inside, surely = maps[:, :1].mul(2).sigmoid(), maps[:, :1].mul(2).sub(2).sigmoid()
    regions = [
        (maps * region).sum(dim=(2, 3)) / region.sum(dim=(2, 3)).clamp_min(1e-3)
        for region in (inside, surely, 1 - inside)
    ]
    spread = centred.square().mean(dim=(2, 3)).clamp_min(1e-12).sqrt()
    extremes = [maps.amax(dim=(2, 3)), maps.amin(dim=(2, 3))]
    return torch.cat([mean, spread, *extremes, *regions, centred.relu().mean(dim=(2, 3))], dim=1)


Decoder = MaskDecoder | ContextDecoder | PriorReadout
"""Whatever turns prior maps into logits."""
