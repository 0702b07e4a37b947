"""Vision transformers: one grid of patches, of which several blocks give a level each."""

from __future__ import annotations

from collections.abc import Sequence

import timm
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.backbones.levels import LevelEncoder, enlarge_to_multiple

DEFAULT_LEVELS = 2
"""As many as the default strides of a pyramid."""


def level_blocks(depth: int, count: int) -> tuple[int, ...]:
    """Indices of the blocks that `count` levels are taken from: the ends of equal parts of the later half.

    The earlier half is left out: its cells tell positions and edges more than objects.

    >>> level_blocks(12, 1), level_blocks(12, 2), level_blocks(12, 3), level_blocks(24, 4)
    ((11,), (8, 11), (7, 9, 11), (14, 17, 20, 23))
    """
    later = depth - depth // 2
    return tuple(depth // 2 + -(-later * (number + 1) // count) - 1 for number in range(count))


class PatchEncoder(LevelEncoder):
    """A vision transformer of timm as levels: class and register tokens left out, the final norm on every level.

    Photos whose sides are no multiples of the patch are enlarged to the next multiple; position embeddings are
    resampled to the photo's grid, as timm does it.

    Args:
        model: with one patch size, `forward_intermediates`, and any size of photos (`dynamic_img_size`).
        name: of the model, for messages.
        strides: the patch once per level; None is `DEFAULT_LEVELS` times.

    Raises:
        DataError: other strides than the patch, or more levels than the later half has blocks.
    """

    def __init__(self, model: nn.Module, *, name: str, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        reductions = patch_grid(model)
        if reductions is None:
            raise DataError(f"backbone {name!r} is no vision transformer with one grid of patches; choose another")
        patch, depth = reductions
        self.strides = (patch,) * DEFAULT_LEVELS if strides is None else tuple(strides)
        most = depth - depth // 2
        if set(self.strides) != {patch} or len(self.strides) > most:
            raise DataError(
                f"backbone {name!r} has one grid, of its patches of {patch} pixels: give --strides {patch} once for "
                f"each level, at most {most} times (two levels: --strides {patch} {patch}), got {self.strides}"
            )
        self._blocks = level_blocks(depth, len(self.strides))
        self.channels = (int(model.num_features),) * len(self.strides)  # type: ignore[arg-type] # see nn.Module
        self.multiple, self.plan = patch, self.strides
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised float (B, 3, H, W) -> one float (B, C, ceil(H/patch), ceil(W/patch)) per level."""
        whole = enlarge_to_multiple(images, self.multiple)
        levels: list[Tensor] = self.model.forward_intermediates(  # type: ignore[operator] # see nn.Module
            whole, indices=list(self._blocks), norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return levels


def patch_grid(model: nn.Module) -> tuple[int, int] | None:
    """Patch side and number of blocks, of a transformer whose blocks share one grid; None for other models."""
    described = getattr(model, "feature_info", None)
    if not isinstance(described, list) or not hasattr(model, "forward_intermediates"):
        return None
    reductions = [int(one["reduction"]) for one in described]
    return (reductions[0], len(reductions)) if reductions and len(set(reductions)) == 1 else None


def build_patch_encoder(name: str, strides: Sequence[int] | None) -> PatchEncoder:
    """The untrained transformer that timm calls `name`. Raises DataError when it takes one size of photos only."""
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError as error:  # an unexpected keyword
        raise DataError(f"backbone {name!r} takes photos of one size only; choose another transformer") from error
    return PatchEncoder(model, name=name, strides=strides)
