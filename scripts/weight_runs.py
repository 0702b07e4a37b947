"""One run folder a model: what `train_weights.py` trains and scores, kept so that it can go on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from episodes.types import DataError, SupportKind
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.checkpoint import save_segmenter
from fewshot_seg.cross_fitted_fold import train_cross_fitted
from fewshot_seg.experiment import TrainedFold
from fewshot_seg.fold_data import FoldData
from fewshot_seg.metrics import IoUResult
from fewshot_seg.runs import MODEL_NAME, RUN_NAME
from fewshot_seg.runtime import environment, pick_device, read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter

BACKBONE: dict[str, Any] = {"name": "efficientnet_lite012", "weights": "embedded"}
"""Arguments of `build_backbone`."""
SHOTS = (1, 5)
"""Supports with masks that a model is scored with."""

Record = dict[str, Any]


def open_backbone(device: str) -> Backbone:
    """The frozen encoder of all shipped models."""
    return build_backbone(**BACKBONE).to(pick_device(device))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a model is made with: arguments of `build_segmenter` and of `train_cross_fitted`."""

    model: Mapping[str, Any]
    training: Mapping[str, Any]

    def with_steps(self, steps: int | None) -> Recipe:
        """The same with another number of steps."""
        return self if steps is None else dataclasses.replace(self, training={**self.training, "steps": steps})

    def as_json(self) -> Record:
        """As JSON has it."""
        plain: Record = json.loads(json.dumps({"backbone": BACKBONE, "model": self.model, "training": self.training}))
        return plain


def train_recipe(recipe: Recipe, data: FoldData, folder: Path) -> TrainedFold:
    """`train_cross_fitted` with a recipe, into a folder; an interrupted run goes on."""
    device = next(data.backbone.parameters()).device

    def build(classes: int) -> FewShotSegmenter:
        return build_segmenter(data.backbone, base_classes=classes, **recipe.model).to(device)

    return train_cross_fitted(build, data, folder=folder, resume=True, show_progress=True, **recipe.training)


def train_model(recipe: Recipe, data: FoldData, folder: Path, notes: Mapping[str, Any], photo_size: int) -> Record:
    """Train into a run folder unless that is done; its record. `photo_size` is what the model asks for when it is used.

    Raises:
        DataError: the folder holds a run of another recipe or other data.
    """
    asked = recipe.as_json() | {"data": data.fingerprint, "base_classes": list(data.split.base)}
    kept = read_json(folder / RUN_NAME, what="record of the run") if (folder / RUN_NAME).exists() else None
    if kept is not None:
        if kept["recipe"] != asked:
            raise DataError(f"{folder} holds a run of another recipe or other data; delete it or choose another --runs")
        if kept["results"] is not None and (folder / MODEL_NAME).exists():
            return dict(kept)
    record: Record = {"recipe": asked, "environment": environment(), "results": None}
    write_json(folder / RUN_NAME, record)
    trained = train_recipe(recipe, data, folder)
    results = {
        "threshold": trained.segmenter.threshold,
        "held_out_miou": trained.held_out_miou,
        "trained_at": data.resolution,
        "steps": trained.result.steps,
        "seconds": trained.result.seconds,
        "parameters": sum(parameter.numel() for parameter in trained.segmenter.trainable_parameters()),
    }
    common = {
        "source": data.source.name,
        "protocol": data.protocol.name,
        "fold": data.fold,
        "fit": data.protocol.fit,
        "shots": sorted({shots for shots, _ in recipe.training["decoder_episodes"]}),
        "base_classes": list(data.split.base),
        "base_class_names": [data.source.class_names[class_id] for class_id in data.split.base],
        "fingerprint": data.fingerprint,
    }
    save_segmenter(
        folder / MODEL_NAME,
        trained.segmenter,
        backbone_weights=str(BACKBONE["weights"]),
        resolution=photo_size,
        notes={**common, **notes, **results},
    )
    write_json(folder / RUN_NAME, record | {"results": results})
    return record | {"results": results}


def score_record(
    result: IoUResult, name: str, data: FoldData, shots: int, kind: SupportKind, names: Mapping[int, str]
) -> Record:
    return {
        "task": "segmentation",
        "data": name,
        "protocol": data.protocol.name,
        "fold": data.fold,
        "shots": shots,
        "support": kind,
        "metric": "mIoU",
        "value": result.miou,
        "low": result.miou_low,
        "high": result.miou_high,
        "fb_iou": result.fb_iou,
        "episodes": result.episodes,
        "per_class": {names[class_id]: iou for class_id, iou in result.per_class.items()},
    }


def kept_scores(path: Path, compute: Callable[[], list[Record]]) -> list[Record]:
    """Scores from a file, or computed and kept there."""
    if not path.exists():
        write_json(path, compute())
    return list(read_json(path, what="scores"))
