"""Episodes as frozen features: from the cache, or live through the backbone when photos are augmented."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, overload

import numpy as np
import torch
from torch import Tensor

from episodes.loader import EpisodeDataset, checked_kinds, episode_loader, support_kinds
from episodes.types import DataError, EpisodeSpec, SupportKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.features import FeatureStore, MaskStore


class LazyLevels(Sequence[Tensor]):
    """Levels of features that are read when somebody looks at them, once: an evaluation may know their maps already.

    Args:
        read: gives them.
        number: of levels.
    """

    def __init__(self, read: Callable[[], tuple[Tensor, ...]], number: int) -> None:
        self._read, self._number = read, number
        self._levels: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        if self._levels is None:
            self._levels = self._read()
        return self._levels[index]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPhotos:
    """Where the features and marks of a batch came from, as they are (nothing mirrored).

    Attributes:
        features, masks: the stores.
        kinds: how the supports are marked, episode by episode.
    """

    features: FeatureStore
    masks: MaskStore
    kinds: tuple[SupportKind, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureBatch:
    """B episodes of K shots.

    Attributes:
        support_levels: float32 (B*K, C, h, w) per level, episode by episode.
        support_masks: uint8 (B, K, S, S), 1 = object, 0 = background, 255 = ignored or not known.
        support_dense: bool (B, K), whether the mask marks every pixel; False for boxes, scribbles, points, labels.
        support_truth: uint8 (B, K, S, S), the masks behind weaker supports; what their completion is trained with.
        query_levels: float32 (B, C, h, w) per level.
        query_masks: uint8 (B, S, S), 255 = ignore.
        specs: the episodes.
        stored: where all this came from, if it is kept somewhere.
        query_photos: query_photos(S) gives the queries' photos at a square size, float32 (B, 3, S, S), on the CPU; None
            where nobody asks for them.
    """

    support_levels: Sequence[Tensor]
    support_masks: Tensor
    support_dense: Tensor
    support_truth: Tensor
    query_levels: Sequence[Tensor]
    query_masks: Tensor
    specs: tuple[EpisodeSpec, ...]
    stored: StoredPhotos | None = None
    query_photos: Callable[[int], Tensor] | None = None

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Class id of every episode."""
        return tuple(spec.class_id for spec in self.specs)

    def to(self, device: torch.device) -> FeatureBatch:
        """The same batch on a device."""
        if device == self.query_masks.device:
            return self
        return replace(
            self,
            support_levels=tuple(level.to(device) for level in self.support_levels),
            support_masks=self.support_masks.to(device),
            support_dense=self.support_dense.to(device),
            support_truth=self.support_truth.to(device),
            query_levels=tuple(level.to(device) for level in self.query_levels),
            query_masks=self.query_masks.to(device),
        )


class FeatureEpisodes(Protocol):
    """Episodes 0..len-1 in batches; batch borders never change an episode."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        """Episodes start, start + 1, ... in order; the last batch may be smaller."""
        ...


class CachedEpisodes:
    """Episodes from stored features.

    Args:
        store: features of the images.
        masks: their masks at the same square size.
        specs: the episodes, usually an `EpisodeSampler`.
        mirror: mirror supports and queries half of the time, by the episode's seed. Mirrored features stand in
            for the features of the mirrored photo; the two differ slightly, which costs nothing as augmentation.
        supports: how supports are marked; of several, each support gets one by the episode's seed.
        photos: photos(image_ids, S) reads photos at a square size, float32 (N, 3, S, S); for batches that are to know
            their queries' photos.
    """

    def __init__(
        self,
        store: FeatureStore,
        masks: MaskStore,
        specs: Sequence[EpisodeSpec],
        *,
        mirror: bool = False,
        supports: Sequence[SupportKind] = ("mask",),
        photos: Callable[[Sequence[str], int], Tensor] | None = None,
    ) -> None:
        self._photos = photos
        self._store, self._masks, self._specs, self._mirror = store, masks, specs, mirror
        self._supports = checked_kinds(supports)

    def __len__(self) -> int:
        return len(self._specs)

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        """See `FeatureEpisodes.batches`. Raises DataError for a batch size below 1 or a start outside 0..len."""
        if batch_size < 1:
            raise DataError(f"batch size must be at least 1, got {batch_size}")
        if not 0 <= start <= len(self):
            raise DataError(f"first episode must be in 0..{len(self)}, got {start}")
        for first in range(start, len(self), batch_size):
            yield self._batch(tuple(self._specs[n] for n in range(first, min(first + batch_size, len(self)))))

    def _batch(self, specs: tuple[EpisodeSpec, ...]) -> FeatureBatch:
        shots = specs[0].shots
        support_ids = [image_id for spec in specs for image_id in spec.support_ids]
        query_ids = [spec.query_id for spec in specs]
        class_ids = [spec.class_id for spec in specs]
        support_classes = np.repeat(class_ids, shots).tolist()
        kinds = [kind for spec in specs for kind in support_kinds(spec, self._supports)]
        number, store = self._store.levels, self._store
        support_levels: Sequence[Tensor] = LazyLevels(lambda: store.get(support_ids), number)
        query_levels: Sequence[Tensor] = LazyLevels(lambda: store.get(query_ids), number)
        truth = self._masks.get(support_ids, support_classes)
        support_masks = self._masks.get(support_ids, support_classes, kinds) if set(kinds) != {"mask"} else truth
        query_masks = self._masks.get(query_ids, class_ids)
        if self._mirror:
            draws = np.stack([np.random.default_rng([spec.seed, 2]).random(1 + shots) < 0.5 for spec in specs])
            which = torch.from_numpy(draws)
            query_levels, query_masks = _mirror_levels(query_levels, which[:, 0]), _mirror(query_masks, which[:, 0])
            flipped = which[:, 1:].flatten()
            support_levels = _mirror_levels(support_levels, flipped)
            support_masks, truth = _mirror(support_masks, flipped), _mirror(truth, flipped)
        shape = (len(specs), shots, *truth.shape[1:])
        return FeatureBatch(
            support_levels=support_levels,
            support_masks=support_masks.reshape(shape),
            support_dense=torch.tensor([kind == "mask" for kind in kinds]).reshape(shape[:2]),
            support_truth=truth.reshape(shape),
            query_levels=query_levels,
            query_masks=query_masks,
            specs=specs,
            stored=None if self._mirror else StoredPhotos(features=self._store, masks=self._masks, kinds=tuple(kinds)),
            query_photos=None if self._mirror or self._photos is None else partial(self._photos, query_ids),
        )


def _mirror_levels(levels: Sequence[Tensor], which: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.where(which[:, None, None, None], level.flip(3), level) for level in levels)


def _mirror(masks: Tensor, which: Tensor) -> Tensor:
    return torch.where(which[:, None, None], masks.flip(2), masks)


class LiveEpisodes:
    """Episodes through loader and backbone: slower, for augmentations that change the photo itself."""

    def __init__(self, backbone: Backbone, dataset: EpisodeDataset, *, workers: int = 0) -> None:
        self._backbone, self._dataset, self._workers = backbone, dataset, workers

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        """See `FeatureEpisodes.batches`."""
        device = next(self._backbone.parameters()).device
        for batch in episode_loader(self._dataset, batch_size=batch_size, workers=self._workers, start=start):
            yield FeatureBatch(
                support_levels=self._backbone(batch.support_images.flatten(0, 1).to(device)),
                support_masks=batch.support_masks,
                support_dense=batch.support_dense,
                support_truth=batch.support_truth,
                query_levels=self._backbone(batch.query_images.to(device)),
                query_masks=batch.query_masks,
                specs=batch.specs,
            )
