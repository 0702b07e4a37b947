"""One fold from data to a trained model: the steps that the command line, the demo and the scripts share.

The threshold is chosen on classes held out from the base classes: a first run trains without them and is scored on
them (photos of the training split), then a second run trains on all base classes. The test fold is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from episodes.folds import ClassSplit
from episodes.types import SupportKind
from fewshot_seg.distributed import current_ranks, on_first
from fewshot_seg.evaluation import choose_threshold
from fewshot_seg.fold_data import Augment, FoldData, held_out_episodes, training_episodes
from fewshot_seg.optimisation import TrainingResult
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.training import train


@dataclass(frozen=True, kw_only=True)
class TrainedFold:
    """Outcome of `train_fold`.

    Attributes:
        segmenter: trained on all base classes, its threshold set.
        selection: trained without the held-out classes; None if no threshold was selected.
        held_out_miou: of the selection model at the threshold; None likewise.
        result: of the final run.
    """

    segmenter: FewShotSegmenter
    selection: FewShotSegmenter | None
    held_out_miou: float | None
    result: TrainingResult


def train_fold(
    build: Callable[[], FewShotSegmenter],
    data: FoldData,
    *,
    shots: int = 1,
    steps: int = 160,
    batch_size: int = 8,
    seed: int = 0,
    augment: Augment = "mirror",
    support_augment: Augment | None = None,
    supports: Sequence[SupportKind] = ("mask",),
    workers: int = 0,
    select_threshold: bool = True,
    validation_episodes: int = 200,
    folder: Path | None = None,
    resume: bool = False,
    show_progress: bool = False,
    **arguments: Any,
) -> TrainedFold:
    """Select the threshold on held-out base classes, then train on all base classes.

    Args:
        build: makes a new, untrained model; called once per run.
        data: from `open_fold`.
        shots, steps, batch_size, seed, arguments: of `fewshot_seg.training.train`.
        augment, support_augment, supports, workers: see `training_episodes`.
        select_threshold: False keeps the model's own threshold and saves half of the time.
        validation_episodes: episodes the threshold is chosen on.
        folder: of the final run; the selection run goes to its subfolder ``selection``.
        resume: go on from checkpoints, also in the middle of the selection run.
        show_progress: bars on stderr.
    """

    def run(classes: ClassSplit, where: Path | None) -> tuple[FewShotSegmenter, TrainingResult]:
        segmenter = build()
        drawn = training_episodes(
            data,
            classes,
            shots=shots,
            count=steps * batch_size,
            seed=seed,
            augment=augment,
            support_augment=support_augment,
            supports=supports,
            workers=workers,
            show_progress=show_progress,
        )
        result = train(
            segmenter,
            drawn,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            folder=where,
            resume=resume,
            show_progress=show_progress,
            **arguments,
        )
        return segmenter, result

    selection, threshold, held_out_miou = None, None, None
    if select_threshold:
        selection_folder = None if folder is None else folder / "selection"
        selection, _ = run(data.choices, selection_folder)
        threshold, held_out_miou = _select(
            selection,
            data,
            shots,
            validation_episodes,
            seed,
            selection_folder,
            supports=supports,
            resume=resume,
            show_progress=show_progress,
        )
        selection.threshold = threshold
    segmenter, result = run(data.split, folder)
    if threshold is not None:
        segmenter.threshold = threshold
    return TrainedFold(segmenter=segmenter, selection=selection, held_out_miou=held_out_miou, result=result)


def _select(
    selection: FewShotSegmenter,
    data: FoldData,
    shots: int,
    episodes: int,
    seed: int,
    folder: Path | None,
    *,
    supports: Sequence[SupportKind],
    resume: bool,
    show_progress: bool,
) -> tuple[float, float]:
    """Threshold and its mIoU; kept beside the selection run, so that a resumed run does not choose again.

    Its episodes are drawn all the same: the guard looks at them in every run, and its record tells of all of them.
    """
    drawn = held_out_episodes(data, shots=shots, count=episodes, seed=seed, supports=supports)
    kept = None if folder is None else folder / "threshold.json"
    stored = None
    if kept is not None and resume:
        stored = on_first(lambda: read_json(kept, what="chosen threshold") if kept.exists() else None)
    if stored is not None:
        return float(stored["threshold"]), float(stored["miou"])
    threshold, miou = choose_threshold(selection, drawn, show_progress=show_progress)
    if kept is not None and current_ranks().first:
        write_json(kept, {"threshold": threshold, "miou": miou, "classes": list(data.choices.novel)})
    return threshold, miou
