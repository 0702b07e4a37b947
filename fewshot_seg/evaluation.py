"""Scores over episodes: the model's masks, the best threshold on base classes, and bare prior maps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from episodes.types import DataError, EpisodeSpec, MaskSource
from fewshot_seg.attention import AttentionKind
from fewshot_seg.decoder import MaskDecoder, PriorReadout
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.metrics import EpisodeIoU, Float64Array, IoUResult, intersection_union, prior_scores
from fewshot_seg.priors import PRIOR_CHANNELS, pfenet_prior, soft_margin_attention
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import join_levels


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Pooled scores with intervals, and per episode its spec and IoU in percent, float64 (N,)."""

    result: IoUResult
    specs: tuple[EpisodeSpec, ...]
    episode_iou: Float64Array
    seconds: float


Decoder = MaskDecoder | PriorReadout


@torch.no_grad()
def head_logits(
    segmenter: FewShotSegmenter, decoders: Mapping[str, Decoder], batch: FeatureBatch, size: tuple[int, int]
) -> dict[str, Tensor]:
    """Logits float (B, H, W) of several decoders that read one segmenter's priors, computed once."""
    batch = batch.to(next(segmenter.backbone.parameters()).device)
    support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
    maps = segmenter.similarity(batch.query_levels)
    priors = segmenter.prior_maps(support, batch.query_levels, maps)
    features = join_levels(batch.query_levels)
    return {
        name: F.interpolate(
            decoder(priors, features, support.prototype)[:, None], size, mode="bilinear", align_corners=False
        )[:, 0].cpu()
        for name, decoder in decoders.items()
    }


def evaluate(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    scoring_size: int | None,
    source: MaskSource,
    batch_size: int = 10,
    show_progress: bool = False,
) -> Evaluation:
    """mIoU and FB-IoU over all episodes.

    Args:
        segmenter: model, with its threshold.
        episodes: what is scored.
        scoring_size: side of the square at which masks are compared; None compares at the label's original size.
        source: original masks, read only when scoring_size is None.
        batch_size: episodes at a time; does not change the scores.
        show_progress: bar with time left on stderr.
    """
    return evaluate_heads(
        segmenter,
        {"decoder": (segmenter.decoder, segmenter.threshold)},
        episodes,
        scoring_size=scoring_size,
        source=source,
        batch_size=batch_size,
        show_progress=show_progress,
    )["decoder"]


def evaluate_heads(
    segmenter: FewShotSegmenter,
    heads: Mapping[str, tuple[Decoder, float]],
    episodes: FeatureEpisodes,
    *,
    scoring_size: int | None,
    source: MaskSource,
    batch_size: int = 10,
    show_progress: bool = False,
) -> dict[str, Evaluation]:
    """As `evaluate`, for several (decoder, threshold) that read the same priors, in one pass over the episodes."""
    metrics = {name: EpisodeIoU() for name in heads}
    specs, began = list[EpisodeSpec](), time.perf_counter()
    decoders = {name: decoder for name, (decoder, _) in heads.items()}
    for batch in _progress(episodes, batch_size, show_progress, "evaluating"):
        side = scoring_size or batch.query_masks.shape[-1]
        for name, logits in head_logits(segmenter, decoders, batch, (side, side)).items():
            _score(metrics[name], logits, heads[name][1], batch, source if scoring_size is None else None)
        specs.extend(batch.specs)
    seconds = time.perf_counter() - began
    return {
        name: Evaluation(result=metric.compute(), specs=tuple(specs), episode_iou=metric.episode_iou(), seconds=seconds)
        for name, metric in metrics.items()
    }


def _score(
    metric: EpisodeIoU, logits: Tensor, threshold: float, batch: FeatureBatch, originals: MaskSource | None
) -> None:
    """Add a batch; with `originals`, each query at its label's own size."""
    if originals is None:
        metric.update(logits > threshold, _targets(batch, logits.shape[-1]), batch.class_ids)
        return
    for one, spec in zip(logits, batch.specs, strict=True):
        target = torch.from_numpy(originals.mask(spec.query_id, spec.class_id))[None]
        resized = F.interpolate(one[None, None], target.shape[1:], mode="bilinear", align_corners=False)
        metric.update(resized[0] > threshold, target, [spec.class_id])


def choose_threshold(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    batch_size: int = 10,
    candidates: int = 41,
    show_progress: bool = False,
) -> tuple[float, float]:
    """The single threshold with the best mIoU on these episodes, which must not be of the test fold.

    Candidates are spaced evenly between the 2nd and the 98th percentile of all logits.

    Returns:
        (threshold, its mIoU in percent).
    """
    return choose_thresholds(
        segmenter,
        {"decoder": segmenter.decoder},
        episodes,
        batch_size=batch_size,
        candidates=candidates,
        show_progress=show_progress,
    )["decoder"]


def choose_thresholds(
    segmenter: FewShotSegmenter,
    decoders: Mapping[str, Decoder],
    episodes: FeatureEpisodes,
    *,
    batch_size: int = 10,
    candidates: int = 41,
    show_progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """As `choose_threshold`, for several decoders that read the same priors."""
    if candidates < 2:
        raise DataError(f"choosing a threshold needs at least 2 candidates, got {candidates}")
    kept: dict[str, list[Tensor]] = {name: [] for name in decoders}
    targets, class_ids = list[Tensor](), list[int]()
    for batch in _progress(episodes, batch_size, show_progress, "choosing threshold"):
        # a quarter of the side is enough to place one threshold, and keeps all logits in memory
        side = -(-batch.query_masks.shape[-1] // 4)
        for name, logits in head_logits(segmenter, decoders, batch, (side, side)).items():
            kept[name].append(logits)
        targets.append(_targets(batch, side))
        class_ids.extend(batch.class_ids)
    target = torch.cat(targets)
    return {name: _best_threshold(torch.cat(logits), target, class_ids, candidates) for name, logits in kept.items()}


def _best_threshold(logits: Tensor, targets: Tensor, class_ids: Sequence[int], candidates: int) -> tuple[float, float]:
    low, high = np.percentile(logits.numpy(), (2, 98))
    scored = []
    for threshold in np.linspace(low, high, candidates).tolist():
        sums: dict[int, Float64Array] = {}
        for class_id, count in zip(
            class_ids, intersection_union(logits > threshold, targets)[:, 1].numpy(), strict=True
        ):
            sums[class_id] = sums.get(class_id, np.zeros(2)) + count
        scored.append((100 * float(np.mean([i / max(u, 1) for i, u in sums.values()])), threshold))
    miou, threshold = max(scored)
    return threshold, miou


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
    for batch in _progress(episodes, batch_size, show_progress, "scoring priors"):
        side = -(-batch.query_masks.shape[-1] // 4)
        targets = _targets(batch, side)
        for name, maps in _all_maps(segmenter, batch, kinds).items():
            resized = F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
            scores = [prior_scores(one, target) for one, target in zip(resized, targets, strict=True)]
            collected.setdefault(name, []).extend(scores)
    return {name: _summary(np.asarray(scores)) for name, scores in collected.items()}


def _all_maps(segmenter: FewShotSegmenter, batch: FeatureBatch, kinds: Sequence[AttentionKind]) -> dict[str, Tensor]:
    batch = batch.to(next(segmenter.backbone.parameters()).device)
    support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
    maps = segmenter.similarity(batch.query_levels)
    priors = segmenter.prior_maps(support, batch.query_levels, maps)
    named = {_SHOWN_AS.get(name, name): priors[:, channel] for channel, name in enumerate(PRIOR_CHANNELS)}
    for kind in kinds:
        named[f"gradient attention: {kind}"] = segmenter.attention_maps(
            support, maps, kind, second_negative=support.foreground_embedding.roll(1, 0)
        )
    cells = maps.flatten(2).transpose(1, 2)
    sides = support.foreground, support.background
    elementwise = soft_margin_attention(cells, support.cells, *sides, temperature=segmenter.temperature)
    named["gradient attention: soft margin, element-wise"] = elementwise.reshape(len(maps), *maps.shape[-2:])
    named["PFENet"] = pfenet_prior(join_levels(batch.query_levels), support.frozen, support.frozen_foreground)
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


def _targets(batch: FeatureBatch, side: int) -> Tensor:
    masks = batch.query_masks
    if side == masks.shape[-1]:
        return masks
    return F.interpolate(masks[:, None], (side, side), mode="nearest-exact")[:, 0]


def _progress(episodes: FeatureEpisodes, batch_size: int, show_progress: bool, title: str) -> Iterator[FeatureBatch]:
    with tqdm(total=len(episodes), desc=title, unit="episode", disable=not show_progress) as bar:
        for batch in episodes.batches(batch_size):
            yield batch
            bar.update(len(batch.specs))
