"""The report as one HTML file: no other file, no network, readable without its script.

All text is escaped by the template engine, and the page's own policy forbids it to load anything: pictures are data in
the file.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from episodes.files import read_bytes
from episodes.sources.decoding import open_picture, reason_of
from episodes.types import DataError
from fewshot_seg.reports.comparison import Difference, differing_settings, paired_difference, run_names
from fewshot_seg.reports.diagnosis import ClassDiagnosis, diagnose, episode_fault
from fewshot_seg.reports.gallery import landmarks
from fewshot_seg.reports.run_folders import ReportedEpisode, ReportedRun
from fewshot_seg.runtime import atomic_path

REPORT_NAME = "report.html"
PICTURE_BYTES = 4_300_000
"""Of all pictures in a page, as text: the page stays below 5 MB; the least telling episodes lose theirs first."""
_SIZES = {"protocol": "the protocol's size", "original": "the label's size"}
_FAULTS = {
    "good": "works (IoU of 75 % or more)",
    "missed": "misses more than it marks wrongly",
    "wrong": "marks more wrongly than it misses",
    "confused": "marks another labelled class",
    "unknown": "not analysed",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Picture:
    uri: str
    label: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _EpisodeView:
    number: int
    class_name: str
    iou: float
    size: float
    fault: str
    sentence: str
    shown: str
    query_id: str
    pictures: tuple[_Picture, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _RunView:
    key: str
    name: str
    title: str
    method: str
    miou: tuple[float, float, float]
    fb_iou: tuple[float, float, float] | None
    difference: Difference | None
    episodes: int
    shots: int
    support: str
    short: tuple[str, ...]
    notes: tuple[str, ...]
    classes: tuple[ClassDiagnosis, ...]
    histogram: tuple[int, ...]
    highlights: tuple[tuple[str, _EpisodeView], ...]
    gallery: tuple[_EpisodeView, ...]
    faults: tuple[tuple[str, str], ...]
    undrawn: str
    facts: tuple[tuple[str, str], ...]
    configuration: str


def write_report(path: Path, runs: Sequence[ReportedRun], *, picture_bytes: int = PICTURE_BYTES) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        runs: one, or several to be seen side by side; differences are to the first.
        picture_bytes: for all pictures of all runs together.

    Raises:
        DataError: no run, or a folder that cannot be written.
    """
    if not runs:
        raise DataError("a report needs at least one run; give the folders that `evaluate` or `demo` wrote")
    names, share = run_names(runs), picture_bytes // len(runs)
    views = [_view(run, runs[0], name, n, share) for n, (run, name) in enumerate(zip(runs, names, strict=True), 1)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fewshot_seg.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    page = environment.get_template("report.html").render(
        title=_title(views),
        runs=views,
        compared=_compared(runs, views) if len(views) > 1 else None,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page.lstrip(), encoding="utf-8", errors="backslashreplace")


def _title(views: Sequence[_RunView]) -> str:
    """Of the one run, or what all runs have in common."""
    title = views[0].title
    if len(views) == 1:
        return title
    shared = f"{title}: " if all(view.title == title for view in views) else ""
    return f"{shared}{len(views)} runs side by side"


def _view(run: ReportedRun, first: ReportedRun, name: str, number: int, picture_bytes: int) -> _RunView:
    classes = tuple(diagnose(run))
    pictures = _embedded(run, picture_bytes)
    gallery = sorted(
        (_episode_view(run, run.episodes[n], pictures[n]) for n in pictures), key=lambda one: (one.iou, one.number)
    )
    results, present = run.results, {one.fault for one in gallery}
    reports_fb = run.record["protocol"].get("reports_fb_iou", True)
    histogram, _ = np.histogram([episode.iou for episode in run.episodes], bins=10, range=(0, 100))
    return _RunView(
        key=f"run{number}",
        name=name,
        title=run.title,
        method=str(results["method"]),
        miou=_triple(results["miou"]),
        fb_iou=_triple(results["fb_iou"]) if reports_fb else None,
        difference=None if run is first else paired_difference(run, first),
        episodes=len(run.episodes) // int(results.get("ways", 1)),
        shots=int(results["shots"]),
        support=str(results.get("support", "mask")),
        short=tuple(_in_short(run, classes)),
        notes=tuple(_notes(run)),
        classes=classes,
        histogram=tuple(histogram.tolist()),
        highlights=tuple(_highlights(run, gallery)),
        gallery=tuple(gallery),
        faults=tuple((key, text) for key, text in _FAULTS.items() if key in present),
        undrawn=_undrawn(run, len(gallery)),
        facts=tuple(_facts(run)),
        configuration=json.dumps(run.record["configuration"], indent=1, ensure_ascii=False),
    )


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    value, low, high = map(float, values)
    return value, low, high


def _embedded(run: ReportedRun, picture_bytes: int) -> dict[int, tuple[_Picture, ...]]:
    """Pictures of the drawn episodes by number, the most telling first, as long as there is room."""
    kept, room, twice = dict[int, tuple[_Picture, ...]](), picture_bytes, _landmarks(run).values()
    for number in run.drawn:
        pictures = tuple(_picture(panel.path, panel.label) for panel in run.episodes[number].panels)
        size = sum(len(one.uri) for one in pictures)
        room -= 2 * size if number in twice else size  # best, median and worst stand in the page twice
        if room < 0:
            break
        kept[number] = pictures
    return kept


def _picture(path: Path, label: str) -> _Picture:
    try:
        data = read_bytes(path)
        with open_picture(io.BytesIO(data)) as picture:
            kind, (width, height) = Image.MIME[str(picture.format)], picture.size
    except Exception as error:  # Pillow's decoders each raise their own on damaged files
        raise DataError(
            f"{path} is no picture that can be read ({reason_of(error)}); evaluate again, or delete {path.parent}"
        ) from error
    uri = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return _Picture(uri=uri, label=label, width=width, height=height)


def _episode_view(run: ReportedRun, episode: ReportedEpisode, pictures: tuple[_Picture, ...]) -> _EpisodeView:
    fault, sentence = episode_fault(episode, run)
    finding = episode.finding
    return _EpisodeView(
        number=episode.number,
        class_name=episode.class_name,
        iou=episode.iou,
        size=0.0 if finding is None else 100 * finding.target / max(finding.scored, 1),
        fault=fault,
        sentence=sentence,
        shown=", ".join(episode.support_ids),
        query_id=episode.query_id,
        pictures=pictures,
    )


def _highlights(run: ReportedRun, gallery: Sequence[_EpisodeView]) -> list[tuple[str, _EpisodeView]]:
    """Best, median and worst of all episodes, as far as they are among the shown ones."""
    shown = {one.number: one for one in gallery}
    named = [(title, shown[number]) for title, number in _landmarks(run).items() if number in shown]
    return sorted(named, key=lambda item: -item[1].iou)


def _landmarks(run: ReportedRun) -> dict[str, int]:
    return landmarks([episode.iou for episode in run.episodes])


def _in_short(run: ReportedRun, classes: Sequence[ClassDiagnosis]) -> list[str]:
    """What somebody reads who reads nothing else."""
    sentences = list[str]()
    if len(classes) > 1:
        count = min(3, len(classes) // 2)
        weakest, strongest = classes[:count], classes[: -count - 1 : -1]
        sentences.append("Weakest: " + "; ".join(_with_fault(one) for one in weakest) + ".")
        sentences.append("Strongest: " + "; ".join(f"{one.name} ({one.iou:.0f} %)" for one in strongest) + ".")
    findings = [episode.finding for episode in run.episodes if episode.finding is not None]
    if len(findings) == len(run.episodes):
        missed, wrong = (sum(getattr(f, part) - f.both for f in findings) for part in ("target", "found"))
        share = 100 * missed / max(missed + wrong, 1)
        sentences.append(
            f"Of all wrong pixels, {share:.0f} % are missed object and {100 - share:.0f} % are marked background or "
            "other things."
        )
        best = [one.best_iou for one in findings if one.best_iou is not None]
        if len(best) == len(findings):
            mean, possible = float(np.mean([episode.iou for episode in run.episodes])), float(np.mean(best))
            sentences.append(
                f"The mean IoU of an episode is {mean:.0f} %; the best threshold for every single photo would give "
                f"{possible:.0f} %. What is missing above that, no threshold can mend."
            )
    return sentences


def _with_fault(one: ClassDiagnosis) -> str:
    return f"{one.name} ({one.iou:.0f} %{': ' + one.fault if one.fault else ''})"


def _notes(run: ReportedRun) -> list[str]:
    """What a reader must know before believing the numbers."""
    results, notes = run.results, list[str]()
    name = str(results["benchmark"])
    if name.startswith(("PASCAL-5i/", "COCO-20i/")):
        notes.append(f"{name} is a part of the benchmark: not comparable with published numbers.")
    if results.get("left_out"):
        notes.append(f"Left out, with too few images: {', '.join(map(str, results['left_out']))}.")
    if results.get("known_by_name"):
        known = ", ".join(map(str, results["known_by_name"]))
        notes.append(f"Not novel: the model was trained on classes of these names from other data: {known}.")
    if results.get("ways", 1) > 1:
        notes.append("Of several ways every way is listed as an episode; why it fails is not analysed.")
    elif any(episode.finding is None for episode in run.episodes):
        notes.append("Evaluated by an earlier version: why episodes fail is not known. Evaluate again to see it.")
    return notes


def _undrawn(run: ReportedRun, shown: int) -> str:
    if not run.drawn:
        return "No pictures were drawn in this run (--report-episodes 0, several ways, or an earlier version)."
    drawn = f"{shown} of {len(run.episodes)} episodes"
    kept = "" if shown == len(run.drawn) else f"; {len(run.drawn) - shown} more are in the run folder"
    rule = run.results.get("shot_rule", "pooled")
    pooled = "" if run.results["shots"] == 1 or rule == "pooled" else f" Scored by {rule!r}, drawn as pooled shots."
    return f"Drawn: {drawn}, the best, the middle, the worst, and the worst of every class{kept}.{pooled}"


def _facts(run: ReportedRun) -> list[tuple[str, str]]:
    """How the numbers came about, for somebody who wants to reach them again."""
    results, record = run.results, run.record
    environment, data, protocol = record["environment"], record["data"], record["protocol"]
    seed = record["configuration"].get("seed")
    repeats = results.get("repeats") or [results["miou"][0]]
    facts: list[tuple[str, Any]] = [
        ("Data", data.get("name")),
        ("Protocol", results.get("protocol")),
        ("Scored at", _SIZES.get(str(results.get("scoring")))),
        ("Fold", results.get("fold")),
        ("Shots", results["shots"]),
        ("Rule of several shots", results.get("shot_rule") if results["shots"] > 1 else None),
        ("Supports marked by", results.get("support")),
        ("Episodes", f"{len(run.episodes) // int(results.get('ways', 1))} in {len(repeats)} repeat(s)"),
        ("mIoU of the repeats", ", ".join(f"{one:.1f}" for one in repeats) if len(repeats) > 1 else None),
        ("Seed of the episodes", f"{protocol.get('seed', 0)} (the protocol's)" if seed is None else seed),
        ("Model", results["method"]),
        ("Threshold", f"{float(results['threshold']):.3f} {results.get('threshold_origin') or ''}"),
        *((f"Fingerprint of the {part} data", digest) for part, digest in dict(data.get("fingerprint") or {}).items()),
        ("Fingerprint of the episodes", results["episodes_fingerprint"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())),
        ("Python", environment.get("python")),
        ("Platform", environment.get("platform")),
        ("Commit", environment.get("commit") or "not in a checkout"),
        ("Seconds", f"{float(results['seconds']):.0f}" if results.get("seconds") else None),
        ("Folder", run.folder),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _compared(runs: Sequence[ReportedRun], views: Sequence[_RunView]) -> dict[str, Any]:
    names = list(dict.fromkeys(one.name for view in views for one in view.classes))
    scores = [{one.name: one.iou for one in view.classes} for view in views]
    rows = [(name, [of_run.get(name) for of_run in scores]) for name in names]
    return {
        "classes": sorted(rows, key=lambda row: min(value for value in row[1] if value is not None)),
        "settings": differing_settings(runs),
        "paired": all(run.results["episodes_fingerprint"] == runs[0].results["episodes_fingerprint"] for run in runs),
    }
