"""Episodes as batches of tensors; the same for any number of worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from episodes.annotations import derive_annotation
from episodes.augment import EpisodeTransform
from episodes.types import IGNORE, OUTSIDE, SUPPORT_KINDS, DataError, EpisodeBatch, EpisodeSpec, MaskSource, SupportKind


def checked_kinds(kinds: Sequence[SupportKind]) -> tuple[SupportKind, ...]:
    """The kinds. Raises DataError for none, or for one that is none of `SUPPORT_KINDS`."""
    unknown = [kind for kind in kinds if kind not in SUPPORT_KINDS]
    if unknown or not kinds:
        came = f"got {', '.join(map(repr, unknown))}" if unknown else "none was named"
        raise DataError(f"supports are marked by one or more of {', '.join(SUPPORT_KINDS)}; {came}")
    return tuple(kinds)


def support_kinds(spec: EpisodeSpec, kinds: Sequence[SupportKind]) -> tuple[SupportKind, ...]:
    """How each of an episode's K supports is marked: one of `kinds`, drawn by the episode's seed if there are several.

    Raises:
        DataError: no kind, or an unknown one.
    """
    known = checked_kinds(kinds)
    if len(known) == 1:
        return known * spec.shots
    drawn = np.random.default_rng([spec.seed, 3]).integers(len(known), size=spec.shots)
    return tuple(known[k] for k in drawn.tolist())


class EpisodeDataset(Dataset[EpisodeBatch]):
    """Episode n as an `EpisodeBatch` of one.

    Args:
        source: images and masks.
        sampler: the specs, usually an `EpisodeSampler`.
        support_transform: applied to every support.
        query_transform: applied to the query; of the same size.
        supports: how supports are marked; of several, each support gets one by the episode's seed. Marks are derived
            from the mask as it is after the transform (`episodes.annotations`); what a source has drawn is not used.

    Raises:
        DataError: the two transforms give different sizes, or an unknown kind of support.
    """

    def __init__(
        self,
        source: MaskSource,
        sampler: Sequence[EpisodeSpec],
        support_transform: EpisodeTransform,
        query_transform: EpisodeTransform,
        *,
        supports: Sequence[SupportKind] = ("mask",),
    ) -> None:
        if support_transform.size != query_transform.size:
            raise DataError(
                f"supports and queries must have one size, got {support_transform.size} and {query_transform.size}"
            )
        self._source, self._sampler = source, sampler
        self._support_transform, self._query_transform = support_transform, query_transform
        self._supports = checked_kinds(supports)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getitem__(self, n: int) -> EpisodeBatch:
        spec = self._sampler[n]
        # One seed per image: the query first, so that it looks the same for any number of shots.
        seeds = np.random.SeedSequence(spec.seed).generate_state(1 + spec.shots, np.uint64).tolist()
        query, query_mask = self._query_transform(
            self._source.image(spec.query_id), self._source.mask(spec.query_id, spec.class_id), seed=seeds[0]
        )
        supports = [
            self._support_transform.marks(
                self._source.image(image_id), self._source.mask(image_id, spec.class_id), seed=seed
            )
            for image_id, seed in zip(spec.support_ids, seeds[1:], strict=True)
        ]
        kinds = support_kinds(spec, self._supports)
        marks = [_marked(mask, kind) for (_, mask), kind in zip(supports, kinds, strict=True)]
        return EpisodeBatch(
            support_images=torch.stack([image for image, _ in supports])[None],
            support_masks=torch.stack(marks)[None],
            support_dense=torch.tensor([[kind == "mask" for kind in kinds]]),
            support_truth=torch.stack([_marked(mask, "mask") for _, mask in supports])[None],
            query_images=query[None],
            query_masks=query_mask[None],
            class_ids=torch.tensor([spec.class_id]),
            specs=(spec,),
        )


def _marked(mask: Tensor, kind: SupportKind) -> Tensor:
    """Marks derived from a transformed mask, uint8 (S, S), in which `OUTSIDE` is beside the photo."""
    outside = mask == OUTSIDE
    plain = mask.masked_fill(outside, IGNORE)
    if kind == "mask":
        return plain
    if not bool((mask == 1).any()):  # a crop may have lost the object: then nothing is known
        return torch.full_like(mask, IGNORE).masked_fill(outside, OUTSIDE)
    return torch.from_numpy(derive_annotation(plain.numpy(), kind)).masked_fill(outside, OUTSIDE)


class _Carrying(Dataset["EpisodeBatch | DataError"]):
    """Episodes, or the errors of those that cannot be read: a worker process would turn an error into its traceback."""

    def __init__(self, dataset: EpisodeDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> EpisodeBatch | DataError:
        try:
            return self._dataset[index]
        except DataError as error:
            return DataError(str(error))  # errors of sources have more arguments, and do not travel


def _collate_or_error(found: Sequence[EpisodeBatch | DataError]) -> EpisodeBatch | DataError:
    batches = [one for one in found if isinstance(one, EpisodeBatch)]
    return collate(batches) if len(batches) == len(found) else next(one for one in found if isinstance(one, DataError))


def collate(batches: Sequence[EpisodeBatch]) -> EpisodeBatch:
    """One batch from several of equal shots and size, in order."""
    return EpisodeBatch(
        support_images=torch.cat([batch.support_images for batch in batches]),
        support_masks=torch.cat([batch.support_masks for batch in batches]),
        support_dense=torch.cat([batch.support_dense for batch in batches]),
        support_truth=torch.cat([batch.support_truth for batch in batches]),
        query_images=torch.cat([batch.query_images for batch in batches]),
        query_masks=torch.cat([batch.query_masks for batch in batches]),
        class_ids=torch.cat([batch.class_ids for batch in batches]),
        specs=tuple(spec for batch in batches for spec in batch.specs),
    )


def _one_thread(worker: int) -> None:
    del worker
    cv2.setNumThreads(0)  # workers are the parallelism; threads within them only fight for cores


def episode_loader(
    dataset: EpisodeDataset, *, batch_size: int, workers: int = 0, start: int = 0
) -> Iterator[EpisodeBatch]:
    """Batches of episodes start, start + 1, ... in order; the last may be smaller.

    Args:
        dataset: the episodes.
        batch_size: episodes per batch.
        workers: processes that load; 0 loads in this one. The batches do not depend on it.
        start: first episode, so that an interrupted run goes on where it stopped.

    Raises:
        DataError: an argument outside its range; from the batches, a photo or mask that cannot be read.
    """
    if batch_size < 1:
        raise DataError(f"batch size must be at least 1, got {batch_size}")
    if workers < 0:
        raise DataError(f"number of workers must not be negative, got {workers}")
    if not 0 <= start <= len(dataset):
        raise DataError(f"first episode must be in 0..{len(dataset)}, got {start}")
    loader = DataLoader(
        _Carrying(dataset),
        batch_size=batch_size,
        sampler=range(start, len(dataset)),
        num_workers=workers,
        collate_fn=_collate_or_error,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # else every pass would draw from, and change, torch's global stream
    )
    return _without_errors(loader)


def _without_errors(loader: DataLoader[EpisodeBatch | DataError]) -> Iterator[EpisodeBatch]:
    found: EpisodeBatch | DataError
    for found in loader:
        if isinstance(found, DataError):
            raise found
        yield found
