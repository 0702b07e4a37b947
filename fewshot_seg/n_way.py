"""Scores of N-way episodes: N one-way runs that share the query compete with each other and with the background."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from episodes.protocols import Fit, ShotRule
from episodes.types import IGNORE, DataError, EpisodeSpec, MaskSource
from fewshot_seg.distributed import gather_dealt
from fewshot_seg.encoded_photos import EncodedPhotos
from fewshot_seg.episode_logits import ShotLogits, shot_logits, square_targets
from fewshot_seg.evaluation import batches_of_rank, check_repeats
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.metrics import EpisodeIoU, Float64Array, IoUResult, mean_result
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.shot_rules import check_shot_rule


@dataclass(frozen=True, kw_only=True, slots=True)
class NWayEvaluation:
    """Scores by class, see `evaluate_n_way`.

    Attributes:
        result: mean of the repeats; `per_class` is over the episodes in which the class is a way.
        repeats: result of every repeat, pooled over its own episodes.
        specs: the N specs of every episode.
        way_iou: float64 (episodes, N), percent, same order.
        seconds: of the whole evaluation.
    """

    result: IoUResult
    repeats: tuple[IoUResult, ...]
    specs: tuple[tuple[EpisodeSpec, ...], ...]
    way_iou: Float64Array
    seconds: float


def n_way_masks(margins: Tensor, means: Tensor, class_ids: Tensor) -> Tensor:
    """Which way has each pixel.

    The background's score is 0 and wins where no way is above it. Ways with equal scores (which votes often have) are
    told apart by the mean of their supports' logits, and if these are equal, too, by class id: not by their place in
    the episode, since the class of way 0 is always in the query.

    Args:
        margins: float (B, N, H, W), logit less threshold of every way.
        means: float (B, N, H, W), the mean of the supports' logits.
        class_ids: int64 (B, N).

    Returns:
        int64 (B, H, W), 0 = background, w = way w, from 1.

    Example:
        >>> margins = torch.tensor([[[[-1.0, 2.0, 0.0]], [[-2.0, 3.0, -1.0]]]])  # two ways, three pixels
        >>> n_way_masks(margins, margins, torch.tensor([[4, 7]]))
        tensor([[[0, 2, 0]]])
    """
    best = margins.amax(dim=1)
    among_best = means.masked_fill(margins < best[:, None], -torch.inf)
    order = class_ids.argsort(dim=1)  # argmax takes the first of equals
    by_class = among_best.gather(1, order[:, :, None, None].expand_as(among_best)).argmax(dim=1)
    ways = order.gather(1, by_class.flatten(1)).view_as(by_class) + 1
    return torch.where(best > 0, ways, 0)


def n_way_targets(masks: Tensor) -> Tensor:
    """One label map from a query's mask per way: uint8 (B, N, H, W) of 0, 1, 255 -> uint8 (B, H, W) of 0..N, 255.

    A pixel is ignored where any way's mask ignores it, and where two ways claim it (instances of COCO overlap).

    >>> n_way_targets(torch.tensor([[[[1, 0, 0, 1, 0]], [[0, 1, 0, 1, 255]]]], dtype=torch.uint8))
    tensor([[[  1,   2,   0, 255, 255]]], dtype=torch.uint8)
    """
    shown = masks == 1
    numbers = torch.arange(1, masks.shape[1] + 1, device=masks.device)[:, None, None]
    labels = (shown * numbers).sum(dim=1).to(torch.uint8)
    return labels.masked_fill((masks == IGNORE).any(dim=1) | (shown.sum(dim=1) > 1), IGNORE)


def evaluate_n_way(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    ways: int,
    scoring_size: int | None,
    source: MaskSource,
    fit: Fit = "squash",
    shot_rule: ShotRule = "pooled",
    repeats: int = 1,
    support_cells: int | None = None,
    batch_size: int = 10,
    show_progress: bool = False,
) -> NWayEvaluation:
    """mIoU and FB-IoU over N-way episodes.

    Every pixel goes to the way with the largest logit above the segmenter's threshold, or to the background.
    Intersections and unions are summed per class over all episodes in which the class is a way, whether the query
    shows it or not; mIoU is the mean over classes. FB-IoU compares any object with the background. Intervals are
    of a bootstrap over episodes. With one way this is `evaluation.evaluate`.

    Args:
        segmenter: model, with its threshold.
        episodes: N one-way episodes after another for each N-way episode, as `episodes.n_way.NWaySampler` draws them.
        ways: N.
        scoring_size, source, fit, shot_rule, show_progress: see `evaluation.evaluate`.
        repeats: the N-way episodes are so many equal parts one after another; the result is their mean.
        batch_size: N-way episodes at a time; does not change the scores.

    Raises:
        DataError: episodes that are not groups of N ways with one query and distinct classes, an unknown rule, or
            episodes that are not so many equal parts.
    """
    check_shot_rule(shot_rule)
    if not 1 <= ways < IGNORE:
        raise DataError(f"the number of ways must be in 1..{IGNORE - 1}, got {ways}")
    if len(episodes) % ways:
        raise DataError(f"{len(episodes)} one-way episodes are no whole number of {ways}-way episodes")
    check_repeats(len(episodes) // ways, repeats)
    parts, began = list[tuple[EpisodeIoU, list[tuple[EpisodeSpec, ...]]]](), time.perf_counter()
    decoders = {"decoder": segmenter.decoder}
    encoded = EncodedPhotos(segmenter, support_cells=support_cells)
    for batch in batches_of_rank(episodes, batch_size, show_progress, "evaluating", ways=ways):
        groups = [batch.specs[row : row + ways] for row in range(0, len(batch.specs), ways)]
        _check_groups(groups)
        side, metric = scoring_size or batch.query_masks.shape[-1], EpisodeIoU(ways)
        logits = shot_logits(segmenter, decoders, batch, (side, side), rule=shot_rule, encoded=encoded)
        if scoring_size is None:
            _score_at_original(metric, logits, segmenter.threshold, groups, source, fit)
        else:
            _score_at_square(metric, logits, segmenter.threshold, batch, ways)
        parts.append((metric, groups))
    parts = gather_dealt(parts)
    metric = EpisodeIoU.joined([one for one, _ in parts])
    results = tuple(part.compute() for part in metric.split(repeats))
    return NWayEvaluation(
        result=mean_result(results),
        repeats=results,
        specs=tuple(group for _, groups in parts for group in groups),
        way_iou=metric.way_iou(),
        seconds=time.perf_counter() - began,
    )


def _check_groups(groups: list[tuple[EpisodeSpec, ...]]) -> None:
    for group in groups:
        queries, classes = {spec.query_id for spec in group}, [spec.class_id for spec in group]
        if len(queries) > 1 or len(set(classes)) < len(classes):
            raise DataError(
                f"the ways of an episode share the query and have distinct classes; got queries {sorted(queries)} and "
                f"classes {classes}: draw the episodes with NWaySampler and as many ways"
            )


def _score_at_square(metric: EpisodeIoU, logits: ShotLogits, threshold: float, batch: FeatureBatch, ways: int) -> None:
    margins, means = (
        _by_episode(one.margins("decoder", threshold), ways) for one in (logits, replace(logits, rule="mean"))
    )
    targets = n_way_targets(_by_episode(square_targets(batch, margins.shape[-1]), ways))
    class_ids = _by_episode(torch.tensor(batch.class_ids), ways)
    metric.update(n_way_masks(margins, means, class_ids), targets, class_ids)


def _by_episode(rows: Tensor, ways: int) -> Tensor:
    """(B * N, ...) -> (B, N, ...)."""
    return rows.reshape(-1, ways, *rows.shape[1:])


def _score_at_original(
    metric: EpisodeIoU,
    logits: ShotLogits,
    threshold: float,
    groups: list[tuple[EpisodeSpec, ...]],
    originals: MaskSource,
    fit: Fit,
) -> None:
    for number, group in enumerate(groups):
        masks = torch.stack([torch.from_numpy(originals.mask(spec.query_id, spec.class_id)) for spec in group])
        shape, rows = (masks.shape[1], masks.shape[2]), range(number * len(group), (number + 1) * len(group))
        margins, means = (
            torch.stack([one.resized_margins("decoder", threshold, row, shape, fit) for row in rows])[None]
            for one in (logits, replace(logits, rule="mean"))
        )
        class_ids = torch.tensor([[spec.class_id for spec in group]])
        metric.update(n_way_masks(margins, means, class_ids), n_way_targets(masks[None]), class_ids)
