"""The table of explainers: means over episodes with bootstrap intervals, from the records of `explainer_scores`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fewshot_seg.explainer_scores import SIDES
from fewshot_seg.metrics import Float64Array
from fewshot_seg.report import Table

Bounds = tuple[float, float, float]
"""Value, and the ends of its 95% interval."""

METRICS: Mapping[str, bool] = {
    "deletion, similarity": False,
    "insertion, similarity": True,
    "deletion, mIoU": False,
    "insertion, mIoU": True,
    "pointing game": True,
    "energy inside": True,
    "sanity": False,
}
"""Of each side, and whether higher is better."""


def summarise(
    records: Sequence[Mapping[str, Any]], *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Bounds]]:
    """Explainer -> metric -> value and 95% interval, percentiles of a bootstrap over episodes, the same for all.

    Metrics are ``SIDE: METRIC`` with those of `METRICS`, in percent, and ``forward`` and ``backward``, passes:

    - similarity: area under the curve, less that of a straight line between both ends, in hundredths of a cosine:
      below 0 for a deletion that hits what counts, above 0 for such an insertion;
    - mIoU: area under the curve of the mIoU, intersections and unions pooled per class over episodes;
    - pointing game, energy inside: share of episodes, mean share of the map;
    - sanity: mean rank correlation, without sign, with the map of a network of random weights; only of the episodes
      that have it, and left out where none has.
    """
    count = len(records)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    weights = np.concatenate([np.ones((1, count)), draws]).astype(np.float64)
    classes = np.asarray([record["class_id"] for record in records])
    membership = (classes[:, None] == np.unique(classes)).astype(np.float64)
    found: dict[str, dict[str, Bounds]] = {}
    for name in records[0]["explainers"]:
        entries = [record["explainers"][name] for record in records]
        scores: dict[str, Bounds] = {}
        for side in SIDES:
            measured = [entry[side] for entry in entries]
            for mode in ("deletion", "insertion"):
                ends = [(record[side]["whole"], record[side]["blank"]) for record in records]
                curves = {
                    key: np.asarray(
                        [
                            _curve(one[mode][key], *(end[key] for end in pair), mode)
                            for one, pair in zip(measured, ends, strict=True)
                        ]
                    )
                    for key in ("similarity", "intersection", "union")
                }
                scores[f"{side}: {mode}, similarity"] = _bounds(_similarity_area(curves["similarity"]), weights)
                pooled = _miou_area(curves["intersection"], curves["union"], membership)
                scores[f"{side}: {mode}, mIoU"] = _bounds(pooled, weights)
            for key, metric in (("pointing", "pointing game"), ("energy", "energy inside")):
                scores[f"{side}: {metric}"] = _bounds(_mean_of([one[key] for one in measured]), weights)
            if any("sanity" in one for one in measured):
                alike = [one.get("sanity", np.nan) for one in measured]
                scores[f"{side}: sanity"] = _bounds(_mean_of(alike), weights)
        for key in ("forward", "backward"):
            passes = float(np.mean([entry[key] for entry in entries]))
            scores[key] = (passes, passes, passes)
        found[name] = scores
    return found


Statistic = Callable[[Float64Array], Float64Array]
"""Weights of episodes float64 (R, N) -> values float64 (R,)."""


def _bounds(statistic: Statistic, weights: Float64Array) -> Bounds:
    values = 100 * statistic(weights)
    low, high = np.nanpercentile(values[1:], (2.5, 97.5))
    return float(values[0]), float(low), float(high)


def _curve(inner: Sequence[float], whole: float, blank: float, mode: str) -> list[float]:
    return [whole, *inner, blank] if mode == "deletion" else [blank, *inner, whole]


def _area(curves: Float64Array) -> Float64Array:
    return np.asarray(np.trapezoid(curves, dx=1 / (curves.shape[-1] - 1), axis=-1))


def _similarity_area(curves: Float64Array) -> Statistic:
    # a straight line between both ends has no area of its own: what is left is the map's doing
    gains = _area(curves) - (curves[:, 0] + curves[:, -1]) / 2

    def of(weights: Float64Array) -> Float64Array:
        return (weights @ gains) / weights.sum(axis=1)

    return of


def _miou_area(intersection: Float64Array, union: Float64Array, membership: Float64Array) -> Statistic:
    def of(weights: Float64Array) -> Float64Array:
        present = weights @ membership > 0
        both, either = (np.einsum("rn,nc,ns->rcs", weights, membership, part) for part in (intersection, union))
        iou = np.where(either > 0, both / np.maximum(either, 1), 1.0)
        curve = (iou * present[..., None]).sum(axis=1) / present.sum(axis=1)[:, None]
        return _area(curve)

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
    tables = {}
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
