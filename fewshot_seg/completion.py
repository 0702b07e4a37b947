"""From weak supports to soft masks: what a box, scribble, point or image-level label leaves open is filled in.

A support marked by less than a mask says for every cell how much of it is known to be object, how much is known to be
background, and how much is open. `estimate_object` fills in the open part without any training: by place first, then
by likeness to what that made object and background. `SupportCompletion` is a small network that corrects the
estimate. It is trained on base classes, where the masks behind weak supports are known, and sees no class name: it
learns which part of a photo a person would mark. Of a bare photo, where nothing is known, an `ObjectClassifier` may
answer instead: what the network learns there holds for the classes it learned from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import IGNORE, DataError
from fewshot_seg.decoder import ConvolutionBlock, MapDropout
from fewshot_seg.objectness import ObjectClassifier
from fewshot_seg.priors import COSINE_UNIT, TEMPERATURE, soft_margin
from fewshot_seg.similarity import masked_average_pool

_CENTRE_WIDTH = 0.5  # twice the variance of the Gaussian that says where unknown objects are; half sides are 1
_DILATIONS = (1, 2, 4, 1)  # the grid is 25 cells wide: the receptive field must span an object
_LEAST_SHARE = 1e-4  # of a completed cell in the loss: its logarithm must stay finite
_HINTS = 9  # channels of `_hints`


def open_part(marks: Tensor, size: tuple[int, int]) -> Tensor:
    """Share of every cell that weak marks leave open: uint8 (N, H, W), 255 = not known -> float (N, h, w)."""
    return F.adaptive_avg_pool2d((marks == IGNORE).float()[:, None], size)[:, 0]


def estimate_object(maps: Tensor, foreground: Tensor, background: Tensor, still_open: Tensor) -> Tensor:
    """Logits of the object in the open part of weak supports, nothing trained.

    First guess: where background is known (a box), all of the open part; where object is known (scribble, point), the
    likeness to it, min-max scaled; where nothing is known (image-level label), a Gaussian about the middle of the
    photo, where photographers put things. Then every cell is compared with what that guess made object and background
    (`priors.soft_margin`).

    Args:
        maps: unit-length cells, float (N, D, h, w).
        foreground, background: float (N, h, w), known shares of every cell.
        still_open: float (N, h, w), shares that are not known; what is neither lies beside the photo.

    Returns:
        float (N, h, w).
    """
    guess = _first_guess(maps, foreground, background, still_open)
    cells = maps.flatten(2).transpose(1, 2)
    sides = (foreground + still_open * guess, background + still_open * (1 - guess))
    margin = soft_margin(cells, cells, *(side.flatten(1) for side in sides), temperature=TEMPERATURE)
    return margin.reshape(foreground.shape)


def _first_guess(maps: Tensor, foreground: Tensor, background: Tensor, still_open: Tensor) -> Tensor:
    photo = foreground + background + still_open > 0
    likeness = torch.einsum("ndhw,nd->nhw", maps, F.normalize(masked_average_pool(maps, foreground), dim=1))
    low, high = _range(likeness, photo)
    likeness = (likeness - low) / (high - low).clamp_min(1e-6)
    guess = torch.where(_any(foreground), likeness, _centre(maps, photo))
    return torch.where(_any(background) & ~_any(foreground), torch.ones_like(guess), guess)


def _centre(maps: Tensor, photo: Tensor) -> Tensor:
    squares = torch.zeros_like(maps[:, 0])
    for axis in _coordinates(maps):
        low, high = _range(axis.expand_as(squares), photo)
        squares = squares + ((axis - (low + high) / 2) / ((high - low) / 2).clamp_min(1e-6)) ** 2
    return torch.exp(-squares / _CENTRE_WIDTH)


def _range(values: Tensor, photo: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest, float (N, 1, 1), of values in [-1, 1], float (N, h, w), where photo, bool (N, h, w), is."""
    low, high = values.masked_fill(~photo, 1), values.masked_fill(~photo, -1)
    return low.amin((1, 2), keepdim=True), high.amax((1, 2), keepdim=True)


def _coordinates(maps: Tensor) -> tuple[Tensor, Tensor]:
    """float (1, h, 1) and (1, 1, w) in [-1, 1]."""
    height, width = maps.shape[-2:]
    y = torch.linspace(-1, 1, height, device=maps.device, dtype=maps.dtype)
    x = torch.linspace(-1, 1, width, device=maps.device, dtype=maps.dtype)
    return y[None, :, None], x[None, None, :]


def _any(known: Tensor) -> Tensor:
    return (known > 0).flatten(1).any(dim=1)[:, None, None]


class SupportCompletion(nn.Module):
    """Corrects `estimate_object` by what the features look like, and by place.

    Args:
        feature_channels: channels D of the frozen features.
        appearance: channels that they are reduced to.
        width: hidden channels, a multiple of 8.
        dropout: probability of dropping a reduced or hidden map.
        objects: whether an `ObjectClassifier`, to be fitted, answers for photos of which nothing is known.
        seed: seed of the initial values; the global random state is left alone.

    Raises:
        DataError: a size below 1, or a width that is no multiple of 8.
    """

    def __init__(
        self,
        *,
        feature_channels: int,
        appearance: int = 16,
        width: int = 48,
        dropout: float = 0.3,
        objects: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(feature_channels, appearance) < 1 or width < 8 or width % 8:
            raise DataError(
                f"completion of supports needs channels of at least 1 and a width that is a multiple of 8, got "
                f"{feature_channels} features, {appearance} appearance channels, width {width}"
            )
        self.feature_channels = feature_channels
        self._description = {
            "feature_channels": feature_channels,
            "appearance": appearance,
            "width": width,
            "dropout": dropout,
            "objects": objects,
        }
        self.objects = ObjectClassifier(feature_channels=feature_channels) if objects else None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
            self.reduce = nn.Sequential(MapDropout(dropout), nn.Conv2d(feature_channels, appearance, 1))
            self.entry = ConvolutionBlock(appearance + _HINTS, width, 1)
            self.blocks = nn.ModuleList(ConvolutionBlock(width, width, 3, dilation) for dilation in _DILATIONS)
            self.context = nn.Linear(width, width)
            self.dropout = MapDropout(dropout)
            self.exit = nn.Conv2d(width, 1, 1)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)  # type: ignore[arg-type]  # a convolution with bias
        self.gain = nn.Parameter(torch.ones(()))

    def description(self) -> dict[str, Any]:
        """Arguments that build it again, all but the seed."""
        return dict(self._description)

    def pass_over(self, rows: int, like: Tensor) -> None:
        """Draw the dropout of so many supports and drop it: they are other ranks', whose random state is to agree."""
        reducing = self.reduce[0]
        if self.training and isinstance(reducing, MapDropout) and 0 < reducing.p < 1:
            reducing.draw(rows, self.feature_channels, like)
            self.dropout.draw(rows, self.context.in_features, like)

    def forward(
        self, maps: Tensor, features: Tensor, foreground: Tensor, background: Tensor, still_open: Tensor
    ) -> Tensor:
        """Logits of the object in the open part.

        Args:
            maps: unit-length cells of the similarity network, float (N, D, h, w).
            features: unit-length cells of the frozen features, float (N, C, h, w).
            foreground, background: float (N, h, w), known shares of every cell.
            still_open: float (N, h, w), shares that are not known.

        Returns:
            float (N, h, w).
        """
        estimate = estimate_object(maps, foreground, background, still_open)
        scaled = features * features.shape[1] ** 0.5  # cells are of unit length; this gives channels unit variance
        hints = _hints(maps, foreground, background, still_open, estimate)
        hidden = self.entry(torch.cat([self.reduce(scaled), hints], dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = hidden + self.context(hidden.mean(dim=(2, 3)))[:, :, None, None]
        correction: Tensor = self.exit(self.dropout(F.relu(hidden)))[:, 0]
        logits = self.gain * estimate + correction
        if self.objects is None:
            return logits
        return torch.where(_any(foreground) | _any(background), logits, self.objects(features))

    def objectness(self, maps: Tensor, features: Tensor) -> Tensor:
        """As `forward`, of photos of which nothing is known."""
        if self.objects is not None:
            return self.objects(features)  # type: ignore[no-any-return]
        nothing = torch.zeros_like(maps[:, 0])
        return self(maps, features, nothing, nothing, torch.ones_like(nothing))  # type: ignore[no-any-return]


def _hints(maps: Tensor, foreground: Tensor, background: Tensor, still_open: Tensor, estimate: Tensor) -> Tensor:
    """What is known, what it is like, and where: float (N, 9, h, w)."""
    likeness = []
    for side in (foreground, background):
        prototype = F.normalize(masked_average_pool(maps, side), dim=1)
        likeness.append(torch.einsum("ndhw,nd->nhw", maps, prototype) / COSINE_UNIT)
    y, x = (axis.expand_as(estimate) for axis in _coordinates(maps))
    has_object = _any(foreground).to(maps.dtype).expand_as(estimate)
    return torch.stack([foreground, background, still_open, *likeness, estimate, has_object, x, y], dim=1)


def completion_loss(
    completed_foreground: Tensor, completed_background: Tensor, foreground: Tensor, background: Tensor
) -> Tensor:
    """Cross-entropy plus soft Dice of completed supports against the shares of the mask behind them.

    Args:
        completed_foreground, completed_background: float (N, h, w), known shares with the open part filled in.
        foreground, background: float (N, h, w), true shares of every cell; ignored area is in neither.

    Returns:
        Scalar, mean over supports; a support without any valid area adds nothing.
    """
    total = foreground + background
    logarithms = [side.clamp_min(_LEAST_SHARE).log() for side in (completed_foreground, completed_background)]
    entropy = -(foreground * logarithms[0] + background * logarithms[1]).sum((1, 2))
    overlap = (completed_foreground * foreground).sum((1, 2))
    size = (completed_foreground * total).sum((1, 2)) + foreground.sum((1, 2))
    return (entropy / total.sum((1, 2)).clamp_min(1e-6) + 1 - (2 * overlap + 1) / (size + 1)).mean()
