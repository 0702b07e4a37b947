"""Runs side by side: scores, paired differences, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewshot_seg.metrics import Float64Array
from fewshot_seg.reports.diagnosis import resample_weights
from fewshot_seg.reports.run_folders import ReportedRun

_RESAMPLES = 1000
_IGNORED = frozenset({"out", "cache", "cache_gigabytes", "workers", "batch_size", "report_episodes", "device"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """mIoU of a run less that of the first, in points, with the 95% interval over the same episodes."""

    value: float
    low: float
    high: float


def paired_difference(
    run: ReportedRun, first: ReportedRun, *, resamples: int = _RESAMPLES, seed: int = 0
) -> Difference | None:
    """By a bootstrap that draws the same episodes for both; None where the episodes or their repeats differ.

    Of several repeats the pooled mIoU over all episodes is taken, not the mean of repeats.
    """
    same = run.results["episodes_fingerprint"] == first.results["episodes_fingerprint"]
    if not same or any(episode.finding is None for one in (run, first) for episode in one.episodes):
        return None
    weights = np.concatenate([np.ones((1, len(run.episodes))), resample_weights(len(run.episodes), resamples, seed)])
    scores = _miou(run, weights) - _miou(first, weights)
    low, high = np.percentile(scores[1:], (2.5, 97.5)).tolist()
    return Difference(value=float(scores[0]), low=low, high=high)


def _miou(run: ReportedRun, weights: Float64Array) -> Float64Array:
    """mIoU in percent of weighted episodes: (R, N) -> (R,). Classes that a row does not draw are left out of it."""
    names = np.array([episode.class_name for episode in run.episodes])
    findings = [episode.finding for episode in run.episodes if episode.finding is not None]
    counts = np.array([(one.both, one.union) for one in findings], np.float64)
    total, drawn = np.zeros(len(weights)), np.zeros(len(weights))
    for name in np.unique(names):
        chosen = weights[:, names == name]
        both, union = (chosen @ counts[names == name]).T
        present = chosen.sum(axis=1) > 0
        total += np.where(union > 0, both / np.maximum(union, 1), 1.0) * present
        drawn += present
    return 100 * total / drawn


def differing_settings(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """(setting, value in every run) of the settings that are not the same in all; where it runs is left out."""
    configurations: list[dict[str, Any]] = [dict(run.record["configuration"]) for run in runs]
    names = sorted({name for one in configurations for name in one} - _IGNORED)
    rows = [(name, [one.get(name) for one in configurations]) for name in names]
    return [
        (name, ["-" if v is None else str(v) for v in values])
        for name, values in rows
        if any(v != values[0] for v in values)
    ]


def run_names(runs: Sequence[ReportedRun]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]  # the same folder twice
