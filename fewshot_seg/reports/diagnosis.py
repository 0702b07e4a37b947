"""Why a class scores as it does, in plain words: from the counts that an evaluation keeps of every episode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewshot_seg.findings import Finding
from fewshot_seg.metrics import Float64Array, bootstrap_weights, pooled_miou
from fewshot_seg.reports.run_folders import ReportedEpisode, ReportedRun

FAILED = 10.0
"""IoU in percent below which an episode counts as failed."""
_SMALL, _LARGE = 0.05, 0.25
_ENOUGH = 3
"""Episodes on each side before objects of two sizes are compared."""
_CLEAR = 10.0
"""Points of IoU that are worth a sentence."""
_WORTH = 7.0
"""Points that better thresholds must bring before they are called a part of the problem; some always bring a few."""
_LEANS = 1.5
"""How many times one kind of error outweighs the other before it is called the main one."""
_CONFUSED = 0.25
"""Share of the wrong area on another class from which on this is the main fault."""
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassDiagnosis:
    """One class of a run; all but IoU, `episodes` and `failed` need findings and are None without them.

    Attributes:
        name: of the class.
        iou, low, high: as in the results, with the 95% bootstrap interval over the class's episodes, percent.
        episodes: their number.
        failed: how many are below `FAILED`.
        missed: percent of the object's pixels that were not marked.
        wrong: percent of the marked pixels that are no object.
        parts: rightly marked, missed and wrongly marked percent of the union of object and marks; sum 100.
        mean_iou: mean IoU of its episodes (not pooled: comparable with `best_iou` alone).
        best_iou: the same, had every photo the threshold that suits it best.
        size: median share of the photo that the object covers, percent.
        by_size: (episodes, IoU) of objects below 5 %, up to 25 % and above 25 % of the photo.
        confusions: (other class, percent of the wrong area that lies on it), the largest first.
        fault: the main fault in few words.
        reasons: sentences.
    """

    name: str
    iou: float
    low: float | None
    high: float | None
    episodes: int
    failed: int
    missed: float | None
    wrong: float | None
    parts: tuple[float, float, float] | None
    mean_iou: float | None
    best_iou: float | None
    size: float | None
    by_size: tuple[tuple[int, float], ...]
    confusions: tuple[tuple[str, float], ...]
    fault: str
    reasons: tuple[str, ...]


def diagnose(run: ReportedRun) -> list[ClassDiagnosis]:
    """Every class of the run, the lowest IoU first."""
    by_class: dict[str, list[ReportedEpisode]] = {}
    for episode in run.episodes:
        by_class.setdefault(episode.class_name, []).append(episode)
    per_class, miou = run.results["per_class"], float(run.results["miou"][0])
    found = [_diagnose(name, float(per_class[name]), of_class, run, miou) for name, of_class in by_class.items()]
    return sorted(found, key=lambda one: (one.iou, one.name))


def _diagnose(
    name: str, iou: float, episodes: Sequence[ReportedEpisode], run: ReportedRun, miou: float
) -> ClassDiagnosis:
    failed = sum(episode.iou < FAILED for episode in episodes)
    findings = [episode.finding for episode in episodes if episode.finding is not None]
    if len(findings) < len(episodes):
        return ClassDiagnosis(
            name=name, iou=iou, low=None, high=None, episodes=len(episodes), failed=failed, missed=None, wrong=None,
            parts=None, mean_iou=None, best_iou=None, size=None, by_size=(), confusions=(),
            fault="", reasons=(_below(iou, miou), *_failures(failed, len(episodes))),
        )  # fmt: skip
    target, marked, both = (sum(getattr(one, part) for one in findings) for part in ("target", "found", "both"))
    union = max(target + marked - both, 1)
    low, high = pooled_interval(findings)
    missed, wrong = 100 * (target - both) / max(target, 1), 100 * (marked - both) / max(marked, 1)
    best = [one.best_iou for one in findings if one.best_iou is not None]
    mean = float(np.mean([episode.iou for episode in episodes]))
    best_iou = float(np.mean(best)) if len(best) == len(findings) else None
    by_size, confusions = _by_size(findings), _confusions(findings, run)
    fault = _fault(target - both, marked - both, mean, best_iou, iou, confusions)
    reasons = (
        _below(iou, miou),
        _errors(missed, wrong, target - both, marked - both),
        *_confused(marked - both, confusions, _on_no_class(findings, confusions)),
        *_cut(mean, best_iou),
        *_sizes(by_size),
        *_failures(failed, len(episodes)),
    )
    return ClassDiagnosis(
        name=name,
        iou=iou,
        low=low,
        high=high,
        episodes=len(episodes),
        failed=failed,
        missed=missed,
        wrong=wrong,
        parts=(100 * both / union, 100 * (target - both) / union, 100 * (marked - both) / union),
        mean_iou=mean,
        best_iou=best_iou,
        size=100 * float(np.median([one.target / max(one.scored, 1) for one in findings])),
        by_size=by_size,
        confusions=confusions,
        fault=fault,
        reasons=reasons,
    )


def pooled_interval(findings: Sequence[Finding], *, resamples: int = _RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval over the episodes of one class: of the sums' quotient, as mIoU takes it, in percent."""
    weights = bootstrap_weights(len(findings), resamples=resamples, seed=seed)
    scores, _ = pooled_miou(way_counts(findings), np.zeros((len(findings), 1), np.int64), weights)
    low, high = np.percentile(scores, (2.5, 97.5)).tolist()
    return low, high


def way_counts(findings: Sequence[Finding]) -> Float64Array:
    """Intersection and union of 1-way episodes as `pooled_miou` takes them: float64 (N, 1, 2)."""
    return np.array([[(one.both, one.union)] for one in findings], np.float64)


def _by_size(findings: Sequence[Finding]) -> tuple[tuple[int, float], ...]:
    groups: list[list[Finding]] = [[], [], []]
    for one in findings:
        share = one.target / max(one.scored, 1)
        groups[(share >= _SMALL) + (share > _LARGE)].append(one)
    return tuple(
        (len(group), 100 * sum(one.both for one in group) / max(sum(one.union for one in group), 1)) for group in groups
    )


def _confusions(findings: Sequence[Finding], run: ReportedRun) -> tuple[tuple[str, float], ...]:
    wrong = sum(one.found - one.both for one in findings)
    pixels = Counter[int]()
    for one in findings:
        pixels.update(one.on_others)
    return tuple(
        (run.class_names.get(class_id, f"class {class_id}"), 100 * count / max(wrong, 1))
        for class_id, count in pixels.most_common()
    )


def _on_no_class(findings: Sequence[Finding], confusions: Sequence[tuple[str, float]]) -> float:
    """Percent of the wrong area that carries no other label."""
    claimed = [one.on_any_other for one in findings if one.on_any_other is not None]
    if len(claimed) < len(findings):  # of an earlier version: pixels of overlapping labels count more than once
        return max(0.0, 100 - sum(share for _, share in confusions))
    wrong = sum(one.found - one.both for one in findings)
    return 100 * (wrong - sum(claimed)) / max(wrong, 1)


def _fault(
    missed: int, wrong: int, mean: float, best: float | None, iou: float, confusions: Sequence[tuple[str, float]]
) -> str:
    """The main fault in few words."""
    if iou >= 75:  # nothing to complain of
        return "works"
    if wrong > missed and confusions and confusions[0][1] >= 100 * _CONFUSED:
        return f"marks {confusions[0][0]}, too"
    cut = best is not None and best - mean >= 1.5 * _CLEAR
    if missed > _LEANS * wrong:
        return "misses parts; threshold too high for many photos" if cut else "misses parts of the object"
    if wrong > _LEANS * missed:
        return "marks too much; threshold too low for many photos" if cut else "marks too much"
    return "threshold does not suit the photos" if cut else "errs both ways alike"


def _below(iou: float, miou: float) -> str:
    difference = iou - miou
    place = (
        "about as good as the mean of the classes"
        if abs(difference) < 1
        else f"{abs(difference):.0f} points {'above' if difference > 0 else 'below'} the mean of the classes"
    )
    return f"{place.capitalize()}."


def _errors(missed: float, wrong: float, missed_pixels: int, wrong_pixels: int) -> str:
    numbers = f"{missed:.0f} % of the object is missed, and {wrong:.0f} % of what is marked is something else"
    if missed_pixels > _LEANS * wrong_pixels:
        return f"It mainly misses the object: {numbers}."
    if wrong_pixels > _LEANS * missed_pixels:
        return f"It mainly marks too much: {numbers}."
    return f"It misses about as much as it marks wrongly: {numbers}."


def _confused(wrong_pixels: int, confusions: Sequence[tuple[str, float]], rest: float) -> tuple[str, ...]:
    named = [(name, share) for name, share in confusions[:3] if share >= 5]
    if not wrong_pixels:
        return ()
    if not named:
        return ("What is marked wrongly lies on background, hardly ever on another labelled class.",)
    listed = ", ".join(f"{share:.0f} % {'on' if n else 'lies on'} {name}" for n, (name, share) in enumerate(named))
    return (f"Of what is marked wrongly, {listed}, and {rest:.0f} % on no labelled class.",)


def _cut(mean: float, best: float | None) -> tuple[str, ...]:
    if best is None:
        return ()
    numbers = f"the mean IoU of its photos is {mean:.0f} %, and the best threshold for every single photo would give"
    if best - mean >= 1.5 * _CLEAR:
        return (f"Much of it is the threshold: {numbers} {best:.0f} %.",)
    if best - mean >= _WORTH:
        return (f"Part of it is the threshold: {numbers} {best:.0f} %.",)
    if best < 60:
        return (
            f"Another threshold would not help, it takes other things for the object: {numbers} only {best:.0f} %.",
        )
    return (f"The threshold suits: {numbers} {best:.0f} %.",)


def _sizes(by_size: Sequence[tuple[int, float]]) -> tuple[str, ...]:
    names = (
        "small objects (below 5 % of the photo)",
        "middle-sized objects",
        "large objects (above 25 % of the photo)",
    )
    known = [(iou, count, name) for (count, iou), name in zip(by_size, names, strict=True) if count >= _ENOUGH]
    if len(known) < 2:
        return ()
    (low, few, worst), (high, _, best) = min(known), max(known)
    if high - low < _CLEAR:
        return ("The size of the object makes little difference.",)
    return (f"{worst.capitalize()} are the hard ones: IoU {low:.0f} % ({few} episodes), of {best} {high:.0f} %.",)


def _failures(failed: int, episodes: int) -> tuple[str, ...]:
    if not failed:
        return ()
    return (f"{failed} of {episodes} episodes fail altogether (IoU below {FAILED:.0f} %).",)


def episode_fault(episode: ReportedEpisode, run: ReportedRun) -> tuple[str, str]:
    """(key, sentence) of one episode: key is ``good``, ``missed``, ``wrong``, ``confused`` or ``unknown``."""
    one = episode.finding
    if one is None:
        return "unknown", ""
    missed, wrong = one.target - one.both, one.found - one.both
    parts = [
        f"{100 * missed / max(one.target, 1):.0f} % of the object missed",
        f"{100 * wrong / max(one.found, 1):.0f} % of the marked area wrong" if one.found else "nothing marked",
    ]
    confused = max(one.on_others.items(), key=lambda item: item[1], default=(0, 0))
    if confused[1] > 0.1 * max(wrong, 1):
        parts[1] += f" ({100 * confused[1] / max(wrong, 1):.0f} % of that on {run.class_names.get(confused[0], '?')})"
    parts.append(f"object covers {100 * one.target / max(one.scored, 1):.0f} % of the photo")
    if one.best_iou is not None:
        parts.append(f"best threshold would give {one.best_iou:.0f} %")
    if episode.iou >= 75:
        key = "good"
    elif wrong > missed:
        key = "confused" if confused[1] > _CONFUSED * wrong else "wrong"
    else:
        key = "missed"
    return key, "; ".join(parts) + "."
