"""PANet (Wang et al., ICCV 2019, arXiv 1908.06391): one prototype of the object, one of the background.

As the paper and its code have it: masked average pooling of either side, the shots' prototypes averaged; cosine of
every query cell with both, times 20, softmax; prototype alignment as the second loss, weight 1, in which the query's
predicted mask gives the prototypes that must segment the supports.

Other than there: the paper fine-tunes VGG-16; here the backbone is frozen, and a residual 1 x 1 embedding of the
joined levels is trained (`SimilarityNetwork`, as ours, of rank 64). Pooling is over cells, weighted by the fraction of
each that the mask covers, where the code enlarges the features to the mask's pixels; cells are of unit length. The mask
loss is cross-entropy plus Dice, as for all methods here, where the paper has cross-entropy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.rivals.model import EpisodeModel, joined_maps, query_loss, support_weights
from fewshot_seg.similarity import SimilarityNetwork

SCALE = 20.0
"""What cosines are multiplied by (alpha of eq. 3)."""


def pooled_prototype(maps: Tensor, weights: Tensor) -> Tensor:
    """Mean over shots of the masked averages (eq. 1 and 2).

    Args:
        maps: float (B, K, D, h, w).
        weights: float (B, K, h, w), fraction of each cell.

    Returns:
        float (B, D). A shot without the side counts as zero, which leaves the direction to the others.
    """
    sums = torch.einsum("bkdhw,bkhw->bkd", maps, weights)
    return (sums / weights.sum(dim=(2, 3))[:, :, None].clamp_min(1e-5)).mean(dim=1)


def prototype_logits(maps: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Log-odds of the softmax over both scaled cosines (eq. 3): scale * (cos to object - cos to background).

    Args:
        maps: float (B, K, D, h, w), cells of K photos an episode.
        foreground, background: float (B, D).

    Returns:
        float (B, K, h, w).
    """
    cells = F.normalize(maps, dim=2)
    direction = F.normalize(foreground, dim=1) - F.normalize(background, dim=1)
    return SCALE * torch.einsum("bkdhw,bd->bkhw", cells, direction)


def alignment_loss(
    query: Tensor, query_logits: Tensor, supports: Tensor, foreground: Tensor, background: Tensor
) -> Tensor:
    """Prototype alignment regularisation (eq. 7 and 8): the query as support, the supports as queries.

    Args:
        query: float (B, D, h, w).
        query_logits: float (B, h, w); the predicted mask is where they are greater than 0, without gradient.
        supports: float (B, K, D, h, w).
        foreground, background: float (B, K, h, w), truth of the supports as fractions of each cell.

    Returns:
        Scalar: cross-entropy, mean over cells, shots and episodes. Nothing predicted adds nothing, as in the code.
    """
    predicted = (query_logits > 0).to(query.dtype)[:, None]
    as_support = query[:, None]
    logits = prototype_logits(
        supports, pooled_prototype(as_support, predicted), pooled_prototype(as_support, 1 - predicted)
    )
    wrong = foreground * F.softplus(-logits) + background * F.softplus(logits)
    per_shot = wrong.sum(dim=(2, 3)) / (foreground + background).sum(dim=(2, 3)).clamp_min(1e-5)
    return (per_shot.mean(dim=1) * predicted.flatten(1).any(dim=1)).mean()


class PrototypeNetwork(EpisodeModel):
    """PANet-style prototypes over a trained 1 x 1 embedding.

    Args:
        channels: of the backbone's levels, finest first.
        rank: rank of the embedding's residual; 0 trains nothing.
        alignment: weight of the prototype alignment loss.
        seed: of the initial values.
    """

    def __init__(self, channels: Sequence[int], *, rank: int = 64, alignment: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.embedding, self.alignment = SimilarityNetwork(channels, rank=rank, seed=seed), alignment

    def description(self) -> dict[str, Any]:
        """See `EpisodeModel.description`."""
        return {"rank": self.embedding.rank, "alignment": self.alignment}

    def forward(self, batch: FeatureBatch) -> Tensor:
        """See `EpisodeModel.forward`; one map."""
        return self._read(batch)[1]

    def losses(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Mask loss plus prototype alignment."""
        query, logits, supports, foreground, background = self._read(batch)
        mask_loss = query_loss(logits, batch)
        alignment = alignment_loss(query, logits[:, 0], supports, foreground, background)
        return {
            "loss": mask_loss + self.alignment * alignment,
            "mask_loss": mask_loss.detach(),
            "alignment_loss": alignment.detach(),
        }

    def _read(self, batch: FeatureBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Query maps, logits (B, 1, h, w), support maps, foreground, background."""
        query, supports = joined_maps(batch)
        query, shape = self.embedding.turn(query), supports.shape
        supports = self.embedding.turn(supports.flatten(0, 1)).reshape(shape)
        foreground, background = support_weights(batch, (shape[3], shape[4]))
        of_object, of_other = (pooled_prototype(supports, side) for side in (foreground, background))
        return query, prototype_logits(query[:, None], of_object, of_other), supports, foreground, background
