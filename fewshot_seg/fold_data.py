"""A fold's lists with the network's view of them: stored features, masks, and episodes of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from episodes.augment import EpisodeTransform, Preset
from episodes.fold_lists import FoldLists, draw, evaluation_specs, open_lists
from episodes.folds import ClassSplit
from episodes.loader import EpisodeDataset
from episodes.protocols import EpisodeProtocol, list_pairs, training_pairs
from episodes.types import EpisodeSpec, MaskSource, SupportKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.distributed import barrier, current_ranks, share_of
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureEpisodes, LiveEpisodes
from fewshot_seg.features import DEFAULT_BYTE_BUDGET, FeatureStore, MaskStore

Augment = Literal["mirror"] | Preset
"""``mirror`` mirrors stored features; the presets of `EpisodeTransform` change the photos themselves."""

_HELD_OUT_SEED = 1
"""Added to the seed for held-out episodes, so that they are not the first training episodes."""
_MASKS: tuple[SupportKind, ...] = ("mask",)


@dataclass(frozen=True, kw_only=True)
class FoldData(FoldLists):
    """What a fold's episodes are made from; the lists' attributes, and

    Attributes:
        backbone: as given.
        store, masks: features and masks at `resolution`.
        training_masks: those of `training_source`.
        resolution: side of the square.
    """

    backbone: Backbone
    store: FeatureStore
    masks: MaskStore
    training_masks: MaskStore
    resolution: int


def open_fold(
    source: MaskSource,
    backbone: Backbone,
    protocol: EpisodeProtocol,
    *,
    fold: int,
    validation_fold: int | None = None,
    novel_classes: Sequence[str] | None = None,
    resolution: int | None = None,
    cache: Path | None = None,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
    show_progress: bool = False,
) -> FoldData:
    """Lists and caches of a fold. Features are computed when first needed.

    Args:
        source, protocol, fold, validation_fold, novel_classes, show_progress: see `episodes.fold_lists.open_lists`.
        backbone: frozen.
        resolution: overrides the protocol's.
        cache: folder of indices and features; None keeps both in memory.
        byte_budget: of the features.
    """
    lists = open_lists(
        source,
        protocol,
        fold=fold,
        validation_fold=validation_fold,
        novel_classes=novel_classes,
        index_cache=None if cache is None else cache / "index",
        show_progress=show_progress,
    )
    size, fit = resolution or lists.protocol.resolution, lists.protocol.fit
    directory = None if cache is None else cache / "features"
    masks = MaskStore(source, size=size, fit=fit)
    training_source = lists.training_source
    return FoldData(
        **vars(lists),
        backbone=backbone,
        store=FeatureStore(backbone, source, size=size, directory=directory, fit=fit, byte_budget=byte_budget),
        masks=masks,
        training_masks=masks if training_source is source else MaskStore(training_source, size=size, fit=fit),
        resolution=size,
    )


def training_episodes(
    data: FoldData,
    classes: ClassSplit,
    *,
    shots: int,
    count: int,
    seed: int,
    augment: Augment = "mirror",
    support_augment: Augment | None = None,
    supports: Sequence[SupportKind] = _MASKS,
    workers: int = 0,
    show_progress: bool = False,
) -> FeatureEpisodes:
    """Episodes of the base side of `classes` in the training split.

    Args:
        data, classes: the fold, and its split or held-out split.
        shots, count, seed: of the episodes.
        augment: of queries, and of supports unless `support_augment` says otherwise.
        support_augment: of supports.
        supports: how supports are marked; of several, each support gets one at random.
        workers: processes that load photos, where the augmentation changes photos.
        show_progress: bar on stderr.

    Raises:
        DataError: no base class, or no episodes of them.
    """
    data.check_base()
    pairs = training_pairs(data.protocol, data.training_index, classes)
    specs = draw(data, data.training_index, pairs, shots=shots, count=count, seed=seed, order="random")
    presets = [augment if support_augment is None else support_augment, augment]
    if set(presets) <= {"none"} or set(presets) <= {"mirror"}:
        _compute_features(data, specs, show_progress)
        return CachedEpisodes(data.store, data.training_masks, specs, mirror=augment == "mirror", supports=supports)
    transforms = [
        EpisodeTransform("flip" if preset == "mirror" else preset, data.resolution, data.protocol.fit)
        for preset in presets
    ]
    dataset = EpisodeDataset(data.training_source, specs, *transforms, supports=supports)
    return LiveEpisodes(data.backbone, dataset, workers=workers)


def held_out_episodes(
    data: FoldData, *, shots: int, count: int, seed: int, supports: Sequence[SupportKind] = _MASKS
) -> FeatureEpisodes:
    """Episodes of the held-out base classes in the training split: what choices are made on.

    Raises:
        DataError: no classes are held out.
    """
    pairs = list_pairs(data.protocol, data.training_index, data.choices.novel)
    seed += _HELD_OUT_SEED
    specs = draw(data, data.training_index, pairs, shots=shots, count=count, seed=seed, order="random")
    return CachedEpisodes(data.store, data.training_masks, specs, supports=supports)


def evaluation_episodes(
    data: FoldData,
    *,
    shots: int,
    count: int | None = None,
    seed: int | None = None,
    support: SupportKind = "mask",
    show_progress: bool = False,
) -> FeatureEpisodes:
    """Episodes of `evaluation_specs`, from stored features."""
    specs = evaluation_specs(data, shots=shots, count=count, seed=seed)
    return stored_episodes(data, specs, support=support, show_progress=show_progress)


def stored_episodes(
    data: FoldData, specs: Sequence[EpisodeSpec], *, support: SupportKind = "mask", show_progress: bool = False
) -> FeatureEpisodes:
    """Episodes of given specs, from stored features, which are computed first where they are missing."""
    _compute_features(data, specs, show_progress)
    return CachedEpisodes(data.store, data.masks, specs, supports=(support,))


def _compute_features(data: FoldData, specs: Sequence[EpisodeSpec], show_progress: bool) -> None:
    """Those that are missing; of several ranks that share a folder, each computes its part first."""
    images, show = images_of(specs), show_progress and current_ranks().first
    if current_ranks().size > 1 and data.store.on_disk:
        data.store.ensure(share_of(images, block=data.store.batch_size), show_progress=show)
        barrier()
    data.store.ensure(images, show_progress=show)


def images_of(specs: Sequence[EpisodeSpec]) -> list[str]:
    """All images of some episodes, each once."""
    return list(dict.fromkeys(image_id for spec in specs for image_id in (*spec.support_ids, spec.query_id)))
