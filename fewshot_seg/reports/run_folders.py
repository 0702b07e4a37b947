"""What a report needs of a run, read from its folder and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from episodes.types import DataError
from fewshot_seg.findings import Finding
from fewshot_seg.reports.gallery import GALLERY, GALLERY_INDEX
from fewshot_seg.runs import EVALUATION_NAME, RUN_NAME, episodes_title
from fewshot_seg.runtime import read_json

_MOST = 1e9  # of any score or number
_MOST_PIXELS = 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPanel:
    """A picture in the run folder and what it shows."""

    path: Path
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedEpisode:
    """An episode by number, with its IoU in percent, and what is known and drawn of it.

    Attributes:
        number: in the evaluation; of several ways, every way has one.
        class_name: what was to be found.
        support_ids, query_id: photos.
        iou: percent.
        finding: None in runs of several ways or of earlier versions.
        panels: pictures; none unless it was drawn.
    """

    number: int
    class_name: str
    support_ids: tuple[str, ...]
    query_id: str
    iou: float
    finding: Finding | None
    panels: tuple[StoredPanel, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedRun:
    """One evaluation.

    Attributes:
        folder: where it was read.
        record: its ``run.json``.
        results: scores and how they were reached.
        episodes: all of them, in order.
        drawn: numbers of the episodes with pictures, the most telling first.
        class_names: class id -> name of the data.
    """

    folder: Path
    record: Mapping[str, Any]
    results: Mapping[str, Any]
    episodes: tuple[ReportedEpisode, ...]
    drawn: tuple[int, ...]
    class_names: Mapping[int, str]

    @property
    def title(self) -> str:
        """Data, fold, shots: ``PASCAL-5i, fold 0, 1-shot``."""
        results = self.results
        return episodes_title(
            str(results["benchmark"]),
            results.get("fold"),
            shots=results["shots"],
            ways=results.get("ways", 1),
            support=results.get("support", "mask"),
        )


def read_run(folder: Path) -> ReportedRun:
    """The run of a folder that ``evaluate`` or ``demo`` wrote.

    Raises:
        DataError: no such folder, no run, a run of another verb, or damaged files.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give folders that `evaluate` or `demo` wrote (their --out)")
    if not (folder / RUN_NAME).is_file() or not (folder / EVALUATION_NAME).is_file():
        raise DataError(
            f"{folder} is no run of `evaluate` or `demo`: it has no {RUN_NAME} with {EVALUATION_NAME} beside it; give "
            "the --out of such a run"
        )
    record = read_json(folder / RUN_NAME, what="record of the run")
    results = read_json(folder / EVALUATION_NAME, what="evaluation")
    try:
        episodes = results.pop("episodes")
        names = {int(class_id): str(name) for class_id, name in results.pop("class_names").items()}
        _check_pair(folder, record, results)
        panels, drawn = _read_gallery(folder, str(results["episodes_fingerprint"]))
        run = ReportedRun(
            folder=folder,
            record=dict(record),
            results=results,
            episodes=tuple(_episode(n, one, names, panels.get(n, ())) for n, one in enumerate(episodes)),
            drawn=tuple(number for number in drawn if number < len(episodes)),
            class_names=names,
        )
        _check(run)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, IndexError) as error:
        raise DataError(
            f"{folder} is no run that can be reported ({type(error).__name__}: {error}); it may be of an earlier "
            "version or of `similarity evaluate`: evaluate again"
        ) from error
    return run


def _check_pair(folder: Path, record: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Raises DataError where the two files are of different runs: one was killed between them."""
    beside = record["results"]
    if any(beside[name] != results[name] for name in ("episodes_fingerprint", "method", "threshold", "miou")):
        raise DataError(
            f"{folder}: {RUN_NAME} and {EVALUATION_NAME} are of different runs, the later of which was interrupted; "
            "evaluate again"
        )


def _episode(number: int, stored: Mapping[str, Any], names: Mapping[int, str], panels: Any) -> ReportedEpisode:
    finding = stored.get("finding")
    if finding is not None:
        on_others = {int(class_id): int(pixels) for class_id, pixels in finding["on_others"].items()}
        finding = Finding(**(finding | {"on_others": on_others}))
    return ReportedEpisode(
        number=number,
        class_name=names[int(stored["class_id"])],
        support_ids=tuple(map(str, stored["support_ids"])),
        query_id=str(stored["query_id"]),
        iou=float(stored["iou"]),
        finding=finding,
        panels=tuple(panels),
    )


def _check(run: ReportedRun) -> None:
    """Raises KeyError, TypeError or ValueError where a page would need what is not there, or is something else."""
    results, record = run.results, run.record
    for name in ("miou", "fb_iou"):
        # a bootstrap of few episodes of many classes can leave the value outside its interval
        value, low, high = results[name]
        if not all(map(_is_number, (value, low, high))):
            raise ValueError(f"{name} is {value!r:.40} with an interval of {low!r:.40} to {high!r:.40}")
    if not run.episodes:
        raise ValueError("no episodes")
    for name in ("benchmark", "method"):
        if results[name] is None:
            raise ValueError(f"{name} is missing")
    for name, value in (("shots", results["shots"]), ("ways", results.get("ways", 1))):
        if type(value) is not int or not 1 <= value <= _MOST:
            raise ValueError(f"{name} is {value!r:.40}")
    for name, value in (("threshold", results["threshold"]), ("seconds", results.get("seconds") or 0)):
        if not _is_number(value):
            raise ValueError(f"{name} is {value!r:.40}")
    if not all(map(_is_number, results.get("repeats") or ())):
        raise ValueError("repeats are no numbers")
    for name in ("left_out", "known_by_name"):
        if not isinstance(results.get(name) or [], list):
            raise TypeError(f"{name} is no list")
    for name in ("configuration", "environment", "data", "protocol"):
        if not isinstance(record[name], dict):
            raise TypeError(f"{name} is no object")
    for holder, name in ((record["environment"], "versions"), (record["data"], "fingerprint")):
        if not isinstance(holder.get(name) or {}, dict):
            raise TypeError(f"{name} is no object")
    if not all(_is_number(results["per_class"][episode.class_name]) for episode in run.episodes):
        raise ValueError("per_class holds other things than numbers")
    for episode in run.episodes:
        _check_episode(episode)


def _check_episode(episode: ReportedEpisode) -> None:
    one = episode.finding
    counts = () if one is None else (one.scored, one.target, one.found, one.both, *one.on_others.values())
    more = () if one is None or one.on_any_other is None else (one.on_any_other,)
    if not all(type(count) is int and 0 <= count <= _MOST_PIXELS for count in (*counts, *more)):
        raise ValueError(f"episode {episode.number}: counts of pixels are none")
    if not _is_number(episode.iou) or not (one is None or one.best_iou is None or _is_number(one.best_iou)):
        raise ValueError(f"episode {episode.number}: IoU is no number")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST


def _read_gallery(folder: Path, fingerprint: str) -> tuple[dict[int, list[StoredPanel]], list[int]]:
    """Pictures by number of the episode, and the numbers in order; none where they are of other episodes."""
    index = folder / GALLERY / GALLERY_INDEX
    if not index.is_file():
        return {}, []
    stored = read_json(index, what="index of pictures")
    if stored["episodes_fingerprint"] != fingerprint:
        return {}, []
    panels = dict[int, list[StoredPanel]]()
    for one in stored["episodes"]:
        # only the name: a foreign index does not make the page embed files from elsewhere
        found = [StoredPanel(path=index.parent / Path(p["file"]).name, label=str(p["label"])) for p in one["panels"]]
        panels[int(one["number"])] = [panel for panel in found if panel.path.is_file()]
    return panels, [number for number in panels if panels[number]]
