"""How well bare prior maps rank the pixels of episodes, without a decoder and without a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import IGNORE, DataError
from fewshot_seg.attention import AttentionKind
from fewshot_seg.episode_logits import batches_with_progress, square_targets
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.metrics import Float64Array
from fewshot_seg.priors import PRIOR_CHANNELS, pfenet_prior, soft_margin_attention
from fewshot_seg.segmenter import FewShotSegmenter


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorScore:
    """Mean over episodes of AUC and of the IoU at each episode's best threshold, in [0, 1], with 95% intervals."""

    auc: tuple[float, float, float]
    best_iou: tuple[float, float, float]
    episodes: int


@torch.no_grad()
def evaluate_priors(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    kinds: Sequence[AttentionKind],
    batch_size: int = 10,
    show_progress: bool = False,
) -> Mapping[str, PriorScore]:
    """Every map of `PRIOR_CHANNELS`, every attention form, PFENet's prior, and a map of zeros, scored per episode.

    Attention forms are rectified, as defined; that of the margin is there with its sign, too, as the decoder reads it.
    The map of zeros says what an uninformative map scores.

    A map is upsampled to a quarter of the mask's side and compared there. The segmenter's prior must be
    ``similarity``; the quadruplet's second negative is the object of the neighbouring episode in the batch.

    Raises:
        DataError: a segmenter with another prior, or no episode whose query mask has both sides.
    """
    if segmenter.prior != "similarity":
        raise DataError(f"scoring prior maps needs a model with prior 'similarity', got {segmenter.prior!r}")
    collected: dict[str, list[tuple[float, float]]] = {}
    for batch in batches_with_progress(episodes, batch_size, show_progress, "scoring priors"):
        side = -(-batch.query_masks.shape[-1] // 4)
        targets = square_targets(batch, side)
        for name, maps in _all_maps(segmenter, batch, kinds).items():
            resized = F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
            scores = [prior_scores(one, target) for one, target in zip(resized, targets, strict=True)]
            collected.setdefault(name, []).extend(scores)
    return {name: _summary(np.asarray(scores)) for name, scores in collected.items()}


def _all_maps(segmenter: FewShotSegmenter, batch: FeatureBatch, kinds: Sequence[AttentionKind]) -> dict[str, Tensor]:
    batch = batch.to(next(segmenter.backbone.parameters()).device)
    support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks, batch.support_dense)
    photos = segmenter.photo_maps(batch.query_levels)
    maps, priors = photos.cells, segmenter.priors_of(support, photos)
    named = {_SHOWN_AS.get(name, name): priors[:, channel] for channel, name in enumerate(PRIOR_CHANNELS)}
    for kind in kinds:
        named[f"gradient attention: {kind}"] = segmenter.attention_maps(
            support, maps, kind, second_negative=support.foreground_embedding.roll(1, 0)
        )
    cells = maps.flatten(2).transpose(1, 2)
    sides = support.foreground, support.background
    elementwise = soft_margin_attention(cells, support.cells, *sides, temperature=segmenter.temperature)
    named["gradient attention: soft margin, element-wise"] = elementwise.reshape(len(maps), *maps.shape[-2:])
    named["PFENet"] = pfenet_prior(photos.frozen, support.frozen, support.frozen_foreground)
    named["nothing"] = torch.zeros_like(named["PFENet"])
    return named


_SHOWN_AS = {"gradient attention": "gradient attention: margin, signed"}


def _summary(scores: Float64Array) -> PriorScore:
    defined = scores[~np.isnan(scores).any(axis=1)]
    if not len(defined):
        raise DataError("no query mask shows both object and background at a quarter of its side; use more episodes")
    bounds = []
    for column in defined.T:
        if len(column) == 1:  # a single value says nothing about how much others would differ
            bounds.append((float(column[0]), 0.0, 1.0))
            continue
        mean, error = float(column.mean()), 1.96 * float(column.std(ddof=1)) / len(column) ** 0.5
        bounds.append((mean, mean - error, mean + error))
    return PriorScore(auc=bounds[0], best_iou=bounds[1], episodes=len(defined))


def prior_scores(prior: Tensor, target: Tensor) -> tuple[float, float]:
    """How well a map ranks the pixels of one episode: AUC and the IoU at the best threshold, both in [0, 1].

    Args:
        prior: float (H, W), any scale.
        target: uint8 (H, W), 255 ignored.

    Returns:
        (AUC, best IoU): the AUC is the Mann-Whitney statistic, ties counted half; the best IoU is exact over
        all thresholds "value >= t". NaN both where the target lacks foreground or background.

    Raises:
        ValueError: shapes differ, or the map holds NaN.
    """
    if prior.shape != target.shape:
        raise ValueError(f"prior {tuple(prior.shape)} and target {tuple(target.shape)} differ in shape")
    prior, target = prior.detach().cpu(), target.cpu()
    if prior.isnan().any():
        raise ValueError("prior holds NaN; a map to be ranked must be finite")
    valid = target != IGNORE
    values = prior[valid].double()
    positive = target[valid] == 1
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return float("nan"), float("nan")
    order = values.argsort(descending=True)
    sorted_values, hits = values[order], positive[order].double()
    true_positives, predicted = hits.cumsum(0), torch.arange(1, len(hits) + 1, dtype=torch.float64)
    last_of_tie = torch.cat([sorted_values[1:] != sorted_values[:-1], torch.tensor([True])])
    true_positives, predicted = true_positives[last_of_tie], predicted[last_of_tie]
    best_iou = (true_positives / (positives + predicted - true_positives)).max()
    recall = torch.cat([torch.zeros(1), true_positives / positives])
    fallout = torch.cat([torch.zeros(1), (predicted - true_positives) / negatives])
    return float(torch.trapezoid(recall, fallout)), float(best_iou)
