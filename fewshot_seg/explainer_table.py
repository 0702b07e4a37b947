"""The table of explainers: means over episodes with bootstrap intervals, from the records of `explainer_scores`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fewshot_seg.explainer_scores import SIDES, Record, Side
from fewshot_seg.metrics import Float64Array, Int64Array, bootstrap_weights, pooled_miou
from fewshot_seg.report import Table

Bounds = tuple[float, float, float]
"""Value, and the ends of its 95% interval."""

Statistic = Callable[[Float64Array], Float64Array]
"""Weights of episodes float64 (R, N) -> values float64 (R,)."""

METRICS: Mapping[str, bool] = {
    "deletion, similarity": False,
    "insertion, similarity": True,
    "deletion, match": False,
    "insertion, match": True,
    "deletion, mIoU": False,
    "insertion, mIoU": True,
    "pointing game": True,
    "energy inside": True,
    "sanity": False,
}
"""Of each side, and whether higher is better."""


def summarise(records: Sequence[Record], *, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, Bounds]]:
    """Explainer -> metric -> value and 95% interval, percentiles of a bootstrap over episodes, the same for all.

    Metrics are ``SIDE: METRIC`` with those of `METRICS`, in percent, and ``forward`` and ``backward``, passes:

    - similarity: area under the curve, less that of a straight line between both ends, in hundredths of a cosine:
      below 0 for a deletion that hits what counts, above 0 for such an insertion;
    - match: likewise, of the soft margin where the object was found (`Comparison.outcomes`);
    - mIoU: area under the curve of the mIoU, intersections and unions pooled per class over episodes;
    - pointing game, energy inside: share of episodes, mean share of the map;
    - sanity: mean rank correlation, without sign, with the map of a network of random weights; only of the episodes
      that have it, and left out where none has.
    """
    count = len(records)
    weights = np.concatenate([np.ones((1, count)), bootstrap_weights(count, resamples=resamples, seed=seed)])
    class_ids = np.asarray([[record["class_id"]] for record in records], np.int64)
    found: dict[str, dict[str, Bounds]] = {}
    for name in records[0]["explainers"]:
        scores: dict[str, Bounds] = {}
        for side in SIDES:
            for metric, statistic in _statistics(records, name, side, class_ids).items():
                scores[f"{side}: {metric}"] = _bounds(statistic, weights)
        for key in ("forward", "backward"):
            passes = float(np.mean([record["explainers"][name][key] for record in records]))
            scores[key] = (passes, passes, passes)
        found[name] = scores
    return found


_MEASURED = ("similarity", "match", "intersection", "union")


def _statistics(records: Sequence[Record], name: str, side: Side, class_ids: Int64Array) -> dict[str, Statistic]:
    """What is measured of one explainer and side, by metric."""
    measured = [record["explainers"][name][side] for record in records]
    found: dict[str, Statistic] = {}
    for mode in ("deletion", "insertion"):
        curves = {key: _curves(records, measured, side, mode, key) for key in _MEASURED}
        found[f"{mode}, similarity"] = _similarity_area(curves["similarity"])
        found[f"{mode}, match"] = _similarity_area(curves["match"])
        found[f"{mode}, mIoU"] = _miou_area(curves["intersection"], curves["union"], class_ids)
    found["pointing game"] = _mean_of([one["pointing"] for one in measured])
    found["energy inside"] = _mean_of([one["energy"] for one in measured])
    if any("sanity" in one for one in measured):
        found["sanity"] = _mean_of([one.get("sanity", np.nan) for one in measured])
    return {metric: found[metric] for metric in METRICS if metric in found}


def _curves(records: Sequence[Record], measured: Sequence[Record], side: Side, mode: str, key: str) -> Float64Array:
    """float64 (N, steps + 1): the inner points between their ends."""
    first, last = ("whole", "blank") if mode == "deletion" else ("blank", "whole")
    rows = zip(records, measured, strict=True)
    return np.asarray([[record[side][first][key], *one[mode][key], record[side][last][key]] for record, one in rows])


def _bounds(statistic: Statistic, weights: Float64Array) -> Bounds:
    values = 100 * statistic(weights)
    low, high = np.nanpercentile(values[1:], (2.5, 97.5))
    return float(values[0]), float(low), float(high)


def _area(curves: Float64Array) -> Float64Array:
    return np.asarray(np.trapezoid(curves, dx=1 / (curves.shape[-1] - 1), axis=-1))


def _similarity_area(curves: Float64Array) -> Statistic:
    # a straight line between both ends has no area of its own: what is left is the map's doing
    gains = _area(curves) - (curves[:, 0] + curves[:, -1]) / 2

    def of(weights: Float64Array) -> Float64Array:
        return np.asarray((weights @ gains) / weights.sum(axis=1))

    return of


def _miou_area(intersection: Float64Array, union: Float64Array, class_ids: Int64Array) -> Statistic:
    counts = np.stack([intersection, union], axis=-1)[:, None]  # (N, 1, steps + 1, 2)

    def of(weights: Float64Array) -> Float64Array:
        points = [pooled_miou(counts[:, :, step], class_ids, weights)[0] for step in range(counts.shape[2])]
        return _area(np.stack(points, axis=-1)) / 100  # `pooled_miou` is in percent

    return of


def _mean_of(values: Sequence[float]) -> Statistic:
    array = np.asarray(values, np.float64)
    known = ~np.isnan(array)

    def of(weights: Float64Array) -> Float64Array:
        total = weights @ known
        return np.where(total > 0, (weights @ np.where(known, array, 0)) / np.maximum(total, 1e-12), np.nan)

    return of


def score_tables(scores: Mapping[str, Mapping[str, Bounds]]) -> dict[str, Table]:
    """One table a side, one row an explainer; the best of a column carries a star."""
    tables: dict[str, Table] = {}
    for side in SIDES:
        metrics = [metric for metric in METRICS if any(f"{side}: {metric}" in row for row in scores.values())]
        header = [
            "explainer",
            *(f"{metric} {'↑' if METRICS[metric] else '↓'}" for metric in metrics),
            "forward",
            "backward",
        ]
        best = {}
        for metric in metrics:
            values = [row[f"{side}: {metric}"][0] for row in scores.values()]
            best[metric] = max(values) if METRICS[metric] else min(values)
        rows = []
        for name, row in scores.items():
            cells = []
            for metric in metrics:
                value, low, high = row[f"{side}: {metric}"]
                star = "*" if value == best[metric] else ""
                cells.append(f"{value:.1f}{star} [{low:.1f}, {high:.1f}]")
            rows.append([name, *cells, f"{row['forward'][0]:g}", f"{row['backward'][0]:g}"])
        tables[side] = Table(header=header, rows=rows)
    return tables
