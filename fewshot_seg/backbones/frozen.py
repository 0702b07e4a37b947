"""The frozen backbone: an encoder, its normalisation, and the levels that are taken from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Self, cast

import torch
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.backbones.levels import Grid, LevelEncoder, Plan, enlarge_to_multiple, grids_of

_DEEPEST = 32
"""Stride of the last stage of a pyramid: photos whose sides are multiples of it suit every encoder."""

Run = Callable[[Tensor], Sequence[Tensor]]


class Backbone(nn.Module):
    """A frozen encoder that stays in evaluation mode, also through `train()`.

    Attributes:
        name: encoder name, or several joined by ``+``.
        strides: strides of the returned maps, finest first; those of a transformer's levels are all its patch.
        channels: their numbers of channels.
        mean, std: normalisation of RGB in [0, 1], applied inside; of several encoders the mean of theirs.
        plan: the strides as `build_backbone` takes them.
        encoder: the frozen encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        name: str,
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """Freeze an encoder.

        Args:
            encoder: a pyramid as segmentation-models-pytorch has them (`out_channels`; maps of strides 1, 2, 4 ...), or
                a `LevelEncoder`.
            name, mean, std: as the attributes.
            strides: ascending strides to take from a pyramid; those of a `LevelEncoder`.

        Raises:
            DataError: strides that the encoder lacks, or not in order.
        """
        super().__init__()
        self.name, self.strides = name, tuple(strides)
        self.mean, self.std = tuple(mean), tuple(std)
        self.plan: Plan = self.strides
        if isinstance(encoder, LevelEncoder):
            if self.strides != encoder.strides:
                raise DataError(f"backbone {name!r} has levels of strides {encoder.strides}, asked for {self.strides}")
            self.channels, self.plan = encoder.channels, encoder.plan
        else:
            self.channels = _channels_of_stages(encoder, name, self.strides)
        self.encoder = encoder.requires_grad_(False)
        self._run: Run | None = None
        self.run_in(torch.float32, channels_last=True)  # depthwise convolutions are much faster so on CPUs
        self.eval()

    def run_in(self, precision: torch.dtype, *, channels_last: bool) -> None:
        """Set precision of the arithmetic (float32 or bfloat16) and layout; weights and outputs stay float32."""
        self.precision = precision
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder.to(memory_format=self._layout)

    def run_by(self, run: Run | None) -> None:
        """Let `run` do what the encoder does: its compiled form. None is the encoder itself."""
        self._run = run

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - frozen: the mode is refused on purpose
        """Stay in evaluation mode: batch statistics of episodes must not leak into frozen features."""
        return super().train(False)

    @cached_property
    def multiple(self) -> int:
        """Sides that are multiples of it are cut into cells as they are; photos of others are enlarged inside.

        1 for encoders that round up at every stage; the coarsest of `strides` for those that drop what is left over
        (ConvNeXt, Swin, VGG, DenseNet), or 32 where they need it; the patch of a vision transformer.

        Raises:
            DataError: an encoder that takes photos of one size only.
        """
        if isinstance(self.encoder, LevelEncoder):
            return self.encoder.multiple
        refused = True
        for multiple in dict.fromkeys((1, self.strides[-1], _DEEPEST)):
            side = 2 * _DEEPEST + multiple  # an odd multiple: what rounds down at any stage is found out
            made = self._grids_of_zeros(side, side)
            if made == grids_of(side, side, strides=self.strides, multiple=1):
                return multiple
            refused &= made is None
        if refused:
            raise DataError(f"backbone {self.name!r} takes photos of one size only; choose another")
        return _DEEPEST  # not even then, which the first photo will tell

    @torch.no_grad()
    def _grids_of_zeros(self, height: int, width: int) -> tuple[Grid, ...] | None:
        """Size of every level as the encoder makes it of an empty photo; None where it refuses."""
        photo = torch.zeros(1, 3, height, width, device=next(self.encoder.parameters()).device)
        try:
            maps = self.encoder(photo)
        except (RuntimeError, AssertionError, ValueError):
            return None
        taken = (maps[stride.bit_length() - 1] for stride in self.strides)
        return tuple((level.shape[2], level.shape[3]) for level in taken)

    def grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """Height and width of every level for photos of this size."""
        if isinstance(self.encoder, LevelEncoder):
            return self.encoder.grids(height, width)
        return grids_of(height, width, strides=self.strides, multiple=self.multiple)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """One float32 (B, C, h, w) per level of float32 (B, 3, H, W) RGB in [0, 1].

        h = ceil(H'/s) and w = ceil(W'/s) at stride s, where H' and W' are H and W, rounded up to `multiple`: the photo
        is stretched by that little inside, so that the cells cover it exactly.

        Raises:
            DataError: an encoder that does not keep to this, or takes photos of one size only.
        """
        return self.differentiable(images)

    def differentiable(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `forward`, with a gradient from the features back to the images; the weights stay frozen."""
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            levels = self._levels(images, self._run or self.encoder, self._layout)
        expected = self.grids(images.shape[2], images.shape[3])
        for level, grid, stride in zip(levels, expected, self.strides, strict=True):
            if level.shape[2:] != grid:
                raise DataError(
                    f"backbone {self.name!r} drops the border of {images.shape[2]} x {images.shape[3]} images at "
                    f"stride {stride}: expected {grid[0]} x {grid[1]} cells, got {level.shape[2]} x {level.shape[3]}; "
                    "choose another backbone"
                )
        return tuple(level.float().contiguous() for level in levels)

    def levels(self, images: Tensor) -> list[Tensor]:
        """As `differentiable`, by plain operations alone, which a graph can hold: float32, as it is, unchecked."""
        return self._levels(images, self.encoder, None)

    def _levels(self, images: Tensor, run: Run, layout: torch.memory_format | None) -> list[Tensor]:
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        normalised = (images - mean) / std
        if layout is not None:
            normalised = normalised.contiguous(memory_format=layout)
        if isinstance(self.encoder, LevelEncoder):
            return list(run(normalised))
        maps = run(enlarge_to_multiple(normalised, self.multiple))
        return [maps[stride.bit_length() - 1] for stride in self.strides]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest over name, strides, normalisation and every weight, as they are at the first look."""
        digest = hashlib.sha256(repr((self.name, self.plan, self.mean, self.std)).encode())
        for key, value in sorted(self.encoder.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _channels_of_stages(encoder: nn.Module, name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    widths = cast(Sequence[int], encoder.out_channels)  # nn.Module types every attribute as tensor or module
    available = {2**stage: width for stage, width in enumerate(widths) if stage > 0 and width > 0}
    missing = [stride for stride in strides if stride not in available]
    if missing or not strides or sorted(set(strides)) != list(strides):
        raise DataError(f"backbone {name!r} has strides {sorted(available)}, asked for {strides} (ascending)")
    return tuple(available[stride] for stride in strides)
