"""Losses of episodic training: the mask's (cross-entropy and Dice) and those of similarity and attention maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import IGNORE


def segmentation_loss(logits: Tensor, targets: Tensor, *, dice_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy plus soft Dice, each per episode, averaged.

    Dice as in V-Net (Milletari et al., arXiv 1606.04797), with plain sums where V-Net sums squares, smoothed by 1.

    Args:
        logits: float (B, H, W); half precision is summed in float32.
        targets: uint8 (B, H, W), 1 = foreground, 0 = background, 255 = ignore.
        dice_weight: weight of the Dice term; 0 leaves cross-entropy alone.

    Returns:
        Scalar. An episode without valid pixels adds nothing.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 256 x 256 pixels overflow float16
    valid = (targets != IGNORE).to(logits.dtype)
    foreground = (targets == 1).to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, foreground, reduction="none")
    per_episode = (cross_entropy * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
    if dice_weight:
        probability = logits.sigmoid() * valid
        overlap = (probability * foreground).sum((1, 2))
        # + 1 keeps the term finite and rewards an empty answer to an empty mask.
        dice = (2 * overlap + 1) / (probability.sum((1, 2)) + foreground.sum((1, 2)) + 1)
        per_episode = per_episode + dice_weight * (1 - dice)
    return per_episode.mean()


def balanced_map_loss(margin: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Metric loss of a dense embedding: cells of the query's object must be nearer the support's object.

    Binary cross-entropy of a signed similarity margin per query cell, object and background weighing the same
    whatever their areas (otherwise the many background cells decide).

    Args:
        margin: float (B, N), > 0 where the cell is nearer the support's foreground than its background.
        foreground: float (B, N), fraction of the cell that is object.
        background: float (B, N), fraction of the cell that is background; ignored area is in neither.

    Returns:
        Scalar. A side that is absent from an episode adds nothing.
    """
    similar = (F.softplus(-margin) * foreground).sum(1) / foreground.sum(1).clamp_min(1e-3)
    dissimilar = (F.softplus(margin) * background).sum(1) / background.sum(1).clamp_min(1e-3)
    return (similar + dissimilar).mean()


def attention_map_loss(attention: Tensor, foreground: Tensor, background: Tensor, *, sharpness: float = 2.0) -> Tensor:
    """`balanced_map_loss` of an attention map whose unit and zero mean nothing: what counts is its shape.

    The map is centred between the mean of the object's cells and that of the background's, and divided by its
    standard deviation over the photo. Gradient attention comes in units that differ by orders of magnitude between
    forms and photos, and is scaled per photo before anyone looks at it.

    Args:
        attention: float (B, N), with its sign (before the ReLU, whose zero side would carry no gradient).
        foreground, background: as in `balanced_map_loss`.
        sharpness: the standard deviation counts as this many logits.

    Returns:
        Scalar. An episode that lacks a side adds nothing: without both there is no middle to compare with.

    Example:
        >>> attention, objects = torch.tensor([[4.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> attention_map_loss(attention, objects, 1 - objects), attention_map_loss(7 * attention, objects, 1 - objects)
        (tensor(0.2539), tensor(0.2539))
    """
    of_object = (attention * foreground).sum(1) / foreground.sum(1).clamp_min(1e-3)
    of_background = (attention * background).sum(1) / background.sum(1).clamp_min(1e-3)
    centred = attention - ((of_object + of_background) / 2)[:, None]
    spread = attention.std(dim=1, keepdim=True) if attention.shape[1] > 1 else torch.zeros_like(attention)
    spread = spread.clamp_min(torch.finfo(attention.dtype).tiny ** 0.5)
    both = ((foreground.sum(1) > 0) & (background.sum(1) > 0))[:, None]
    return balanced_map_loss(sharpness * centred / spread, foreground * both, background * both)
