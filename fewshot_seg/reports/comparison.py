"""Runs side by side: scores, paired differences, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewshot_seg.metrics import Float64Array, bootstrap_weights, pooled_miou
from fewshot_seg.reports.diagnosis import way_counts
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
    episodes = len(run.episodes)
    weights = np.concatenate([np.ones((1, episodes)), bootstrap_weights(episodes, resamples=resamples, seed=seed)])
    scores = _miou(run, weights) - _miou(first, weights)
    low, high = np.percentile(scores[1:], (2.5, 97.5)).tolist()
    return Difference(value=float(scores[0]), low=low, high=high)


def _miou(run: ReportedRun, weights: Float64Array) -> Float64Array:
    """mIoU in percent of weighted episodes: (R, N) -> (R,)."""
    _, classes = np.unique([episode.class_name for episode in run.episodes], return_inverse=True)
    findings = [episode.finding for episode in run.episodes if episode.finding is not None]
    return pooled_miou(way_counts(findings), classes[:, None], weights)[0]


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
