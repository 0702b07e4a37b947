"""Scores of few-shot segmentation.

mIoU as the field computes it: intersections and unions are summed per class over all episodes, then divided,
then averaged over classes. This is not the mean of per-image IoU: on two episodes the two can be 0.83 and 0.50.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    counts = [_count(*one) for one in zip(_array(predictions) != 0, _array(targets), strict=True)]
    return torch.tensor(counts, dtype=torch.int64).reshape(-1, 2, 2)


def _count(predicted: npt.NDArray[np.bool_], target: npt.NDArray[Any]) -> list[int]:
    """Intersection and union of the background, then of the foreground. numpy counts booleans ten times faster."""
    valid, actual = target != IGNORE, target == 1
    found = predicted & valid
    whole, both = int(np.count_nonzero(valid)), int(np.count_nonzero(found & actual))
    either = int(np.count_nonzero(found)) + int(np.count_nonzero(actual)) - both
    return [whole - either, whole - both, both, either]


def _array(maps: Tensor) -> npt.NDArray[Any]:
    return maps.detach().cpu().numpy()


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

    With several ways, the IoU of a class is pooled over all episodes in which the class is a way, whether the query
    shows it or not; FB-IoU compares any object with the background; the bootstrap resamples episodes.

    Args:
        ways: classes per episode, N.

    Raises:
        ValueError: ways < 1.

    Example:
        >>> metric = EpisodeIoU()
        >>> target = torch.tensor([[[1, 1, 0, 0]]], dtype=torch.uint8)
        >>> metric.update(torch.tensor([[[1, 0, 0, 0]]]), target, [7])
        >>> round(metric.compute().miou, 1)
        50.0
    """

    def __init__(self, ways: int = 1) -> None:
        if ways < 1:
            raise ValueError(f"an episode has at least 1 way, got {ways}")
        self._ways = ways
        self._counts: list[Int64Array] = []  # of any object and the background, (2, 2) an episode
        self._way_counts: list[Int64Array] = []  # (N, 2) an episode
        self._class_ids: list[Int64Array] = []  # (N,) an episode

    def update(
        self, predictions: Tensor, targets: Tensor, class_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor
    ) -> None:
        """Add B episodes.

        Args:
            predictions: bool or integer (B, H, W): 0 = background; w = way w, from 1. With one way, any other value
                than 0 is foreground.
            targets: uint8 (B, H, W), same values, 255 = ignore.
            class_ids: B label values, or (B, N) of them with several ways, distinct within an episode.

        Raises:
            ValueError: shapes or numbers differ.
        """
        counts = intersection_union(predictions, _where_valid(targets, targets != 0)).cpu().numpy()
        ids = torch.as_tensor(class_ids, dtype=torch.int64).cpu().numpy()
        if len(ids) != len(counts):
            raise ValueError(f"got {len(counts)} episodes and {len(ids)} class ids")
        if ids.size != len(ids) * self._ways:
            raise ValueError(f"class ids of {self._ways}-way episodes have shape (B, {self._ways}), got {ids.shape}")
        if self._ways == 1:
            way_counts = counts[:, 1:]
        else:
            ways = range(1, self._ways + 1)
            each = [intersection_union(predictions == way, _where_valid(targets, targets == way)) for way in ways]
            way_counts = torch.stack([one[:, 1] for one in each], dim=1).cpu().numpy()
        self._counts.extend(counts)
        self._way_counts.extend(way_counts)
        self._class_ids.extend(ids.reshape(-1, self._ways))

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def counts(self) -> Int64Array:
        """int64 (N, 2, 2), one entry an episode, in the order of the updates."""
        return np.stack(self._counts) if self._counts else np.zeros((0, 2, 2), np.int64)

    def episode_iou(self) -> Float64Array:
        """Foreground IoU of every episode in percent (for galleries, not for mIoU), of any object. float64 (N,)."""
        foreground = self.counts[:, 1].astype(np.float64)
        return 100 * _ratio(foreground[:, 0], foreground[:, 1])

    def way_iou(self) -> Float64Array:
        """IoU of every way of every episode in percent, float64 (N, ways)."""
        counts = np.stack(self._way_counts).astype(np.float64)
        return 100 * _ratio(counts[..., 0], counts[..., 1])

    def split(self, parts: int) -> list[EpisodeIoU]:
        """Equal parts of the episodes, in the order of the updates: repeats of an evaluation.

        Raises:
            ValueError: the episodes cannot be divided so.
        """
        if parts < 1 or not len(self) or len(self) % parts:
            raise ValueError(f"{len(self)} episodes cannot be divided into {parts} equal parts")
        size, pieces = len(self) // parts, list[EpisodeIoU]()
        for start in range(0, len(self), size):
            piece, chosen = EpisodeIoU(self._ways), slice(start, start + size)
            piece._counts, piece._way_counts = self._counts[chosen], self._way_counts[chosen]
            piece._class_ids = self._class_ids[chosen]
            pieces.append(piece)
        return pieces

    @classmethod
    def joined(cls, parts: Sequence[EpisodeIoU]) -> EpisodeIoU:
        """The episodes of all parts, part after part: what `split` divides.

        Raises:
            ValueError: no part, or parts of different numbers of ways.
        """
        if len({part._ways for part in parts}) != 1:
            raise ValueError("only one or more parts of one number of ways can be joined")
        whole = cls(parts[0]._ways)
        for part in parts:
            whole._counts += part._counts
            whole._way_counts += part._way_counts
            whole._class_ids += part._class_ids
        return whole

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
        counts, way_counts = self.counts.astype(np.float64), np.stack(self._way_counts).astype(np.float64)
        class_ids, episodes = np.stack(self._class_ids), len(self)
        # episodes in a canonical order, or resamples would depend on that of the updates
        keys = (*way_counts.reshape(episodes, -1).T, *counts.reshape(episodes, -1).T, *class_ids.T)
        canonical = np.lexsort(keys)
        counts, way_counts, class_ids = counts[canonical], way_counts[canonical], class_ids[canonical]
        once, draws = np.ones((1, episodes)), bootstrap_weights(episodes, resamples=resamples, seed=seed)
        miou, per_class = pooled_miou(way_counts, class_ids, once)
        miou_draws, _ = pooled_miou(way_counts, class_ids, draws)
        fb_iou, fb_draws = _pooled_fb_iou(counts, once), _pooled_fb_iou(counts, draws)
        miou_low, miou_high = np.percentile(miou_draws, (2.5, 97.5))
        fb_low, fb_high = np.percentile(fb_draws, (2.5, 97.5))
        return IoUResult(
            miou=float(miou[0]),
            miou_low=float(miou_low),
            miou_high=float(miou_high),
            fb_iou=float(fb_iou[0]),
            fb_iou_low=float(fb_low),
            fb_iou_high=float(fb_high),
            per_class={int(c): float(v) for c, v in zip(np.unique(class_ids), per_class[0], strict=True)},
            episodes=episodes,
        )


def mean_result(results: Sequence[IoUResult]) -> IoUResult:
    """Mean of an evaluation's independent repeats, as BAM and RePRI report it (5 seeds).

    Half-widths of the intervals add in squares, as those of independent runs do, and are divided by their number. A
    class's IoU is the mean of the repeats that drew the class. A single result comes back as it is.

    Raises:
        ValueError: no result.
    """
    if not results:
        raise ValueError("mean_result needs at least one result")
    if len(results) == 1:
        return results[0]
    classes = sorted({class_id for result in results for class_id in result.per_class})
    drawn = {c: [result.per_class[c] for result in results if c in result.per_class] for c in classes}
    miou = _mean_interval([(result.miou, result.miou_low, result.miou_high) for result in results])
    fb_iou = _mean_interval([(result.fb_iou, result.fb_iou_low, result.fb_iou_high) for result in results])
    return IoUResult(
        miou=miou[0],
        miou_low=miou[1],
        miou_high=miou[2],
        fb_iou=fb_iou[0],
        fb_iou_low=fb_iou[1],
        fb_iou_high=fb_iou[2],
        per_class={class_id: sum(values) / len(values) for class_id, values in drawn.items()},
        episodes=sum(result.episodes for result in results),
    )


def _mean_interval(bounds: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    mean = sum(value for value, _, _ in bounds) / len(bounds)
    half = sum(((high - low) / 2) ** 2 for _, low, high in bounds) ** 0.5 / len(bounds)
    return mean, mean - half, mean + half


def _where_valid(targets: Tensor, foreground: Tensor) -> Tensor:
    """uint8 of 0 and 1, 255 where the targets are ignored."""
    return foreground.to(torch.uint8).masked_fill_(targets == IGNORE, IGNORE)


def _ratio(intersection: Float64Array, union: Float64Array) -> Float64Array:
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)  # an empty union is a perfect answer


def bootstrap_weights(episodes: int, *, resamples: int, seed: int) -> Float64Array:
    """How often each resample draws each episode: float64 (resamples, episodes), rows sum to the number of episodes."""
    draws = np.random.default_rng(seed).multinomial(episodes, np.full(episodes, 1 / episodes), size=resamples)
    return draws.astype(np.float64)


def pooled_miou(
    way_counts: Float64Array, class_ids: Int64Array, weights: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """mIoU of R weightings of N episodes, in percent: sums per class, their quotient, the mean over classes.

    Args:
        way_counts: float64 (N, ways, 2), intersection and union of every way.
        class_ids: int64 (N, ways).
        weights: float64 (R, N), how often an episode counts.

    Returns:
        mIoU (R,), and IoU per class (R, classes), classes ascending. A class that a weighting happens to miss is left
        out of its mean.

    Example:
        >>> counts = np.array([[[1.0, 2.0]], [[3.0, 3.0]]])
        >>> pooled_miou(counts, np.array([[7], [8]]), np.array([[1.0, 1.0], [0.0, 2.0]]))[0]
        array([ 75., 100.])
    """
    membership = (class_ids[..., None] == np.unique(class_ids)).astype(np.float64)  # (N, ways, classes)
    intersection, union = (weights @ np.einsum("nw,nwc->nc", way_counts[..., side], membership) for side in (0, 1))
    present = weights @ membership.sum(1) > 0
    per_class = _ratio(intersection, union)
    return 100 * (per_class * present).sum(1) / present.sum(1), 100 * per_class


def _pooled_fb_iou(counts: Float64Array, weights: Float64Array) -> Float64Array:
    """FB-IoU (R,) in percent of counts (N, 2, 2) and weights (R, N)."""
    pooled = np.einsum("rn,nij->rij", weights, counts)
    score: Float64Array = 100 * _ratio(pooled[..., 0], pooled[..., 1]).mean(1)
    return score
