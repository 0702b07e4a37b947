"""One fold from data to a trained model: the steps that the command line, the demo and the scripts share.

The threshold is chosen on classes held out from the base classes: a first run trains without them and is scored on
them (photos of the training split), then a second run trains on all base classes. The test fold is never looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from episodes.augment import EpisodeTransform
from episodes.folds import ClassSplit, class_split, held_out_split
from episodes.index import ClassIndex, build_index
from episodes.loader import EpisodeDataset
from episodes.protocols import EpisodeProtocol, Pair, evaluation_pairs, list_pairs, training_pairs
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from episodes.types import DataError, MaskSource
from fewshot_seg.backbones import Backbone
from fewshot_seg.evaluation import choose_threshold
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureEpisodes, LiveEpisodes
from fewshot_seg.features import DEFAULT_BYTE_BUDGET, FeatureStore, MaskStore
from fewshot_seg.optimisation import TrainingResult
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.training import train

Augment = Literal["none", "mirror", "standard"]
_HELD_OUT_SEED = 1
"""Added to the seed for held-out episodes, so that they are not the first training episodes."""


@dataclass(frozen=True, kw_only=True)
class FoldData:
    """What a fold's episodes are drawn from.

    Attributes:
        source, backbone, protocol: as given.
        store, masks: their features and masks at `resolution`.
        training_index, evaluation_index: classes of the two splits.
        split: base and novel classes of the fold.
        held_out: the base classes split again, for choices; its novel side is never in the test fold.
        fold: the test fold; None for a source without folds.
        resolution: side of the square.
    """

    source: MaskSource
    backbone: Backbone
    protocol: EpisodeProtocol
    store: FeatureStore
    masks: MaskStore
    training_index: ClassIndex
    evaluation_index: ClassIndex
    split: ClassSplit
    held_out: ClassSplit
    fold: int | None
    resolution: int

    @property
    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of the two splits' files."""
        return {"training": self.training_index.fingerprint, "evaluation": self.evaluation_index.fingerprint}


def open_fold(
    source: MaskSource,
    backbone: Backbone,
    protocol: EpisodeProtocol,
    *,
    fold: int,
    validation_fold: int | None = None,
    resolution: int | None = None,
    cache: Path | None = None,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
    show_progress: bool = False,
) -> FoldData:
    """Index the data, split its classes, set up the caches. Features are computed when first needed.

    Args:
        source: PASCAL VOC, or the synthetic source (whose split is its own; `fold` does not matter).
        backbone: frozen.
        protocol: lists and resolution.
        fold: the test fold.
        validation_fold: fold whose classes are held out for choices; the next one by default.
        resolution: overrides the protocol's.
        cache: folder of indices and features; None keeps both in memory.
        byte_budget: of the features.
        show_progress: bars on stderr.
    """
    size = resolution or protocol.resolution
    indices = [
        build_index(source, split, cache_dir=None if cache is None else cache / "index", show_progress=show_progress)
        for split in (protocol.training_split, protocol.evaluation_split)
    ]
    split, held_out = _class_splits(source, fold, validation_fold)
    directory = None if cache is None else cache / "features"
    return FoldData(
        source=source,
        backbone=backbone,
        protocol=protocol,
        store=FeatureStore(backbone, source, size=size, directory=directory, byte_budget=byte_budget),
        masks=MaskStore(source, size=size),
        training_index=indices[0],
        evaluation_index=indices[1],
        split=split,
        held_out=held_out,
        fold=None if isinstance(source, SyntheticSource) else fold,
        resolution=size,
    )


def _class_splits(source: MaskSource, fold: int, validation_fold: int | None) -> tuple[ClassSplit, ClassSplit]:
    if isinstance(source, SyntheticSource):
        base, novel = source.base_class_ids, source.novel_class_ids
        kept = -(-len(base) * 2 // 3)
        return ClassSplit(base=base, novel=novel), ClassSplit(base=base[:kept], novel=base[kept:])
    class_ids = tuple(source.class_names)
    other = (fold + 1) % 4 if validation_fold is None else validation_fold
    return class_split(class_ids, "pascal", fold), held_out_split(class_ids, "pascal", fold, other)


def draw(
    data: FoldData, pairs: list[Pair], *, shots: int, count: int, seed: int, order: Literal["list", "random"]
) -> EpisodeSampler:
    """Episode specs over a list of pairs, by the protocol's rule for supports.

    Raises:
        DataError: an empty list (the fold's classes are not in the data), or too few images for the shots.
    """
    if not pairs:
        names = ", ".join(data.source.class_names[class_id] for class_id in data.split.novel)
        raise DataError(
            f"no episodes of this fold: protocol {data.protocol.name} finds no image of the wanted classes in "
            f"{data.source.name} (novel classes: {names}); choose another --fold or add images"
        )
    return EpisodeSampler(
        pairs, shots=shots, seed=seed, length=count, order=order, repeat_supports=data.protocol.repeat_supports
    )


def training_episodes(
    data: FoldData,
    classes: ClassSplit,
    *,
    shots: int,
    count: int,
    seed: int,
    augment: Augment = "mirror",
    workers: int = 0,
    show_progress: bool = False,
) -> FeatureEpisodes:
    """Episodes of the base side of `classes` in the training split."""
    pairs = training_pairs(data.protocol, data.training_index, classes)
    specs = draw(data, pairs, shots=shots, count=count, seed=seed, order="random")
    if augment == "standard":
        transform = EpisodeTransform("standard", data.resolution)
        dataset = EpisodeDataset(data.source, specs, transform, transform)
        return LiveEpisodes(data.backbone, dataset, workers=workers)
    data.store.ensure(_images(specs), show_progress=show_progress)
    return CachedEpisodes(data.store, data.masks, specs, mirror=augment == "mirror")


def held_out_episodes(data: FoldData, *, shots: int, count: int, seed: int) -> FeatureEpisodes:
    """Episodes of the held-out base classes in the training split: what choices are made on."""
    pairs = list_pairs(data.protocol, data.training_index, data.held_out.novel)
    specs = draw(data, pairs, shots=shots, count=count, seed=seed + _HELD_OUT_SEED, order="random")
    return CachedEpisodes(data.store, data.masks, specs)


def evaluation_specs(
    data: FoldData, *, shots: int, count: int | None = None, seed: int | None = None
) -> EpisodeSampler:
    """Specs of the novel classes by the protocol; count and seed override the protocol's."""
    return draw(
        data,
        evaluation_pairs(data.protocol, data.evaluation_index, data.split),
        shots=shots,
        count=count or data.protocol.episodes,
        seed=data.protocol.seed if seed is None else seed,
        order=data.protocol.query_draw,
    )


def evaluation_episodes(
    data: FoldData, *, shots: int, count: int | None = None, seed: int | None = None, show_progress: bool = False
) -> FeatureEpisodes:
    """Episodes of `evaluation_specs`, from stored features."""
    specs = evaluation_specs(data, shots=shots, count=count, seed=seed)
    data.store.ensure(_images(specs), show_progress=show_progress)
    return CachedEpisodes(data.store, data.masks, specs)


def _images(specs: EpisodeSampler) -> list[str]:
    return list(dict.fromkeys(image_id for spec in specs for image_id in (*spec.support_ids, spec.query_id)))


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
        augment, workers: see `training_episodes`.
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
        selection, _ = run(data.held_out, selection_folder)
        threshold, held_out_miou = _select(
            selection,
            data,
            shots,
            validation_episodes,
            seed,
            selection_folder,
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
    resume: bool,
    show_progress: bool,
) -> tuple[float, float]:
    """Threshold and its mIoU; kept beside the selection run, so that a resumed run does not choose again."""
    kept = None if folder is None else folder / "threshold.json"
    if kept is not None and resume and kept.exists():
        stored = read_json(kept, what="chosen threshold")
        return float(stored["threshold"]), float(stored["miou"])
    drawn = held_out_episodes(data, shots=shots, count=episodes, seed=seed)
    threshold, miou = choose_threshold(selection, drawn, show_progress=show_progress)
    if kept is not None:
        write_json(kept, {"threshold": threshold, "miou": miou, "classes": list(data.held_out.novel)})
    return threshold, miou


def protocol_for(source: MaskSource, protocol: EpisodeProtocol) -> EpisodeProtocol:
    """The protocol with the splits that a source has: the synthetic source calls its training split ``train``."""
    if isinstance(source, SyntheticSource):
        return dataclasses.replace(
            protocol,
            name=f"{protocol.name} (synthetic)",
            description="Lists and draws of the protocol over the generated pictures, at their own size.",
            training_split="train",
            evaluation_split="val",
            resolution=source.size,
            scoring_size=source.size,
            min_grid_points=0,
            listed=frozenset(),
        )
    return protocol
