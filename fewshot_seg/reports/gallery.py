"""Pictures of chosen episodes, kept in the run folder: drawing them needs data and model, reporting them does not."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from episodes.progress import tqdm
from episodes.protocols import Fit
from episodes.types import IGNORE, DataError, EpisodeSpec, MaskSource, SupportKind, UInt8Array
from fewshot_seg.explanation import ExplainedEpisode, episode_panels, explain_episode
from fewshot_seg.pictures import BACKGROUND, TRUTH, overlay_mask
from fewshot_seg.runtime import atomic_path, read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter

GALLERY = "gallery"
"""Folder of the pictures in the run folder."""
GALLERY_INDEX = "gallery.json"
_OURS = re.compile(r"episode-\d{5,}-\d+\.webp")
_SIDE, _QUALITY = 256, 80
_CAPTIONS = {"prediction": "mask found", "truth": "truth"}


def chosen_episodes(specs: Sequence[EpisodeSpec], scores: Sequence[float], count: int) -> tuple[int, ...]:
    """Numbers of the episodes to draw, the most telling first.

    An eighth each (at least one) are the worst, the best and those in the middle; the others are the worst episodes of
    every class, a class after the other, the class with the lowest mean first.

    Args:
        specs: all episodes.
        scores: IoU of each.
        count: how many; all, if there are fewer.
    """
    order = _lowest_first(scores)
    extremes, middle = max(1, count // 8), len(order) // 2
    wanted = list[int]()
    for step in range(min(extremes, len(order))):
        offset = (step + 1) // 2 * (1 if step % 2 else -1)  # 0, 1, -1, 2, -2
        wanted += [order[step], order[-1 - step], order[(middle + offset) % len(order)]]
    of_class: dict[int, list[int]] = {}
    for number in order:
        of_class.setdefault(specs[number].class_id, []).append(number)
    weakest_first = sorted(of_class.values(), key=lambda numbers: float(np.mean([scores[n] for n in numbers])))
    for rank in range(max(map(len, of_class.values()), default=0)):
        wanted += [numbers[rank] for numbers in weakest_first if rank < len(numbers)]
    return tuple(dict.fromkeys(wanted))[:count]


def landmarks(scores: Sequence[float]) -> dict[str, int]:
    """Numbers of the worst, best and median episode, by these names; none of fewer than three episodes.

    They are the first three of `chosen_episodes`.

    Example:
        >>> landmarks([50.0, 10.0, 90.0, 30.0, 70.0])
        {'Worst': 1, 'Best': 2, 'Median': 0}
    """
    order = _lowest_first(scores)
    return {} if len(order) < 3 else {"Worst": order[0], "Best": order[-1], "Median": order[len(order) // 2]}


def _lowest_first(scores: Sequence[float]) -> list[int]:
    numbers: list[int] = np.argsort(np.asarray(scores), kind="stable").tolist()
    return numbers


def check_gallery(folder: Path) -> None:
    """Refuse a run folder whose ``gallery`` is somebody else's, before hours are spent on what cannot be kept.

    Raises:
        DataError: ``gallery`` is a file, or holds other files than ours and no ``gallery.json`` of ours.
    """
    place = folder / GALLERY
    if place.is_dir():
        # hidden files are what a killed run or a desktop leaves
        foreign = [p.name for p in place.iterdir() if not _OURS.fullmatch(p.name) and not p.name.startswith(".")]
        if _has_index(place) or not foreign:
            return
        found = f"holds {min(foreign)!r}, which is of no earlier run"
    elif os.path.lexists(place):
        found = "is no folder"
    else:
        return
    raise DataError(
        f"{place} {found}, and the report's pictures belong there; give another --out, move it away, or draw nothing "
        "with --report-episodes 0"
    )


def _has_index(place: Path) -> bool:
    """Whether an earlier run wrote the index of this folder."""
    try:
        stored = read_json(place / GALLERY_INDEX, what="index of pictures")
    except DataError:
        return False
    return isinstance(stored, dict) and stored.keys() >= {"episodes_fingerprint", "episodes"}


def _remove_earlier(place: Path) -> None:
    """Pictures and index of an earlier run, and the folder if nothing else is in it."""
    if not place.is_dir():
        return
    names = [path.name for path in place.iterdir() if _OURS.fullmatch(path.name)]
    if _has_index(place):
        names.append(GALLERY_INDEX)
    try:
        for name in names:
            (place / name).unlink()
    except OSError as error:
        raise DataError(f"cannot replace {place / name}: {error.strerror}; choose a folder you may write to") from error
    with contextlib.suppress(OSError):  # other files
        place.rmdir()


def draw_gallery(
    segmenter: FewShotSegmenter,
    source: MaskSource,
    specs: Sequence[EpisodeSpec],
    *,
    numbers: Sequence[int],
    fingerprint: str,
    resolution: int,
    folder: Path,
    support: SupportKind = "mask",
    fit: Fit = "squash",
    show_progress: bool = False,
) -> None:
    """Write the pictures of these episodes and ``gallery.json`` to ``gallery/`` of the run folder.

    Pictures of an earlier run are removed, also where nothing is drawn; other files stay.

    Args:
        segmenter: the model, in evaluation mode.
        source: photos and masks.
        specs: the episodes of an evaluation.
        numbers: which of them, the most telling first.
        fingerprint: of the episodes; a report takes no pictures of others.
        resolution, support, fit: see `explain_episode`.
        folder: of the run.
        show_progress: bar on stderr.

    Raises:
        DataError: there are pictures to draw, and ``gallery`` is somebody else's; see `check_gallery`.
    """
    place, drawn = folder / GALLERY, []
    if numbers:
        check_gallery(folder)
    _remove_earlier(place)
    for number in tqdm(numbers, desc="drawing", unit="episode", disable=not show_progress):
        episode = explain_episode(segmenter, source, specs[number], resolution=resolution, support=support, fit=fit)
        panels = []
        for position, (label, picture) in enumerate(_pictures(episode).items()):
            name = f"episode-{number:05d}-{position}.webp"
            _write_small(place / name, picture)
            panels.append({"file": name, "label": label})
        drawn.append({"number": number, "panels": panels})
    if drawn:
        write_json(place / GALLERY_INDEX, {"episodes_fingerprint": fingerprint, "episodes": drawn})


def _pictures(episode: ExplainedEpisode) -> dict[str, UInt8Array]:
    shown = {key: panel for key, panel in episode_panels(episode).items() if key != "background"}  # a row holds seven
    panels = {_CAPTIONS.get(key, panel.label): panel.picture for key, panel in shown.items()}
    return panels | {"errors": errors_picture(episode.query_image, episode.prediction, episode.target)}


def errors_picture(image: UInt8Array, prediction: UInt8Array, target: UInt8Array) -> UInt8Array:
    """The photo uint8 (H, W, 3) with missed parts of the object in blue and wrongly marked parts in pink."""
    missed = ((target == 1) & (prediction == 0)).astype(np.uint8)
    wrong = ((target == 0) & (prediction == 1)).astype(np.uint8)
    missed[target == IGNORE] = IGNORE
    return overlay_mask(overlay_mask(image, missed, TRUTH, alpha=0.6), wrong, BACKGROUND, alpha=0.6)


def _write_small(path: Path, picture: UInt8Array) -> None:
    small = Image.fromarray(picture)
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    with atomic_path(path) as temporary:
        small.save(temporary, quality=_QUALITY, method=4)
