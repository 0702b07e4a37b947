"""What all rivals share: a model of episodes of frozen features, and how it reads a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.protocols import ShotRule
from episodes.types import DataError
from fewshot_seg.episode_logits import ShotLogits
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.losses import segmentation_loss
from fewshot_seg.similarity import cell_weights, join_levels

_LOSS_STRIDE = 4  # as in the training of ours: the mask loss looks at every 4th pixel

HEAD = "rival"
"""Name of a rival's maps in `ShotLogits`."""


class EpisodeModel(nn.Module, ABC):
    """Finds in a query what one or more supports show, from frozen features of both.

    Attributes:
        shot_rule: how the V maps of `forward` become one mask; ``pooled`` where V is 1.
    """

    shot_rule: ShotRule = "pooled"

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What it is, JSON-able: its sizes."""

    @abstractmethod
    def forward(self, batch: FeatureBatch) -> Tensor:
        """Logits float (B, V, h, w) of B queries, foreground where greater than 0; V maps, see `shot_rule`.

        Raises:
            DataError: supports that are marked by less than a mask, or that show no object.
        """

    def losses(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Named scalars, the one to minimise as ``loss``: `segmentation_loss` of the query's mask."""
        loss = query_loss(self(batch), batch)
        return {"loss": loss, "mask_loss": loss.detach()}


def query_loss(logits: Tensor, batch: FeatureBatch) -> Tensor:
    """`segmentation_loss` of maps float (B, V, h, w) against the query's mask: the same one as ours."""
    targets = batch.query_masks[:, _LOSS_STRIDE // 2 :: _LOSS_STRIDE, _LOSS_STRIDE // 2 :: _LOSS_STRIDE]
    size = (targets.shape[1], targets.shape[2])
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return segmentation_loss(resized.flatten(0, 1), targets.repeat_interleave(logits.shape[1], dim=0))


def joined_maps(batch: FeatureBatch) -> tuple[Tensor, Tensor]:
    """Unit-length cells of all levels joined: queries float (B, D, h, w), supports float (B, K, D, h, w)."""
    queries, supports = join_levels(batch.query_levels), join_levels(batch.support_levels)
    return queries, supports.reshape(*batch.support_masks.shape[:2], *supports.shape[1:])


def support_weights(batch: FeatureBatch, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Fraction of every support cell that is object, and that is background, float (B, K, h, w) each.

    Raises:
        DataError: supports that are marked by less than a mask, or that show no object.
    """
    if not bool(batch.support_dense.all()):
        raise DataError("rival methods read masks only; draw episodes whose supports are masks")
    if not bool((batch.support_masks == 1).flatten(1).any(dim=1).all()):
        raise DataError("a support mask has no foreground: expected at least one pixel of the object (value 1)")
    shape = (*batch.support_masks.shape[:2], *size)
    foreground, background = cell_weights(batch.support_masks.flatten(0, 1), size)
    return foreground.reshape(shape), background.reshape(shape)


@torch.no_grad()
def rival_logits(model: EpisodeModel, batch: FeatureBatch, size: tuple[int, int]) -> ShotLogits:
    """Logits of size (H, W), on the CPU: what `fewshot_seg.evaluation` scores and chooses thresholds on."""
    parameter = next(model.parameters(), None)
    logits = model(batch if parameter is None else batch.to(parameter.device))
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=False).cpu()
    return ShotLogits(heads={HEAD: resized}, weights=resized.new_ones(resized.shape[:2]), rule=model.shot_rule)
