"""Scores of few-shot segmentation.

mIoU as the field computes it: intersections and unions are summed per class over all episodes, then divided,
then averaged over classes. This is not the mean of per-image IoU: on two episodes the two can be 0.83 and 0.50.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from episodes.types import IGNORE

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


def intersection_union(predictions: Tensor, targets: Tensor) -> Tensor:
    """Pixel counts per episode; ignored pixels never count.

    Args:
        predictions: bool or uint8 (B, H, W), nonzero = foreground.
        targets: uint8 (B, H, W), 1 = foreground, 0 = background, 255 = ignore.

    Returns:
        int64 (B, 2, 2): [background, foreground] x [intersection, union].

    Raises:
        ValueError: shapes differ.

    Example:
        >>> intersection_union(torch.tensor([[[1, 1, 0]]]), torch.tensor([[[1, 0, 255]]]))
        tensor([[[0, 1],
                 [1, 2]]])
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} differ in shape")
    valid = targets != IGNORE
    counts = []
    for value in (False, True):
        predicted = ((predictions != 0) == value) & valid
        actual = ((targets == 1) == value) & valid
        counts.append(torch.stack([(predicted & actual).sum((1, 2)), (predicted | actual).sum((1, 2))], dim=1))
    return torch.stack(counts, dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class IoUResult:
    """Scores in percent (0-100). `per_class` maps class id to IoU; low/high are 95% bootstrap bounds over episodes.

    An empty union (nothing to find and nothing found) counts as a perfect answer.
    """

    miou: float
    miou_low: float
    miou_high: float
    fb_iou: float
    fb_iou_low: float
    fb_iou_high: float
    per_class: Mapping[int, float]
    episodes: int


class EpisodeIoU:
    """Accumulates episodes; order and batching do not matter, to the intervals neither.

    Example:
        >>> metric = EpisodeIoU()
        >>> target = torch.tensor([[[1, 1, 0, 0]]], dtype=torch.uint8)
        >>> metric.update(torch.tensor([[[1, 0, 0, 0]]]), target, [7])
        >>> round(metric.compute().miou, 1)
        50.0
    """

    def __init__(self) -> None:
        self._counts: list[Int64Array] = []
        self._class_ids: list[int] = []

    def update(self, predictions: Tensor, targets: Tensor, class_ids: Sequence[int] | Tensor) -> None:
        """Add B episodes; see `intersection_union` for shapes. class_ids: B label values."""
        counts = intersection_union(predictions, targets).cpu().numpy()
        ids = [int(class_id) for class_id in class_ids]
        if len(ids) != len(counts):
            raise ValueError(f"got {len(counts)} episodes and {len(ids)} class ids")
        self._counts.extend(counts)
        self._class_ids.extend(ids)

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def counts(self) -> Int64Array:
        """int64 (N, 2, 2), one entry an episode, in the order of the updates."""
        return np.stack(self._counts) if self._counts else np.zeros((0, 2, 2), np.int64)

    def episode_iou(self) -> Float64Array:
        """Foreground IoU of every episode in percent (for galleries, not for mIoU). float64 (N,)."""
        foreground = self.counts[:, 1].astype(np.float64)
        return 100 * _ratio(foreground[:, 0], foreground[:, 1])

    def compute(self, *, resamples: int = 1000, seed: int = 0) -> IoUResult:
        """Scores and their 95% intervals: percentiles of a bootstrap over episodes.

        Args:
            resamples: number of resamples, each of as many episodes as were added.
            seed: seed of the resampling.

        Raises:
            ValueError: no episode was added.
        """
        if not self._counts:
            raise ValueError("EpisodeIoU.compute needs at least one episode; call update first")
        counts, class_ids = self.counts.astype(np.float64), np.asarray(self._class_ids)
        canonical = np.lexsort((*counts.reshape(-1, 4).T, class_ids))  # or resamples would depend on the order
        counts, class_ids = counts[canonical], class_ids[canonical]
        classes, of_class = np.unique(class_ids, return_inverse=True)
        once = np.ones((1, len(counts)))
        miou, fb_iou, per_class = _pooled_scores(counts, of_class, len(classes), once)
        draws = np.random.default_rng(seed).multinomial(
            len(counts), np.full(len(counts), 1 / len(counts)), size=resamples
        )
        miou_draws, fb_draws, _ = _pooled_scores(counts, of_class, len(classes), draws.astype(np.float64))
        miou_low, miou_high = np.percentile(miou_draws, (2.5, 97.5))
        fb_low, fb_high = np.percentile(fb_draws, (2.5, 97.5))
        return IoUResult(
            miou=float(miou[0]),
            miou_low=float(miou_low),
            miou_high=float(miou_high),
            fb_iou=float(fb_iou[0]),
            fb_iou_low=float(fb_low),
            fb_iou_high=float(fb_high),
            per_class={int(c): float(v) for c, v in zip(classes, per_class[0], strict=True)},
            episodes=len(counts),
        )


def _ratio(intersection: Float64Array, union: Float64Array) -> Float64Array:
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)  # an empty union is a perfect answer


def _pooled_scores(
    counts: Float64Array, of_class: npt.NDArray[np.intp], classes: int, repeats: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """mIoU (R,), FB-IoU (R,), per-class IoU (R, classes) of R weightings of the episodes; NaN-free means.

    A class that a resample happens to miss is left out of that resample's mean.
    """
    membership = np.eye(classes)[of_class]  # (N, classes)
    intersection = repeats @ (membership * counts[:, 1, :1])
    union = repeats @ (membership * counts[:, 1, 1:])
    present = repeats @ membership > 0
    per_class = _ratio(intersection, union)
    miou = (per_class * present).sum(1) / present.sum(1)
    pooled = np.einsum("rn,nij->rij", repeats, counts)
    return 100 * miou, 100 * _ratio(pooled[..., 0], pooled[..., 1]).mean(1), 100 * per_class


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
