"""How K supports become one mask.

``pooled`` is the segmenter's own way: the cells of all supports speak together, once. The other rules run the model K
times, with one support each, and merge the K results:

- ``vote``: HSNet (Min et al., ICCV 2021; `predict_mask_nshot` of its code): K masks are added, divided by the largest
  sum, and cut at one half.
- ``mean``: mean of the K logits. PFENet (Tian et al., TPAMI 2020) takes the mean one step earlier, of the K prototypes
  and of the K priors, and decodes once; the mean of the logits asks nothing of the model's inside. The two are the
  same for a model whose logits are linear in both.
- ``reweighted``: as ``mean``, with weights. BAM (Lang et al., CVPR 2022, its K-shot setting) derives them from the
  distance of the Gram matrices of low-level features of query and support, with two learned layers on top, and
  weights prototypes and priors. Here nothing is learned: the weights are the softmax of minus the distance in units
  of the mean distance, and the logits are weighted.

With a single support all rules give the same mask.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.protocols import ShotRule
from episodes.types import DataError

SHOT_RULES: tuple[ShotRule, ...] = get_args(ShotRule)


def check_shot_rule(rule: str) -> None:
    """Raises DataError for a name that is none of `SHOT_RULES`."""
    if rule not in SHOT_RULES:
        raise DataError(f"no K-shot rule {rule!r}; known are: {', '.join(SHOT_RULES)}")


def gram_matrices(features: Tensor) -> Tensor:
    """Cosine of every two channels over the cells: float (..., C, h, w) -> (..., C, C).

    As `get_gram_matrix` of BAM's code. A channel that is zero everywhere has cosine 0 with all.
    """
    cells = F.normalize(features.flatten(-2), dim=-1)
    return cells @ cells.transpose(-1, -2)


def gram_distances(query: Tensor, supports: Tensor) -> Tensor:
    """Frobenius distance of the Gram matrices of a query and each of its supports (BAM): how they differ in style.

    Args:
        query: float (B, C, h, w), low-level features.
        supports: float (B, K, C, h, w).

    Returns:
        float (B, K).
    """
    distances: Tensor = torch.linalg.matrix_norm(gram_matrices(supports) - gram_matrices(query)[:, None])
    return distances


def distance_weights(distances: Tensor) -> Tensor:
    """Softmax of minus the distances in units of their mean: float (B, K), not negative -> (B, K), sums of 1.

    Equal distances, also those of 0, give equal weights.

    >>> distance_weights(torch.tensor([[0.5, 0.5]]))
    tensor([[0.5000, 0.5000]])
    """
    mean = distances.mean(dim=-1, keepdim=True)
    return torch.softmax(-distances / torch.where(mean > 0, mean, 1), dim=-1)


def weighted_margins(logits: Tensor, weights: Tensor, threshold: float) -> Tensor:
    """Weighted sum of K logits above the threshold: (B, K, H, W) and weights (B, K) -> (B, H, W); foreground > 0."""
    return (logits * weights[:, :, None, None]).sum(dim=1) - threshold


def vote_margins(logits: Tensor, threshold: float) -> Tensor:
    """Votes of K masks: float (B, K, H, W) -> (B, H, W), greater than 0 where HSNet's rule says foreground.

    The value is the share of the largest number of votes in the image (at least 1), less one half. HSNet counts
    exactly one half as foreground; a quarter of the smallest step keeps "greater than 0" true of all rules.

    >>> logits = torch.tensor([[[[1.0, 1.0, -1.0]], [[1.0, -1.0, -1.0]]]])  # 2, 1 and 0 votes
    >>> vote_margins(logits, 0.0) > 0
    tensor([[[ True,  True, False]]])
    """
    votes = (logits > threshold).sum(dim=1).to(logits.dtype)
    share = votes / votes.amax(dim=(1, 2), keepdim=True).clamp_min(1)
    return share - 0.5 + 1 / (4 * logits.shape[1])


def merge_shots(logits: Tensor, weights: Tensor, threshold: float, *, rule: ShotRule) -> Tensor:
    """One map from K: foreground where it is greater than 0.

    Args:
        logits: float (B, K, H, W) of one support each; K = 1 with ``pooled``.
        weights: float (B, K), see `shot_weights`.
        threshold: logit above which one support alone says foreground.
        rule: see the module.

    Returns:
        float (B, H, W).
    """
    if rule == "vote":
        return vote_margins(logits, threshold)
    return weighted_margins(logits, weights, threshold)


def shot_weights(query: Tensor, supports: Tensor, *, rule: ShotRule) -> Tensor:
    """Weights of the K results, float (B, K), sums of 1: by distance with ``reweighted``, else equal.

    Args:
        query: float (B, C, h, w), low-level features.
        supports: float (B, K, C, h, w).
        rule: see the module.
    """
    if rule == "reweighted":
        return distance_weights(gram_distances(query, supports))
    shape = supports.shape[:2]
    return query.new_full(shape, 1 / shape[1])
