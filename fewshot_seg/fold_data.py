"""A fold's lists with the network's view of them: stored features, masks, and episodes of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from episodes.augment import EpisodeTransform, Preset
from episodes.fold_lists import FoldLists, draw, evaluation_specs, open_lists
from episodes.folds import ClassSplit
from episodes.leak_guard import LeakGuard
from episodes.loader import EpisodeDataset
from episodes.progress import tqdm
from episodes.protocols import EpisodeProtocol
from episodes.types import DataError, EpisodeSpec, MaskSource, SupportKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.distributed import barrier, current_ranks, share_of
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureEpisodes, LiveEpisodes
from fewshot_seg.features import DEFAULT_BYTE_BUDGET, FeatureStore, MaskStore
from fewshot_seg.similarity import cell_weights, join_levels

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
        guard: looks at all that trains or chooses before it is used.
    """

    backbone: Backbone
    store: FeatureStore
    masks: MaskStore
    training_masks: MaskStore
    resolution: int
    guard: LeakGuard = field(default_factory=LeakGuard, compare=False, repr=False)

    def photos(self, image_ids: Sequence[str], size: int) -> Tensor:
        """Photos of the evaluation at a square size, float32 (N, 3, S, S) in [0, 1], made square by the protocol."""
        transform = EpisodeTransform("none", size, self.protocol.fit)
        return torch.stack([transform.photo(self.source.image(image_id)) for image_id in image_ids])


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
    size = resolution or lists.protocol.resolution
    return FoldData(**vars(lists), backbone=backbone, **_stores(lists, backbone, size, cache, byte_budget))


def at_resolution(
    data: FoldData, resolution: int, *, cache: Path | None = None, byte_budget: int = DEFAULT_BYTE_BUDGET
) -> FoldData:
    """The same lists, and the same guard, with photos fitted into squares of another size.

    A model may be trained on small photos, which is cheap, and used on larger ones, which is better (docs/method.md).

    Args:
        data: from `open_fold`.
        resolution: side of the square.
        cache, byte_budget: as in `open_fold`.
    """
    return replace(data, **_stores(data, data.backbone, resolution, cache, byte_budget))


def _stores(lists: FoldLists, backbone: Backbone, size: int, cache: Path | None, byte_budget: int) -> dict[str, Any]:
    """Features and masks at a size, as `FoldData` has them."""
    source, training_source, fit = lists.source, lists.training_source, lists.protocol.fit
    directory = None if cache is None else cache / "features"
    masks = MaskStore(source, size=size, fit=fit)
    return {
        "store": FeatureStore(backbone, source, size=size, directory=directory, fit=fit, byte_budget=byte_budget),
        "masks": masks,
        "training_masks": masks if training_source is source else MaskStore(training_source, size=size, fit=fit),
        "resolution": size,
    }


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
    pairs = data.pairs_to_train(classes)
    specs = draw(data, data.training_index, pairs, shots=shots, count=count, seed=seed, order="random")
    data.guard.check_episodes(data, specs, data.training_masks.source, purpose="training")
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
    seed += _HELD_OUT_SEED
    specs = draw(data, data.training_index, data.pairs_to_choose, shots=shots, count=count, seed=seed, order="random")
    data.guard.check_episodes(data, specs, data.training_masks.source, purpose="choices")
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
    return CachedEpisodes(data.store, data.masks, specs, supports=(support,), photos=data.photos)


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


def group_episodes(
    data: FoldData,
    classes: Sequence[int],
    *,
    shots: int,
    count: int,
    seed: int,
    supports: Sequence[SupportKind] = _MASKS,
    show_progress: bool = False,
) -> FeatureEpisodes:
    """Episodes of some base classes in the training split, from stored features, nothing mirrored.

    Raises:
        DataError: a class that is not base: novel classes train nothing.
    """
    specs = group_specs(data, classes, shots=shots, count=count, seed=seed)
    data.guard.check_episodes(data, specs, data.training_masks.source, purpose="training")
    _compute_features(data, specs, show_progress)
    return CachedEpisodes(data.store, data.training_masks, specs, supports=supports)


def group_specs(data: FoldData, classes: Sequence[int], *, shots: int, count: int, seed: int) -> Sequence[EpisodeSpec]:
    """Which episodes `group_episodes` gives; loads nothing."""
    foreign = sorted(set(classes) - set(data.split.base))
    if foreign:
        raise DataError(f"classes {foreign} are not among the base classes; novel classes must not train anything")
    pairs = [(image_id, class_id) for image_id, class_id in data.training_pairs if class_id in classes]
    return draw(data, data.training_index, pairs, shots=shots, count=count, seed=seed, order="random")


@dataclass(frozen=True, kw_only=True)
class ClassCells:
    """Cells of training photos and the base classes in them.

    Attributes:
        cells: unit-length joined frozen features, float16 (N, D).
        shares: float16 (N, C + 1), fraction of each cell that each base class fills, background last; what is ignored
            is in none.
        photos: int64 (N,), which photo each is of.
        classes: the C base class ids.
    """

    cells: Tensor
    shares: Tensor
    photos: Tensor
    classes: tuple[int, ...]

    def of(self, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cells and shares (n, c + 1) of the photos that show one of these classes; other classes are background."""
        columns = [self.classes.index(class_id) for class_id in classes]
        others = [n for n in range(len(self.classes) + 1) if n not in columns]
        shown = torch.zeros(int(self.photos.max()) + 1)
        shown.index_add_(0, self.photos, self.shares[:, columns].float().sum(dim=1))
        rows = shown[self.photos] > 0
        kept = self.shares[rows]
        return self.cells[rows], torch.cat([kept[:, columns], kept[:, others].sum(dim=1, keepdim=True)], dim=1)


def class_cells(data: FoldData, *, per_photo: int = 40, seed: int = 0, show_progress: bool = False) -> ClassCells:
    """Some cells of every training photo, drawn by the seed, with the shares of all base classes in them.

    Novel classes are what they are in the training masks: background, or ignored.
    """
    pairs = data.training_pairs
    data.guard.check_pairs(data, pairs, data.training_masks.source, purpose="training")
    images = list(dict.fromkeys(image_id for image_id, _ in pairs))
    data.store.ensure(images, show_progress=show_progress)
    base, generator = data.split.base, torch.Generator().manual_seed(seed)
    cells, shares, photos = list[Tensor](), list[Tensor](), list[Tensor]()
    bar = tqdm(images, desc="cells of base classes", unit="photo", disable=not show_progress)
    for number, image_id in enumerate(bar):
        joined = join_levels(data.store.get([image_id]))
        if not bool(torch.isfinite(joined).all()):
            raise DataError(f"features of photo {image_id!r} are not finite; mend the backbone's weights, or the photo")
        shown = [class_id for class_id in base if class_id in data.training_index.areas[image_id]]
        masks = data.training_masks.get([image_id] * len(shown), shown)
        foreground, background = (side.flatten(1) for side in cell_weights(masks, (joined.shape[2], joined.shape[3])))
        of_photo = foreground.new_zeros(len(base) + 1, foreground.shape[1])
        of_photo[[base.index(class_id) for class_id in shown]] = foreground
        of_photo[-1] = (background[0] - foreground[1:].sum(dim=0)).clamp_min(0)  # each mask calls the others background
        chosen = torch.randperm(foreground.shape[1], generator=generator)[:per_photo]
        cells.append(joined.flatten(2)[0].T[chosen].half())
        shares.append(of_photo.T[chosen].half())
        photos.append(torch.full((len(chosen),), number))
    return ClassCells(cells=torch.cat(cells), shares=torch.cat(shares), photos=torch.cat(photos), classes=base)
