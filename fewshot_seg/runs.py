"""Runs: data from settings, a training in its run folder, and the records that run folders keep."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from episodes.episode_files import EpisodeFile, fingerprint_pairs
from episodes.fold_lists import protocol_for
from episodes.protocols import PROTOCOL_NAMES, EpisodeProtocol, get_protocol, read_protocol
from episodes.sources import (
    CocoJsonSource,
    CocoSource,
    FolderSource,
    FssSource,
    LabelmeSource,
    SyntheticSource,
    VocSource,
    common_name,
)
from episodes.types import DataError, MaskSource
from fewshot_seg.acceleration import accelerate
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.checkpoint import load_similarity, save_segmenter
from fewshot_seg.config import (
    CacheSettings,
    Config,
    DataSettings,
    EpisodeSettings,
    EvaluateConfig,
    SimilarityTrainConfig,
    TrainConfig,
)
from fewshot_seg.cross_fitted_fold import class_groups, train_cross_fitted
from fewshot_seg.distributed import current_ranks, on_first
from fewshot_seg.evaluation import Evaluation
from fewshot_seg.experiment import TrainedFold, train_fold
from fewshot_seg.findings import Finding
from fewshot_seg.fold_data import FoldData, open_fold
from fewshot_seg.metrics import IoUResult
from fewshot_seg.n_way import NWayEvaluation
from fewshot_seg.optimisation import CHECKPOINT_NAME
from fewshot_seg.runtime import environment, read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.similarity import SimilarityNetwork

MODEL_NAME = "model.safetensors"
RUN_NAME = "run.json"
EVALUATION_NAME = "evaluation.json"

_BENCHMARKS = {"pascal": ("PASCAL-5i", (1449,)), "coco": ("COCO-20i", (40504, 5000))}
_MAY_DIFFER = frozenset(
    {"resume", "out", "cache", "cache_gigabytes", "device", "workers", "checkpoint_every", "compile"}
)
"""Settings that may change between a run and its resumption: they do not change the weights."""
_BEFORE = {"training": "joint"}
"""What runs did before a setting existed, where its default is something else."""


def open_source(settings: DataSettings) -> MaskSource:
    """The data set of the settings.

    Raises:
        DataError: no such layout at the root.
    """
    if settings.data == "synthetic":
        return SyntheticSource()
    root = settings.root
    if root is None:  # the settings refuse it, too
        raise DataError(f"--data {settings.data} needs --root DIR")
    if settings.data == "voc":
        return VocSource(root, sbd=settings.sbd)
    if settings.data == "coco-json":
        return CocoJsonSource(root, settings.images)
    opened: dict[str, Callable[[Path], MaskSource]] = {
        "coco": CocoSource,
        "fss": FssSource,
        "folder": FolderSource,
        "labelme": LabelmeSource,
    }
    return opened[settings.data](root)


def open_protocol(settings: DataSettings, source: MaskSource) -> EpisodeProtocol:
    """The protocol of the settings, with the splits that they or the source name."""
    if settings.protocol_file is not None:
        protocol = read_protocol(settings.protocol_file)
        if protocol.name in PROTOCOL_NAMES and protocol.name != "custom":
            raise DataError(
                f"{settings.protocol_file} calls itself {protocol.name!r}, which is a published protocol; give it "
                "another name, in the file or of the file"
            )
    else:
        followed = source.folds is not None or isinstance(source, SyntheticSource)
        name = settings.protocol or ("hsnet" if followed else "custom")
        # the published rules, where a data set without folds asks for them, are those of PASCAL
        protocol = get_protocol(name, None if name == "custom" else source.folds or "pascal")
    changes = {
        name: value for name in ("training_split", "evaluation_split") if (value := getattr(settings, name)) is not None
    }
    return protocol_for(source, dataclasses.replace(protocol, **changes))


def open_data(
    settings: DataSettings,
    cache: CacheSettings,
    backbone: Backbone,
    *,
    fold: int,
    validation_fold: int | None = None,
    resolution: int | None = None,
    show_progress: bool = False,
) -> FoldData:
    """Source, protocol, indices and caches of the settings."""
    source = open_source(settings)
    return open_fold(
        source,
        backbone,
        open_protocol(settings, source),
        fold=fold,
        validation_fold=validation_fold,
        novel_classes=settings.novel_classes,
        resolution=resolution,
        cache=cache.cache,
        byte_budget=int(cache.cache_gigabytes * 2**30),
        show_progress=show_progress,
    )


def benchmark_name(data: FoldData) -> str:
    """Name of the data in results; a part of a benchmark never goes by the name of the whole.

    The whole is told by the number of evaluation images: VOC 2012's val, and COCO's val2014 or val2017.
    """
    images = len(data.evaluation_index.image_ids)
    if data.source.folds is None:
        return "synthetic" if isinstance(data.source, SyntheticSource) else f"{data.source.name}/{images}"
    name, wholes = _BENCHMARKS[data.source.folds]
    return name if images in wholes else f"{name}/{images}"


def episodes_title(benchmark: str, fold: int | None, *, shots: int, ways: int = 1, support: str = "mask") -> str:
    """What is scored or drawn, in words.

    >>> episodes_title("PASCAL-5i", 0, shots=1, support="box")
    'PASCAL-5i, fold 0, 1-shot, supports marked by box'
    """
    place = "" if fold is None else f", fold {fold}"
    marked = "" if support == "mask" else f", supports marked by {support}"
    return f"{benchmark}{place}, {f'{ways}-way ' if ways > 1 else ''}{shots}-shot{marked}"


def title_of(config: EpisodeSettings, data: FoldData) -> str:
    """`episodes_title` of a command's episodes."""
    ways = config.ways if isinstance(config, EvaluateConfig) else 1
    return episodes_title(benchmark_name(data), data.fold, shots=config.shots, ways=ways, support=config.support)


def new_segmenter(
    backbone: Backbone, config: TrainConfig, similarity: SimilarityNetwork | None = None, *, base_classes: int = 0
) -> FewShotSegmenter:
    """The untrained model of a configuration, on the backbone's device; a given `similarity` stays as it is."""
    segmenter = build_segmenter(
        backbone,
        prior=config.prior,
        appearance=config.appearance,
        similarity_rank=config.similarity_rank,
        decoder_width=config.decoder_width,
        decoder_blocks=config.decoder_blocks,
        attention=config.attention,
        seed=config.seed,
        similarity=None if similarity is None else copy.deepcopy(similarity).requires_grad_(False),
        completion=set(config.supports) != {"mask"},
        base_classes=base_classes,
    )
    return segmenter.to(next(backbone.parameters()).device)


def train_configured(
    data: FoldData, config: TrainConfig, *, folder: Path | None, show_progress: bool = False
) -> TrainedFold:
    """`train_cross_fitted` or `train_fold` with the arguments of a configuration (which data to open is not read here).

    Raises:
        DataError: a similarity network of another backbone, or one that was trained on novel classes.
    """
    similarity = (
        None if config.similarity is None else _read_similarity(config.similarity, data, config.backbone_weights)
    )
    shared: dict[str, Any] = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "supports": config.supports,
        "augment": config.augment,
        "support_augment": config.support_augment,
        "workers": config.workers,
        "checkpoint_every": config.checkpoint_every,
        "resume": config.resume,
        "folder": folder,
        "show_progress": show_progress,
    }
    if config.cross_fits:
        return train_cross_fitted(
            lambda classes: new_segmenter(data.backbone, config, None, base_classes=classes),
            data,
            decoder_steps=config.decoder_steps,
            decoder_episodes=((1, config.decoder_episodes), (5, -(-config.decoder_episodes // 6))),
            **shared,
        )
    return train_fold(
        partial(new_segmenter, data.backbone, config, similarity),
        data,
        shots=config.shots,
        select_threshold=config.select_threshold,
        validation_episodes=config.validation_episodes,
        metric_weight=config.metric_weight,
        schedule=config.schedule,
        **shared,
    )


def _read_similarity(path: Path, data: FoldData, backbone_weights: str) -> SimilarityNetwork:
    loaded = load_similarity(path, backbone_weights=backbone_weights)
    if loaded.backbone.fingerprint != data.backbone.fingerprint:
        raise DataError(
            f"{path} was trained over {loaded.backbone.name} at strides {loaded.backbone.strides}, this run has "
            f"{data.backbone.name} at {data.backbone.strides}; choose the same --backbone, weights and --strides"
        )
    check_classes(str(path), loaded.notes, data)
    return loaded.similarity


def check_classes(name: str, notes: Mapping[str, Any], data: FoldData) -> None:
    """Raises DataError when a model, by the notes of its file, was trained on classes that a fold scores as novel.

    A model of several data sets notes under ``members`` the trained classes of each by the data set's own ids.
    """
    class_names, members = data.source.class_names, notes.get("members", {})
    if notes.get("source") != data.source.name and data.source.name not in members:
        return
    if data.source.name in members:
        seen = sorted(set(members[data.source.name]) & set(data.split.novel))
    elif data.fold is None and "base_class_names" in notes:  # folders of one's own may number their classes otherwise
        known = set(notes["base_class_names"])
        seen = [class_id for class_id in data.split.novel if class_names[class_id] in known]
    else:
        seen = sorted(set(notes.get("base_classes", [])) & set(data.split.novel))
    if seen:
        names = ", ".join(class_names[class_id] for class_id in seen)
        if data.fold is None:
            raise DataError(
                f"{name} was trained on {names}, to be scored here; name the classes that it has not seen with "
                "--novel-classes"
            )
        other = "" if notes.get("fold") is None else f"--fold {notes['fold']} or "
        raise DataError(
            f"{name} was trained on {names}, which fold {data.fold} scores as novel; "
            f"use {other}the model of fold {data.fold}"
        )


def known_by_name(notes: Mapping[str, Any], data: FoldData) -> list[str]:
    """Novel classes whose names a model of *other* data was trained on: told to the reader, as nothing forbids it."""
    if notes.get("source") == data.source.name:
        return []
    trained = {common_name(name) for name in notes.get("base_class_names", [])}
    names = (data.source.class_names[class_id] for class_id in data.split.novel)
    return [name for name in names if common_name(name) in trained]


def run_training(config: TrainConfig, *, device: torch.device, show_progress: bool = False) -> TrainedFold:
    """Train one fold into `config.out`: ``model.safetensors``, ``run.json``, logs and checkpoints.

    Raises:
        DataError: bad data; a folder with an earlier run (without `resume`) or with other settings (with it).
    """
    begun = (CHECKPOINT_NAME, f"selection/{CHECKPOINT_NAME}", f"group0/{CHECKPOINT_NAME}")
    on_first(lambda: check_folder(config, (MODEL_NAME, *begun)))
    backbone = build_backbone(config.backbone, strides=config.strides, weights=config.backbone_weights).to(device)
    accelerate(backbone, size=config.resolution or 400, precision=config.precision, compiled=config.compile)
    data = open_data(
        config,
        config,
        backbone,
        fold=config.fold,
        validation_fold=config.validation_fold,
        resolution=config.resolution,
        show_progress=show_progress,
    )
    data.check_base()
    if config.cross_fits:
        class_groups(data)
    held_out = list(data.choices.novel) if config.select_threshold else []  # before anything is written: all may raise
    record = run_record("train", config, data)
    record["data"]["held_out_classes"] = held_out
    on_first(lambda: check_data(config, record, (MODEL_NAME, *begun)))
    if current_ranks().first:
        write_json(config.out / RUN_NAME, record | {"results": None})
    trained = train_configured(data, config, folder=config.out, show_progress=show_progress)
    results = {
        "threshold": trained.segmenter.threshold,
        "held_out_miou": trained.held_out_miou,
        "steps": trained.result.steps,
        "seconds": trained.result.seconds,
    }
    if not current_ranks().first:
        return trained
    save_segmenter(
        config.out / MODEL_NAME,
        trained.segmenter,
        backbone_weights=config.backbone_weights,
        resolution=config.photo_size or data.resolution,
        notes={
            **record["data"],
            "trained_at": data.resolution,
            "source": data.source.name,
            "protocol": data.protocol.name,
            "fit": data.protocol.fit,
            "shots": config.shots,
        }
        | {"base_class_names": [data.source.class_names[class_id] for class_id in data.split.base]}
        | results,
    )
    write_json(config.out / RUN_NAME, record | {"results": results, "leak_guard": data.guard.record()})
    return trained


def check_folder(config: TrainConfig | SimilarityTrainConfig, names: Sequence[str]) -> None:
    """Raises DataError when `config.out` holds one of these files and the run neither resumes nor agrees with it."""
    kept = [name for name in names if (config.out / name).exists()]
    if not kept:
        return
    if not config.resume:
        raise DataError(
            f"{config.out} holds an earlier run ({kept[0]}); go on with it by --resume, or choose another --out"
        )
    record = read_json(config.out / RUN_NAME, what="record of the run")
    noted = record.get("configuration") if isinstance(record, dict) else None
    if not isinstance(noted, dict):
        raise DataError(f"cannot resume {config.out}: {RUN_NAME} does not say its settings; choose another --out")
    stored = config.defaults() | _BEFORE | noted  # a setting may be younger than the run
    now = config.as_json()
    changed = sorted(name for name in now.keys() - _MAY_DIFFER if stored.get(name) != now[name])
    if changed:
        differences = ", ".join(f"{name} was {stored.get(name)}, now {now[name]}" for name in changed)
        raise DataError(f"cannot resume {config.out}: {differences}; use the same settings or another --out")


def check_data(config: TrainConfig | SimilarityTrainConfig, record: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises DataError when a run is to go on with other training photos than it began with.

    No seed would give the weights that come of that again.

    Args:
        config: of the run.
        record: of the run as it would go on, by `run_record`.
        names: the files of which `config.out` holds one where there is something to go on with.
    """
    if not config.resume or not any((config.out / name).exists() for name in names):
        return
    stored = read_json(config.out / RUN_NAME, what="record of the run").get("data", {}).get("lists", {})
    if stored.get("training", now := record["data"]["lists"]["training"]) != now:
        raise DataError(
            f"cannot resume {config.out}: the training photos or their classes have changed since it began; restore "
            "them, or choose another --out"
        )


def run_record(verb: str, config: Config, data: FoldData) -> dict[str, Any]:
    """What a run folder's ``run.json`` says, but for the results."""
    protocol = dataclasses.asdict(data.protocol)
    return {
        "verb": verb,
        "configuration": config.as_json(),
        "protocol": protocol | {"listed": sorted(map(list, data.protocol.listed))},
        "data": {
            "name": benchmark_name(data),
            "fold": data.fold,
            "base_classes": list(data.split.base),
            "novel_classes": list(data.split.novel),
            "fingerprint": data.fingerprint,
            "precision": str(data.backbone.precision).removeprefix("torch."),
            "lists": {
                "training": fingerprint_pairs(data.training_pairs),
                "evaluation": fingerprint_pairs(data.evaluation_pairs),
            },
        },
        "environment": environment(),
    }


def of_episodes(config: EvaluateConfig, listed: EpisodeFile) -> EvaluateConfig:
    """The configuration with what a file of episodes brings: shots, ways, fold, protocol.

    Raises:
        DataError: another fold or protocol was asked for, or its protocol is one of somebody's own and none is given.
    """
    protocol = listed.protocol.removesuffix(" (synthetic)")
    if protocol not in PROTOCOL_NAMES and config.protocol is None and config.protocol_file is None:
        raise DataError(
            f"{config.episodes} is of protocol {protocol[:40]!r}, which has no rules here for size and scoring; give "
            "its --protocol-file, or another --protocol to score by"
        )
    changes: dict[str, Any] = {"shots": listed.shots, "ways": listed.ways}
    for name, brought in (("fold", listed.fold), ("protocol", protocol if protocol in PROTOCOL_NAMES else None)):
        given = getattr(config, name)
        if brought is not None and given not in (None, brought):
            raise DataError(f"{config.episodes} is of {name} {brought}, but --{name} is {given}; leave --{name} out")
        if brought is not None and (name == "fold" or config.protocol_file is None):
            changes[name] = brought
    return dataclasses.replace(config, episodes=None, **changes)


def check_novel(listed: EpisodeFile, data: FoldData) -> None:
    """Raises DataError when a file of episodes scores classes that are not novel in the fold."""
    seen = sorted({spec.class_id for spec in listed.specs} - set(data.split.novel))
    if seen:
        names = ", ".join(data.source.class_names[class_id] for class_id in seen[:10])
        raise DataError(
            f"the episodes show {names}, which are not among the novel classes of fold {data.fold}; "
            "use the --fold that the episodes were drawn for"
        )


def score_record(result: IoUResult, class_names: Mapping[int, str]) -> dict[str, Any]:
    """Scores in percent, [value, low, high] with the 95% interval, and per class by name; JSON-able."""
    return {
        "miou": [result.miou, result.miou_low, result.miou_high],
        "fb_iou": [result.fb_iou, result.fb_iou_low, result.fb_iou_high],
        "per_class": {class_names[class_id]: iou for class_id, iou in result.per_class.items()},
    }


def episode_records(evaluation: Evaluation | NWayEvaluation) -> list[dict[str, Any]]:
    """Every episode's spec, of several ways one after another, its foreground IoU in percent, and its finding if there
    is one; JSON-able.
    """
    findings: Sequence[Finding | None]
    if isinstance(evaluation, NWayEvaluation):
        specs = [spec for episode in evaluation.specs for spec in episode]
        scores, findings = evaluation.way_iou.ravel(), ()
    else:
        specs, scores, findings = list(evaluation.specs), evaluation.episode_iou, evaluation.findings
    found = [{} if one is None else {"finding": dataclasses.asdict(one)} for one in findings or [None] * len(specs)]
    return [
        dataclasses.asdict(spec) | {"support_ids": list(spec.support_ids), "iou": float(iou)} | finding
        for spec, iou, finding in zip(specs, scores, found, strict=True)
    ]


def write_evaluation(
    folder: Path,
    record: Mapping[str, Any],
    results: Mapping[str, Any],
    evaluation: Evaluation | NWayEvaluation,
    class_names: Mapping[int, str],
) -> None:
    """``evaluation.json``, with every episode, and ``run.json`` of a run: what a report is made from.

    Args:
        folder: of the run.
        record: of `run_record`.
        results: scores and how they were reached; both files hold them.
        evaluation: its episodes.
        class_names: of all classes of the data.
    """
    names = {str(class_id): name for class_id, name in class_names.items()}
    write_json(folder / EVALUATION_NAME, {**results, "class_names": names, "episodes": episode_records(evaluation)})
    write_json(folder / RUN_NAME, {**record, "results": results})
