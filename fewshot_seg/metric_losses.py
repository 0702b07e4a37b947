"""Metric losses over a batch of embeddings with class labels, and the mining of the pairs that they look at.

Losses and miners are those of pytorch-metric-learning, in configurations that draw nothing at random; the quadruplet
loss, which it lacks, is ours. Distances are Euclidean between unit-length embeddings.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.types import DataError

MetricLossKind = Literal["contrastive", "triplet", "quadruplet", "multi-similarity"]
METRIC_LOSSES: tuple[MetricLossKind, ...] = get_args(MetricLossKind)

DEFAULT_MARGINS: dict[MetricLossKind, float] = {
    "contrastive": 1.0,
    "triplet": 0.2,  # FaceNet
    "quadruplet": 0.2,  # that of the triplet: its first term is one
    "multi-similarity": 0.5,  # the authors' code, github.com/msight-tech/research-ms-loss
}


class MetricLoss(nn.Module):
    """A loss over the pairs, triplets or quadruplets that a miner finds in the batch.

    Args:
        loss: called with embeddings, labels and the miner's indices (None: all that the batch holds).
        miner: called with embeddings and labels, returns a tuple of indices.
    """

    def __init__(self, loss: nn.Module, miner: nn.Module | None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of a batch; 0, with a gradient of zeros, where nothing in it can be compared.

        Args:
            embeddings: float (N, D), L2-normalised (normalised again here); half precision is computed in float32.
            labels: integer (N,), the class of each.

        Raises:
            DataError: wrong shapes, or labels that are no integers.
        """
        if embeddings.ndim != 2 or not len(embeddings):
            raise DataError(f"metric loss expects embeddings (N, D) with N >= 1, got shape {tuple(embeddings.shape)}")
        if labels.shape != embeddings.shape[:1]:
            raise DataError(
                f"metric loss expects one label per embedding, shape ({len(embeddings)},), "
                f"got shape {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise DataError(f"metric loss expects integer labels, got {labels.dtype}")
        labels = labels.to(embeddings.device)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        indices = None if self.miner is None else self.miner(embeddings, labels)
        value: Tensor = self.loss(embeddings, labels, indices)
        return value


def build_metric_loss(kind: MetricLossKind, *, margin: float | None = None, mine: bool = True) -> MetricLoss:
    """A metric loss by name. d is the Euclidean distance, S the cosine similarity of two embeddings.

    - ``contrastive``: d of positive pairs plus [margin - d]_+ of negative pairs, margin 1 (Hadsell et al., CVPR 2006,
      with distances where they square them). Mined as multi-similarity is.
    - ``triplet``: [d(a,p)^2 - d(a,n)^2 + margin]_+, margin 0.2, all semi-hard triplets of the batch: the negative is
      further than the positive, by less than the margin (Schroff et al., FaceNet, arXiv 1503.03832).
    - ``quadruplet``: see `quadruplet_loss`; margin 0.2 and half of it, the ratio of the paper's two weights. Mined:
      for every anchor its furthest positive, its nearest negative, and the nearest to that one of a third class.
    - ``multi-similarity``: Wang et al., arXiv 1904.06627, alpha 2, beta 50; the margin is its lambda, 0.5. Mined by
      its rule, epsilon 0.1: a negative pair counts if S > (lowest S of the anchor's positive pairs) - epsilon, a
      positive pair if S < (highest S of its negative pairs) + epsilon.

    Means are over the pairs, triplets or quadruplets whose loss is above zero (as in Hermans et al., arXiv
    1703.07737), positive and negative pairs apart; multi-similarity is a mean over all images. As the library has
    it, contrastive and multi-similarity are 0 where at most one positive and one negative pair are left.

    Args:
        kind: one of `METRIC_LOSSES`.
        margin: above 0; None is the default given above.
        mine: False looks at everything the batch holds.

    Raises:
        DataError: unknown kind, or a margin that is not a number above 0.
    """
    if kind not in METRIC_LOSSES:
        raise DataError(f"unknown metric loss {kind!r}; known: {', '.join(METRIC_LOSSES)}")
    margin = DEFAULT_MARGINS[kind] if margin is None else margin
    if not (math.isfinite(margin) and margin > 0):
        raise DataError(f"margin of the metric loss must be a number above 0, got {margin}")
    if kind == "quadruplet":
        return MetricLoss(_BatchQuadruplets(margin, margin / 2), _HardestQuadruplets() if mine else None)
    return _from_library(kind, margin, mine)


def _from_library(kind: MetricLossKind, margin: float, mine: bool) -> MetricLoss:
    # Imported when asked for: it brings scipy.stats, which every command would wait for.
    from pytorch_metric_learning import distances, losses, miners

    if kind == "triplet":
        # Neither the loss nor this miner samples ("triplets_per_anchor" and DistanceWeightedMiner would).
        squared = distances.LpDistance(power=2)
        loss = losses.TripletMarginLoss(margin=margin, distance=squared, triplets_per_anchor="all")
        miner = miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard", distance=squared)
        return MetricLoss(loss, miner if mine else None)
    pairs = miners.MultiSimilarityMiner(epsilon=0.1) if mine else None
    if kind == "contrastive":
        return MetricLoss(losses.ContrastiveLoss(pos_margin=0, neg_margin=margin), pairs)
    return MetricLoss(losses.MultiSimilarityLoss(alpha=2, beta=50, base=margin), pairs)


def quadruplet_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, second_negative: Tensor, *, margin: float, second_margin: float
) -> Tensor:
    """Quadruplet loss of given quadruplets (Chen et al., "Beyond triplet loss", arXiv 1704.01719, sec. 3).

    [d(a,p)^2 - d(a,n1)^2 + margin]_+ + [d(a,p)^2 - d(n1,n2)^2 + second_margin]_+ with Euclidean d; the paper's d is
    learned. Where the paper sums, each term is the mean over the quadruplets that violate it.

    Args:
        anchor, positive, negative, second_negative: float (B, D); the negatives are of two further classes.
        margin: of the first term, the larger one.
        second_margin: of the second term, which compares pairs without a common image.

    Returns:
        Scalar; 0 where nothing is violated.

    Example:
        >>> a, p, n1, n2 = (torch.tensor([[x]]) for x in (0.0, 1.0, 2.0, 3.0))
        >>> quadruplet_loss(a, p, n1, n2, margin=3.5, second_margin=0.25)  # [1 - 4 + 3.5] + [1 - 1 + 0.25]
        tensor(0.7500)
    """
    near = (anchor - positive).square().sum(1)
    first = near - (anchor - negative).square().sum(1) + margin
    second = near - (negative - second_negative).square().sum(1) + second_margin
    return _mean_of_violations(first) + _mean_of_violations(second)


def _mean_of_violations(excess: Tensor) -> Tensor:
    violation = excess.relu()
    return violation.sum() / (violation > 0).sum().clamp_min(1)


def _fewer_than_three(labels: Tensor) -> bool:
    return len(set(labels.tolist())) < 3


class _HardestQuadruplets(nn.Module):
    """Anchor, furthest positive, nearest negative n1, and the one of a third class nearest n1: int64 (Q,) each.

    Anchors without a positive are left out; fewer than three classes give no quadruplets.
    """

    @torch.no_grad()
    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        same = labels[:, None] == labels
        others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        anchors = (same & others).any(1).nonzero()[:, 0]
        if _fewer_than_three(labels):
            anchors = anchors[:0]
        unit = F.normalize(embeddings, dim=1)
        distances = 2 - 2 * unit @ unit.T
        positives = distances.masked_fill(~(same & others), -math.inf).argmax(1)[anchors]
        negatives = distances.masked_fill(same, math.inf).argmin(1)[anchors]
        excluded = same[anchors] | same[negatives]
        second_negatives = distances[negatives].masked_fill(excluded, math.inf).argmin(1)
        return anchors, positives, negatives, second_negatives


class _BatchQuadruplets(nn.Module):
    """`quadruplet_loss` of mined quadruplets, or both its terms over all triplets and quadruplets of the batch.

    All quadruplets of a batch of N with k per class are about k N^3 / 2 numbers.
    """

    def __init__(self, margin: float, second_margin: float) -> None:
        super().__init__()
        self.margin, self.second_margin = margin, second_margin

    def forward(self, embeddings: Tensor, labels: Tensor, indices: tuple[Tensor, ...] | None) -> Tensor:
        unit = F.normalize(embeddings, dim=1)
        if indices is not None:
            a, p, n1, n2 = indices
            return quadruplet_loss(
                unit[a], unit[p], unit[n1], unit[n2], margin=self.margin, second_margin=self.second_margin
            )
        if _fewer_than_three(labels):
            return embeddings.sum() * 0
        distances = 2 - 2 * unit @ unit.T
        same = labels[:, None] == labels
        a, p = (same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)).nonzero(as_tuple=True)
        n1, n2 = (~same).triu().nonzero(as_tuple=True)
        near = distances[a, p][:, None]
        first = (near - distances[a] + self.margin)[~same[a]]
        second = (near - distances[n1, n2] + self.second_margin)[~same[a][:, n1] & ~same[a][:, n2]]
        return _mean_of_violations(first) + _mean_of_violations(second)
