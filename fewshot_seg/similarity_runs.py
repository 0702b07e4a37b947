"""Runs of the similarity network alone: data from settings, a training in its run folder, records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from episodes.labelled import LabelledImages, split_labels
from episodes.leak_guard import check_labelled
from episodes.reidentification import ReidentificationData, ReidentificationLayout, open_reidentification
from episodes.retrieval import RetrievalData, RetrievalLayout, open_retrieval
from episodes.types import DataError
from fewshot_seg.backbones import EMBEDDED, Backbone, build_backbone
from fewshot_seg.checkpoint import LoadedSimilarity, load_similarity, save_similarity
from fewshot_seg.config import (
    CacheSettings,
    SimilarityModelSettings,
    SimilaritySettings,
    SimilarityTrainConfig,
)
from fewshot_seg.constraint import SimilarityMining
from fewshot_seg.embedding import ImageEmbedder
from fewshot_seg.features import FeatureStore
from fewshot_seg.fold_data import FoldData, training_episodes
from fewshot_seg.metric_losses import MetricLoss, build_metric_loss
from fewshot_seg.optimisation import CHECKPOINT_NAME, Plan, TrainingResult
from fewshot_seg.runs import RUN_NAME, benchmark_name, check_classes, check_data, check_folder, open_data, run_record
from fewshot_seg.runtime import environment, write_json
from fewshot_seg.segmenter import FewShotSegmenter, training_free
from fewshot_seg.shipped import model_file
from fewshot_seg.similarity import SimilarityNetwork
from fewshot_seg.similarity_losses import Constraint
from fewshot_seg.similarity_training import PhotoBatches, train_on_episodes, train_on_photos

SIMILARITY_NAME = "similarity.safetensors"
PHOTO_SIZE = 224
"""Side of the square photos of retrieval and re-identification, unless the settings say otherwise."""

_PHOTO_RANK, _EPISODE_RANK = 64, 16
_SPLIT_SEED = 0  # of the held-out classes: always the same, whatever the seed of a run


def open_photos(settings: SimilaritySettings) -> RetrievalData | ReidentificationData:
    """The labelled photos of the settings.

    Raises:
        DataError: no such layout at the root.
    """
    assert settings.root is not None  # checked by the settings
    if settings.data in get_args(RetrievalLayout):
        return open_retrieval(cast(RetrievalLayout, settings.data), settings.root)
    return open_reidentification(cast(ReidentificationLayout, settings.data), settings.root)


def photo_part(
    data: RetrievalData | ReidentificationData, part: Literal["train", "kept", "held-out", "test"]
) -> LabelledImages:
    """All training photos, those of the kept classes, those of the held-out third of the classes, or the test photos.

    The test photos of re-identification are those of the gallery that show a person of the queries: distractors share
    one label, but are many persons.
    """
    if part == "train":
        return data.train
    if part == "test":
        if isinstance(data, RetrievalData):
            return data.test
        return data.gallery.select(set(data.gallery.labels) & set(data.query.labels))
    return split_labels(data.train, seed=_SPLIT_SEED)[0 if part == "kept" else 1]


def open_store(images: LabelledImages, backbone: Backbone, cache: CacheSettings, *, size: int) -> FeatureStore:
    """Stored features of labelled photos; all parts of one data set share them."""
    return FeatureStore(
        backbone,
        images,
        size=size,
        directory=cache.cache / "features",
        byte_budget=int(cache.cache_gigabytes * 2**30),
    )


def open_network(settings: SimilarityModelSettings, device: torch.device) -> LoadedSimilarity:
    """The network of the settings, or the frozen features as they are; resolution 0 where no file names one.

    Raises:
        DataError: missing, damaged or foreign file.
    """
    if settings.model is not None:
        path = model_file(settings.model)
        return load_similarity(path, backbone_weights=settings.backbone_weights, device=device)
    weights = settings.backbone_weights or EMBEDDED
    backbone = build_backbone(settings.backbone, strides=settings.strides, weights=weights).to(device)
    similarity = SimilarityNetwork(backbone.channels, rank=0)
    return LoadedSimilarity(backbone=backbone, similarity=similarity, resolution=0, notes={})


def check_labels(name: str, notes: dict[str, Any], images: LabelledImages, layout: str) -> None:
    """Raises DataError when a network, by the notes of its file, was trained on classes that are to be scored."""
    if notes.get("source") != layout:
        return
    seen = sorted(set(notes.get("labels", [])) & set(images.labels))
    if seen:
        raise DataError(
            f"{name} was trained on {len(seen)} of the classes to be scored ({seen[0]}, ...); use --part test, or a "
            "network that was trained with --held-out"
        )


def new_metric(config: SimilarityTrainConfig) -> tuple[MetricLoss | None, float]:
    """The metric loss of a configuration and its weight; None where the weight is 0."""
    weight = (0.0 if config.episodic else 1.0) if config.metric_weight is None else config.metric_weight
    if weight == 0:
        return None, 0.0
    return build_metric_loss(config.loss, margin=config.margin, mine=config.mine), weight


def new_constraint(
    config: SimilarityTrainConfig, backbone: Backbone, similarity: SimilarityNetwork
) -> Constraint | None:
    """The constraint of a configuration; None for gamma 0."""
    if config.constraint == 0:
        return None
    mining = SimilarityMining(
        sharpness=config.sharpness, threshold=config.mask_threshold, learnable=config.learn_mask
    ).to(next(backbone.parameters()).device)
    return Constraint(
        mining=mining,
        weight=config.constraint,
        kind=config.constraint_form,
        triples=config.constraint_triples,
        embedder=ImageEmbedder(backbone, similarity) if config.constraint_domain == "photos" else None,
    )


def _plan(config: SimilarityTrainConfig) -> Plan:
    decisive = (
        *("data", "fold", "held_out", "loss", "metric_weight", "margin", "mine", "maps", "map_weight", "constraint"),
        *("constraint_form", "constraint_domain", "constraint_triples", "sharpness", "mask_threshold", "learn_mask"),
        *("batch_size", "shots", "classes", "photos", "mirror"),
    )
    settings = config.as_json()
    return Plan(
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        seed=config.seed,
        details={name: settings[name] for name in decisive},
    )


def new_similarity(backbone: Backbone, config: SimilarityTrainConfig) -> SimilarityNetwork:
    """The untrained network of a configuration, on the backbone's device."""
    rank = config.rank or (_EPISODE_RANK if config.episodic else _PHOTO_RANK)
    return SimilarityNetwork(backbone.channels, rank=rank, seed=config.seed).to(next(backbone.parameters()).device)


def train_photos_configured(
    images: LabelledImages,
    store: FeatureStore,
    backbone: Backbone,
    config: SimilarityTrainConfig,
    *,
    folder: Path | None = None,
    show_progress: bool = False,
) -> tuple[SimilarityNetwork, TrainingResult]:
    """Train a new network on labelled photos with the arguments of a configuration."""
    similarity = new_similarity(backbone, config)
    store.ensure(images.files, show_progress=show_progress)
    metric, weight = new_metric(config)
    masks_photos = config.constraint > 0 and config.constraint_domain == "photos"
    batches = PhotoBatches(
        store,
        images,
        classes=config.classes,
        photos=config.photos,
        batches=config.steps,
        seed=config.seed,
        size=(config.resolution or PHOTO_SIZE) if masks_photos else None,
        mirror=config.mirror,
    )
    result = train_on_photos(
        similarity,
        batches,
        metric=metric,
        metric_weight=weight,
        constraint=new_constraint(config, backbone, similarity),
        plan=_plan(config),
        folder=folder,
        checkpoint_every=config.checkpoint_every,
        resume=config.resume,
        show_progress=show_progress,
    )
    return similarity, result


def train_episodes_configured(
    data: FoldData, config: SimilarityTrainConfig, *, folder: Path | None = None, show_progress: bool = False
) -> tuple[FewShotSegmenter, TrainingResult]:
    """Train the network of a new decoder-less segmenter on base classes with the arguments of a configuration."""
    similarity = new_similarity(data.backbone, config)
    segmenter = training_free(data.backbone, similarity=similarity)
    metric, weight = new_metric(config)
    episodes = training_episodes(
        data,
        data.choices if config.held_out else data.split,
        shots=config.shots,
        count=config.steps * config.batch_size,
        seed=config.seed,
        augment="mirror" if config.mirror else "none",
        show_progress=show_progress,
    )
    result = train_on_episodes(
        segmenter,
        episodes,
        batch_size=config.batch_size,
        maps=config.maps if config.map_weight else (),
        map_weight=config.map_weight,
        metric=metric,
        metric_weight=weight,
        constraint=new_constraint(config, data.backbone, similarity),
        plan=_plan(config),
        folder=folder,
        checkpoint_every=config.checkpoint_every,
        resume=config.resume,
        show_progress=show_progress,
    )
    return segmenter, result


def open_episodes(settings: SimilaritySettings, backbone: Backbone, *, fold: int, resolution: int | None) -> FoldData:
    """A fold of the settings' data, at `resolution` unless the settings name one."""
    return open_data(
        settings.data_settings(), settings, backbone, fold=fold, resolution=settings.resolution or resolution
    )


def photo_record(
    verb: str, config: SimilaritySettings, images: LabelledImages, **parts: LabelledImages
) -> dict[str, Any]:
    """What ``run.json`` says of a run over labelled photos, but for the results."""
    used = {"photos": images, **parts}
    return {
        "verb": verb,
        "configuration": config.as_json(),
        "data": {
            part: {
                "name": some.name,
                "photos": len(some),
                "classes": len(some.class_names),
                "fingerprint": some.fingerprint(some.files),
            }
            for part, some in used.items()
        },
        "environment": environment(),
    }


def run_similarity_training(
    config: SimilarityTrainConfig, *, device: torch.device, show_progress: bool = False
) -> TrainingResult:
    """Train into `config.out`: ``similarity.safetensors``, ``run.json``, logs and checkpoints.

    Raises:
        DataError: bad data; a folder with an earlier run (without `resume`) or with other settings (with it).
    """
    check_folder(config, (SIMILARITY_NAME, CHECKPOINT_NAME))
    backbone = build_backbone(config.backbone, strides=config.strides, weights=config.backbone_weights).to(device)
    if config.episodic:
        data = open_episodes(config, backbone, fold=config.fold, resolution=None)
        record = run_record("similarity train", config, data)
        check_data(config, record, (SIMILARITY_NAME, CHECKPOINT_NAME))
        write_json(config.out / RUN_NAME, record | {"results": None})
        segmenter, result = train_episodes_configured(data, config, folder=config.out, show_progress=show_progress)
        similarity, resolution = segmenter.similarity, data.resolution
        guarded = data.guard.record()
        classes = data.choices.base if config.held_out else data.split.base
        notes = {**record["data"], "source": data.source.name, "base_classes": list(classes)}
    else:
        photos = open_photos(config)
        images = photo_part(photos, "kept" if config.held_out else "train")
        scored = [photos.test] if isinstance(photos, RetrievalData) else [photos.query, photos.gallery]
        guarded = check_labelled(images, *scored)
        if len(images.class_names) < config.classes:
            raise DataError(
                f"--classes {config.classes} in a batch, but {images.name} has {len(images.class_names)} classes; "
                "lower --classes"
            )
        resolution = config.resolution or PHOTO_SIZE
        store = open_store(images, backbone, config, size=resolution)
        record = photo_record("similarity train", config, images)
        write_json(config.out / RUN_NAME, record | {"results": None})
        similarity, result = train_photos_configured(
            images, store, backbone, config, folder=config.out, show_progress=show_progress
        )
        notes = {"source": config.data, "name": images.name, "labels": list(images.class_names)}
    results = {"steps": result.steps, "seconds": result.seconds, "loss": result.last_loss}
    save_similarity(
        config.out / SIMILARITY_NAME,
        similarity,
        backbone,
        backbone_weights=config.backbone_weights,
        resolution=resolution,
        notes=notes | {"steps": result.steps},
    )
    write_json(config.out / RUN_NAME, record | {"results": results, "leak_guard": guarded})
    return result


def check_episodes(name: str, notes: dict[str, Any], data: FoldData, *, held_out: bool) -> None:
    """Raises DataError when a network, by the notes of its file, was trained on classes that are to be scored."""
    check_classes(name, notes, data)
    if held_out and notes.get("source") == data.source.name:
        seen = sorted(set(notes.get("base_classes", [])) & set(data.choices.novel))
        if seen:
            names = ", ".join(data.source.class_names[class_id] for class_id in seen)
            raise DataError(f"{name} was trained on {names}, which are held out; train it with --held-out")


def episodes_name(data: FoldData) -> str:
    """Benchmark and fold, for titles."""
    return benchmark_name(data) + ("" if data.fold is None else f", fold {data.fold}")
