"""The trainable constraint: after the attended parts are masked out, nothing may tell positive from negative.

Source: Zheng et al., arXiv 2008.06035 and 1911.07381 ("similarity mining"); the soft mask is that of Li et al., "Tell
Me Where to Look" (GAIN, arXiv 1802.10171):

    M in [0, 1]: attention of an image,    Sigma(M) = sigmoid(a (M - b)),    I' = I * (1 - Sigma(M)),
    L_sm = | dist(f_a', f_p') - dist(f_a', f_n') |,   f' = embedding of I'.

What still tells them apart after masking is attention that was missed. The gradient reaches the network twice:
through the embeddings of the masked images and through the attention that made the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.attention import scale_map

Inputs = TypeVar("Inputs")


def _check_range(sharpness: Tensor | float, threshold: Tensor | float) -> None:
    # Tensors come from `SimilarityMining`, which keeps them in range; looking at them would stall a GPU.
    if not isinstance(sharpness, Tensor) and not (sharpness > 0 and math.isfinite(sharpness)):
        raise DataError(f"sharpness of the soft mask must be a number above 0, got {sharpness}")
    if not isinstance(threshold, Tensor) and not 0 < threshold < 1:
        raise DataError(f"threshold of the soft mask must be between 0 and 1, both excluded, got {threshold}")


def soft_mask(attention: Tensor, *, sharpness: Tensor | float, threshold: Tensor | float) -> Tensor:
    """Sigma(M) = sigmoid(a (M - b)): near 1 where the attention is above the threshold (GAIN).

    Args:
        attention: float (B, h, w) in [0, 1], see `fewshot_seg.attention.scale_map`.
        sharpness: a > 0; large values give a hard mask. A tensor (scalar) may carry gradient and is not checked.
        threshold: b in (0, 1), likewise.

    Returns:
        float (B, h, w) in [0, 1], 1 = masked out.

    Raises:
        DataError: sharpness or threshold out of range.

    Example:
        >>> soft_mask(torch.tensor([[[0.0, 0.5, 1.0]]]), sharpness=10.0, threshold=0.5)
        tensor([[[0.0067, 0.5000, 0.9933]]])
    """
    _check_range(sharpness, threshold)
    return torch.sigmoid(sharpness * (attention - threshold))


def _resize(mask: Tensor, maps: Tensor) -> Tensor:
    """The mask at the maps' grid and in their dtype, float (B, 1, H, W)."""
    if mask.ndim != 3 or len(mask) != len(maps):
        raise DataError(f"expected one mask (h, w) per image, shape ({len(maps)}, h, w), got {tuple(mask.shape)}")
    if not maps.is_floating_point():
        raise DataError(f"expected float images or features to mask, got {maps.dtype}")
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32))  # no antialiasing in half precision
    # Antialiasing changes nothing for finer grids; on coarser ones it keeps cells between samples from being lost.
    resized = F.interpolate(mask[:, None], tuple(maps.shape[-2:]), mode="bilinear", align_corners=False, antialias=True)
    return resized.to(maps.dtype)


def mask_images(images: Tensor, mask: Tensor, fill: Tensor | None = None) -> Tensor:
    """Photos without their masked part: I * (1 - Sigma), the mask resized bilinearly to the photo.

    The formula leaves black, and photos in [0, 1] are not centred: black is a dark object to the network. A fill
    makes it I * (1 - Sigma) + fill * Sigma.

    Args:
        images: float (B, 3, H, W).
        mask: float (B, h, w) in [0, 1], 1 = masked out.
        fill: what the masked part becomes: a value per channel (3,), such as the mean of the data, or pictures that
            broadcast to the photos, such as blurred copies. None is 0.

    Returns:
        float (B, 3, H, W), dtype of the images.

    Raises:
        DataError: shapes that do not fit, or images that are no floats.
    """
    if images.ndim != 4:
        raise DataError(f"expected images (B, 3, H, W), got shape {tuple(images.shape)}")
    sigma = _resize(mask, images)
    kept = images * (1 - sigma)
    if fill is None:
        return kept
    fill = fill[:, None, None] if fill.ndim == 1 else fill
    try:
        fill = fill.to(images.dtype).expand_as(images)
    except RuntimeError:
        raise DataError(
            f"fill must be one value per channel or broadcast to the images {tuple(images.shape)}, "
            f"got shape {tuple(fill.shape)}"
        ) from None
    return kept + fill * sigma


def mask_features(levels: Sequence[Tensor], mask: Tensor) -> tuple[Tensor, ...]:
    """Feature maps without their masked cells: A * (1 - Sigma) on every level, the mask resized to its grid.

    The cheap variant: no second pass through the backbone, but cells next to the mask have seen what was under it.
    Mask the maps that the embedding pools. A network that normalises every cell afterwards (`join_levels`) undoes
    the mask wherever Sigma < 1.

    Args:
        levels: float (B, C_l, h_l, w_l).
        mask: float (B, h, w) in [0, 1], 1 = masked out.

    Returns:
        The masked levels, in order.

    Raises:
        DataError: a tensor instead of a sequence, or shapes that do not fit.
    """
    if isinstance(levels, Tensor):
        raise DataError("mask_features expects a sequence of feature maps, one per level; got a tensor: pass (maps,)")
    return tuple(level * (1 - _resize(mask, level)) for level in levels)


def similarity_mining_loss(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """L_sm = mean over the batch of |dist(f_a', f_p') - dist(f_a', f_n')| (arXiv 2008.06035).

    dist is Euclidean between L2-normalised embeddings. The root is taken of the square plus 1e-12: its gradient is
    then 0, not NaN, where two embeddings coincide, and a distance changes by 1e-6 at most.

    Args:
        anchor, positive, negative: float (B, D), embeddings of the masked images; normalised here.

    Returns:
        Scalar; half precision is computed in float32.

    Raises:
        DataError: shapes that differ.

    Example:
        >>> a, p, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 0.0]])
        >>> similarity_mining_loss(a, p, n)  # |sqrt(2) - 2|
        tensor(0.5858)
    """
    if anchor.ndim != 2 or not anchor.shape == positive.shape == negative.shape:
        shapes = ", ".join(str(tuple(embedding.shape)) for embedding in (anchor, positive, negative))
        raise DataError(f"similarity mining expects three embeddings of one shape (B, D), got {shapes}")
    anchor, positive, negative = (
        F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)
        for embedding in (anchor, positive, negative)
    )
    return (_distance(anchor, positive) - _distance(anchor, negative)).abs().mean()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other).square().sum(1) + 1e-12).sqrt()


class SimilarityMining(nn.Module):
    """The constraint as a module that holds the mask's sharpness a and threshold b, fixed or learned.

    Stored as log a and logit b, so that learned values stay in range. Nothing in L_sm keeps a learned b from sinking
    until everything is masked and the loss is 0: learn it together with a metric loss and watch its value.

    Args:
        sharpness: a > 0.
        threshold: b in (0, 1).
        learnable: makes both parameters.

    Raises:
        DataError: sharpness or threshold out of range.
    """

    log_sharpness: Tensor
    logit_threshold: Tensor

    def __init__(self, *, sharpness: float = 10.0, threshold: float = 0.5, learnable: bool = False) -> None:
        super().__init__()
        _check_range(sharpness, threshold)
        stored = {"log_sharpness": math.log(sharpness), "logit_threshold": math.log(threshold / (1 - threshold))}
        for name, value in stored.items():
            if learnable:
                self.register_parameter(name, nn.Parameter(torch.tensor(value)))
            else:
                self.register_buffer(name, torch.tensor(value))

    @property
    def sharpness(self) -> Tensor:
        """a, a scalar above 0."""
        return self.log_sharpness.exp()

    @property
    def threshold(self) -> Tensor:
        """b, a scalar in (0, 1)."""
        return self.logit_threshold.sigmoid()

    def extra_repr(self) -> str:
        return f"sharpness={self.sharpness.item():.4g}, threshold={self.threshold.item():.4g}"

    def mask(self, attention: Tensor) -> Tensor:
        """Soft mask of unscaled attention: scaled per image to [0, 1], then Sigma. float (B, h, w) -> (B, h, w).

        A constant map, such as attention that is zero everywhere, masks next to nothing: sigmoid(-a b).
        """
        attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
        return soft_mask(scale_map(attention), sharpness=self.sharpness, threshold=self.threshold)

    def forward(
        self,
        embed: Callable[[Inputs], Tensor],
        erase: Callable[[Inputs, Tensor], Inputs],
        inputs: tuple[Inputs, Inputs, Inputs],
        attention: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """L_sm of B triples, in the domain of photos or of features.

        Args:
            embed: inputs -> embeddings float (B, D).
            erase: (inputs, mask) -> inputs: `mask_images` for photos float (B, 3, H, W), `mask_features` for a tuple
                of levels float (B, C, h, w), or one's own.
            inputs: of anchor, positive and negative.
            attention: of anchor, positive and negative, float (B, h, w) each, not negative and unscaled, from
                ``gradient_attention(..., create_graph=True)``; without a graph the mask is a constant.

        Returns:
            Scalar, to be weighted by gamma and added to the metric loss.
        """
        anchor, positive, negative = (
            embed(erase(image, self.mask(image_attention)))
            for image, image_attention in zip(inputs, attention, strict=True)
        )
        return similarity_mining_loss(anchor, positive, negative)
