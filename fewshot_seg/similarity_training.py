"""Training of the similarity network alone, on photos with one label each or on episodes, over a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from episodes.augment import EpisodeTransform
from episodes.class_batches import BalancedBatches
from episodes.labelled import LabelledImages
from episodes.types import DataError
from fewshot_seg.bad_steps import Account, account_of_episodes, model_facts
from fewshot_seg.feature_episodes import FeatureBatch, FeatureEpisodes
from fewshot_seg.features import FeatureStore
from fewshot_seg.metric_losses import MetricLoss
from fewshot_seg.optimisation import Plan, TrainingResult, optimise
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import SimilarityNetwork
from fewshot_seg.similarity_losses import (
    Constraint,
    MapKind,
    choose_triples,
    map_loss,
    mining_loss,
    region_embeddings,
    region_triples,
)
from fewshot_seg.trainee import NamedModules


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoBatch:
    """N photos with labels.

    Attributes:
        files: their ids.
        labels: int64 (N,).
        levels: float32 (N, C, h, w) per level.
        photos: float32 (N, 3, H, W), RGB in [0, 1]; None unless wanted.
    """

    files: tuple[str, ...]
    labels: Tensor
    levels: tuple[Tensor, ...]
    photos: Tensor | None


def account_of_photos(batch: PhotoBatch) -> Account[PhotoBatch]:
    """Of photos as features; `photos_of` makes the batch again. Their losses take several photos at a time."""
    tensors = {f"level{number}": level for number, level in enumerate(batch.levels)} | {"labels": batch.labels}
    if batch.photos is not None:
        tensors["photos"] = batch.photos
    return Account(what="photos", names=batch.files, tensors=tensors, facts={"losses": "similarity photos"})


def photos_of(tensors: Mapping[str, Tensor], files: Sequence[str]) -> PhotoBatch:
    """The batch of `account_of_photos`."""
    count = sum(name.startswith("level") for name in tensors)
    return PhotoBatch(
        files=tuple(files),
        labels=tensors["labels"],
        levels=tuple(tensors[f"level{number}"] for number in range(count)),
        photos=tensors.get("photos"),
    )


class PhotoBatches:
    """Class-balanced batches from stored features; batch n is a pure function of (seed, n).

    Args:
        store: features of the photos.
        images: photos and labels.
        classes, photos: classes in a batch, and photos of each.
        batches: how many batches there are.
        seed: of the draw.
        size: side of the square photos that a batch carries besides its features; None carries none.
        mirror: mirror half of the photos, features likewise (see `feature_episodes.CachedEpisodes`).
    """

    def __init__(
        self,
        store: FeatureStore,
        images: LabelledImages,
        *,
        classes: int,
        photos: int,
        batches: int,
        seed: int,
        size: int | None = None,
        mirror: bool = True,
    ) -> None:
        self._store, self._images, self._seed, self._mirror = store, images, seed, mirror
        self._codes = images.codes
        self._drawn = BalancedBatches(self._codes, classes=classes, images=photos, batches=batches, seed=seed)
        self._transform = None if size is None else EpisodeTransform("none", size)

    @property
    def with_photos(self) -> bool:
        """Whether batches carry photos besides features."""
        return self._transform is not None

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, number: int) -> PhotoBatch:
        indices = self._drawn[number]
        files = tuple(self._images.files[index] for index in indices)
        levels = self._store.get(files)
        photos = None if self._transform is None else torch.stack([self._photo(file) for file in files])
        if self._mirror:
            draws = np.random.default_rng([self._seed, number, 1]).random(len(files)) < 0.5
            which = torch.from_numpy(draws)[:, None, None, None]
            levels = tuple(torch.where(which, level.flip(3), level) for level in levels)
            photos = None if photos is None else torch.where(which, photos.flip(3), photos)
        return PhotoBatch(files=files, labels=torch.from_numpy(self._codes[indices]), levels=levels, photos=photos)

    def _photo(self, file: str) -> Tensor:
        assert self._transform is not None
        return self._transform.photo(self._images.image(file))

    def following(self, start: int) -> Iterator[PhotoBatch]:
        """Batches start, start + 1, ..."""
        for number in range(start, len(self)):
            yield self[number]


def photo_losses(
    similarity: SimilarityNetwork,
    batch: PhotoBatch,
    *,
    metric: MetricLoss | None,
    metric_weight: float,
    constraint: Constraint | None,
) -> dict[str, Tensor]:
    """``loss`` = metric_weight ``metric_loss`` + gamma ``mining_loss`` of photos, scalars (arXiv 2008.06035)."""
    maps = similarity(batch.levels)
    embeddings = similarity.embed(maps)
    losses = {"loss": 0 * embeddings.sum()}  # a batch without pairs still has a gradient, of zeros
    if metric is not None:
        losses["metric_loss"] = metric(embeddings, batch.labels)
        losses["loss"] = losses["loss"] + metric_weight * losses["metric_loss"]
    if constraint is None:
        return losses
    triple = choose_triples(embeddings, batch.labels, constraint.triples)
    if len(triple[0]) == 0:
        return losses
    anchor, positive, negative = (maps[index] for index in triple)
    photos = None
    if constraint.embedder is not None and batch.photos is not None:
        photos = (batch.photos[triple[0]], batch.photos[triple[1]], batch.photos[triple[2]])
    losses["mining_loss"] = mining_loss(constraint, (anchor, positive, negative), photos)
    losses["loss"] = losses["loss"] + constraint.weight * losses["mining_loss"]
    return losses | _mask(constraint)


def _mask(constraint: Constraint) -> dict[str, Tensor]:
    """Learned sharpness and threshold for the log: nothing in L_sm keeps them from a trivial answer."""
    mining = constraint.mining
    if not list(mining.parameters()):
        return {}
    return {"sharpness": mining.sharpness.detach(), "mask_threshold": mining.threshold.detach()}


def train_on_photos(
    similarity: SimilarityNetwork,
    batches: PhotoBatches,
    *,
    metric: MetricLoss | None,
    plan: Plan,
    metric_weight: float = 1.0,
    constraint: Constraint | None = None,
    **arguments: Any,
) -> TrainingResult:
    """Train in place on labelled photos.

    Args:
        similarity: over the levels of the batches.
        batches: one per step.
        metric: loss of the embeddings; None leaves it out.
        plan: as many steps as there are batches.
        metric_weight: of the metric loss.
        constraint: the similarity mining loss; its learned mask is trained along.
        arguments: folder, checkpoint_every, resume, show_progress, log_every of `optimisation.optimise`.

    Raises:
        DataError: as `optimise`, and a constraint in the photos over batches without them.
    """
    if metric is None and constraint is None:
        raise DataError("nothing to minimise: choose a metric loss or a constraint")
    if constraint is not None and constraint.embedder is not None and not batches.with_photos:
        raise DataError("a constraint that masks photos needs batches that carry them; give them a size")
    if len(batches) < plan.steps:
        raise DataError(f"{plan.steps} steps need as many batches, got {len(batches)}")
    device = next(similarity.parameters(), torch.empty(0)).device

    def losses(batch: PhotoBatch) -> dict[str, Tensor]:
        moved = PhotoBatch(
            files=batch.files,
            labels=batch.labels.to(device),
            levels=tuple(level.to(device) for level in batch.levels),
            photos=None if batch.photos is None else batch.photos.to(device),
        )
        return photo_losses(similarity, moved, metric=metric, metric_weight=metric_weight, constraint=constraint)

    return optimise(
        NamedModules(similarity=similarity, mining=None if constraint is None else constraint.mining),
        batches.following,
        losses,
        plan=plan,
        describe=account_of_photos,
        **arguments,
    )


def episode_similarity_losses(
    segmenter: FewShotSegmenter,
    batch: FeatureBatch,
    *,
    maps: Sequence[MapKind],
    map_weight: float,
    metric: MetricLoss | None,
    metric_weight: float,
    constraint: Constraint | None,
) -> dict[str, Tensor]:
    """``loss`` = map_weight ``map_loss`` + metric_weight ``metric_loss`` + gamma ``mining_loss`` of B episodes."""
    similarity = segmenter.similarity
    support_maps, query_maps = similarity(batch.support_levels), similarity(batch.query_levels)
    support = segmenter.encode_support_maps(support_maps, batch.support_levels, batch.support_masks)
    losses: dict[str, Tensor] = {}
    terms = []
    if maps:
        losses["map_loss"] = map_loss(segmenter, support, query_maps, batch.query_masks, maps)
        terms.append(map_weight * losses["map_loss"])
    if metric is not None:
        embeddings, labels = region_embeddings(support, query_maps, batch.query_masks, batch.class_ids)
        losses["metric_loss"] = metric(embeddings, labels)
        terms.append(metric_weight * losses["metric_loss"])
    if constraint is not None:
        losses["mining_loss"] = mining_loss(constraint, region_triples(query_maps, support_maps, batch.support_masks))
        terms.append(constraint.weight * losses["mining_loss"])
        losses |= _mask(constraint)
    return {"loss": torch.stack(terms).sum(), **losses}


def train_on_episodes(
    segmenter: FewShotSegmenter,
    episodes: FeatureEpisodes,
    *,
    batch_size: int,
    plan: Plan,
    maps: Sequence[MapKind] = (),
    map_weight: float = 1.0,
    metric: MetricLoss | None = None,
    metric_weight: float = 1.0,
    constraint: Constraint | None = None,
    **arguments: Any,
) -> TrainingResult:
    """Train the similarity network of a segmenter in place; its decoder is left alone.

    Args:
        segmenter: with prior ``similarity``.
        episodes: at least steps * batch_size of them.
        batch_size: episodes per step.
        plan: schedule and length.
        maps: kinds of maps whose loss on the query's mask is minimised (`similarity_losses.map_loss`).
        metric: loss of the embeddings of objects and backgrounds; None leaves it out.
        map_weight, metric_weight: of the terms.
        constraint: the similarity mining loss over query, support's object and support's background, in the features.
        arguments: as in `train_on_photos`.

    Raises:
        DataError: as `optimise`, too few episodes, no term at all, or a constraint that masks photos.
    """
    if not maps and metric is None and constraint is None:
        raise DataError("nothing to minimise: choose maps, a metric loss or a constraint")
    if constraint is not None and constraint.embedder is not None:
        raise DataError("episodes are stored features: their constraint masks features, not photos")
    if len(episodes) < plan.steps * batch_size:
        raise DataError(
            f"{plan.steps} steps of {batch_size} need {plan.steps * batch_size} episodes, got {len(episodes)}"
        )
    device = next(segmenter.backbone.parameters()).device

    def losses(batch: FeatureBatch) -> dict[str, Tensor]:
        return episode_similarity_losses(
            segmenter,
            batch.to(device),
            maps=maps,
            map_weight=map_weight,
            metric=metric,
            metric_weight=metric_weight,
            constraint=constraint,
        )

    return optimise(
        NamedModules(similarity=segmenter.similarity, mining=None if constraint is None else constraint.mining),
        lambda step: episodes.batches(batch_size, start=step * batch_size),
        losses,
        plan=plan,
        describe=lambda batch: account_of_episodes(batch, losses="similarity episodes", **model_facts(segmenter)),
        **arguments,
    )
