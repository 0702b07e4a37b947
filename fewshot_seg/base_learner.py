"""What the base classes look like: a linear classifier of cells that tells a novel object from objects already known.

BAM (Lang et al., CVPR 2022, "Learning What Not to Segment") trains a base learner on the base classes and suppresses in
a query what it recognises: of two alike regions, the one that is a known other class is not the novel object. Ours is
one linear layer over the frozen features, and it gives maps to the decoder instead of a rule. What the supports
themselves show is never suppressed, so that a class which was trained on can still be asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.priors import COSINE_UNIT

EVIDENCE_CHANNELS = ("other base class", "any base class", "commonness")
"""Names of the maps of `photo_evidence`, in order."""

_SHARPNESS = 0.1  # cells have unit variance per channel and hundreds of channels: keeps the first logits small
_LEAST = 1e-4  # of a probability in a logarithm


class BaseLearner(nn.Module):
    """Class probabilities of every cell, linear in its frozen features.

    Args:
        feature_channels: channels D of the frozen features.
        classes: number C of base classes; the background comes last.

    Raises:
        DataError: a size below 1.
    """

    def __init__(self, *, feature_channels: int, classes: int) -> None:
        super().__init__()
        if min(feature_channels, classes) < 1:
            raise DataError(
                f"a base learner needs at least one feature channel and one class, got {feature_channels} and {classes}"
            )
        self.feature_channels, self.classes = feature_channels, classes
        self.weight = nn.Parameter(torch.zeros(classes + 1, feature_channels))
        self.bias = nn.Parameter(torch.zeros(classes + 1))

    def description(self) -> dict[str, Any]:
        """Arguments that build it again."""
        return {"feature_channels": self.feature_channels, "classes": self.classes}

    def logits(self, cells: Tensor) -> Tensor:
        """Unit-length cells float (..., D) -> float (..., C + 1)."""
        return F.linear(cells, self.weight * (_SHARPNESS * self.feature_channels**0.5), self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Unit-length cells float (N, D, h, w) -> probabilities float (N, C + 1, h, w), background last."""
        return self.logits(features.movedim(1, -1)).softmax(dim=-1).movedim(-1, 1)


def class_profile(probabilities: Tensor, foreground: Tensor) -> Tensor:
    """How much each base class is seen in the supports' object, relative to the one seen most.

    Args:
        probabilities: float (B, C + 1, M), background last.
        foreground: float (B, M), fraction of each cell that is object.

    Returns:
        float (B, C) in [0, 1].
    """
    return relative_to_largest(torch.einsum("bcm,bm->bc", probabilities[:, :-1], foreground))


def relative_to_largest(seen: Tensor) -> Tensor:
    """`class_profile` of probabilities that were summed over the object before: float (B, C) -> float (B, C).

    C may be 0, without a base learner.
    """
    return seen / seen.amax(dim=1, keepdim=True).clamp_min(1e-12) if seen.shape[1] else seen


def photo_evidence(probabilities: Tensor, profile: Tensor, features: Tensor) -> Tensor:
    """Maps of the query that do not come from comparing it with the supports.

    Args:
        probabilities: float (B, C + 1, h, w) of the query, background last.
        profile: float (B, C), or (1, C) for all, `class_profile` of the supports.
        features: unit-length cells float (B, D, h, w) of the query.

    Returns:
        float (B, 3, h, w): logarithm of the probability of base classes that the supports do not show; logit of any
        base class; cosine to the mean of the photo's cells, in tenths.
    """
    other = (probabilities[:, :-1] * (1 - profile)[:, :, None, None]).sum(dim=1)
    known = (1 - probabilities[:, -1]).clamp(_LEAST, 1 - _LEAST)
    return torch.stack([(other + _LEAST).log(), known.log() - (1 - known).log(), commonness(features)], dim=1)


def commonness(features: Tensor) -> Tensor:
    """float (N, D, h, w), unit-length cells -> float (N, h, w): cosine to their mean, in tenths.

    What fills most of a photo is like its mean; objects stand out.
    """
    mean = F.normalize(features.mean(dim=(2, 3)), dim=1)
    return torch.einsum("ndhw,nd->nhw", features, mean) / COSINE_UNIT


def base_class_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of cells against the shares of the classes in them, rare classes weighing more.

    A class weighs with the inverse square root of its area among these cells.

    Args:
        logits: float (M, C + 1).
        shares: float (M, C + 1), fractions of the cell; what is ignored is in none.

    Returns:
        Scalar.
    """
    weights = shares.sum(dim=0).clamp_min(1).rsqrt()
    weights = weights / weights.mean()
    return -(shares * logits.log_softmax(dim=1) * weights).sum() / shares.sum().clamp_min(1e-6)
