"""Pictures of chosen episodes, kept in the run folder: drawing them needs data and model, reporting them does not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from episodes.protocols import Fit
from episodes.types import IGNORE, EpisodeSpec, MaskSource, SupportKind, UInt8Array
from fewshot_seg.explanation import ExplainedEpisode, episode_panels, explain_episode
from fewshot_seg.pictures import BACKGROUND, TRUTH, overlay_mask
from fewshot_seg.runtime import atomic_path, write_json
from fewshot_seg.segmenter import FewShotSegmenter

GALLERY = "gallery"
"""Folder of the pictures in the run folder."""
GALLERY_INDEX = "gallery.json"
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
    order = np.argsort(np.asarray(scores), kind="stable").tolist()
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

    Pictures of an earlier run are removed, also where nothing is drawn.

    Args:
        segmenter: the model, in evaluation mode.
        source: photos and masks.
        specs: the episodes of an evaluation.
        numbers: which of them, the most telling first.
        fingerprint: of the episodes; a report takes no pictures of others.
        resolution, support, fit: see `explain_episode`.
        folder: of the run.
        show_progress: bar on stderr.
    """
    place, drawn = folder / GALLERY, []
    shutil.rmtree(place, ignore_errors=True)
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
