"""The general model for people's own photos: its data, and what it does for classes that it has not seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weight_runs import SHOTS, Recipe, Record, score_record, train_recipe

from episodes.fold_lists import draw
from episodes.folds import ClassSplit
from episodes.index import build_index
from episodes.protocols import EpisodeProtocol, custom_protocol, list_pairs
from episodes.sources import CocoSource, CompositeSource, JointSource, SyntheticSource, VocSource
from episodes.types import MaskSource, SupportKind
from fewshot_seg.backbones import Backbone
from fewshot_seg.evaluation import evaluate
from fewshot_seg.fold_data import FoldData, at_resolution, open_fold, stored_episodes
from fewshot_seg.metrics import IoUResult, mean_result
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.shipped import GENERAL

MODEL: dict[str, Any] = {"completion": True}
"""Arguments of `build_segmenter`."""
TRAINING: dict[str, Any] = {
    "steps": 160,
    "batch_size": 8,
    "seed": 0,
    "supports": ("mask", "box", "scribble", "point", "label"),
    "decoder_steps": 1000,
    "decoder_episodes": ((1, 500), (5, 60)),
    "known_episodes": ((1, 1000), (5, 120)),
}
"""Arguments of `train_cross_fitted`."""
PROTOCOL: dict[str, Any] = {"resolution": 400, "scoring_size": 400, "min_area": 1024}
"""Fields of `custom_protocol`. Objects of fewer pixels than `min_area` are neither shown nor asked for."""
BYTES = 12 * 2**30
"""Of features, which are kept at both sizes."""
CHECK_EPISODES = 300
PARTS = 4
"""Classes are dealt to so many parts; a check leaves one of them out."""


def joint_source(voc: Path, coco: Path, *, composites: int = 0) -> JointSource:
    """VOC, COCO and generated pictures; and `composites` photos composed of VOC's objects, for training alone."""
    source = VocSource(voc)
    more: tuple[MaskSource, ...] = ()
    if composites:
        index = build_index(source, source.default_splits[0])
        pairs = list_pairs(general_protocol("train"), index, index.class_ids)
        more = (CompositeSource(source, tuple(pairs), index.image_ids, composites),)
    return JointSource((source, CocoSource(coco), SyntheticSource()), more)


def general_protocol(training_split: str) -> EpisodeProtocol:
    """Rules of the general model's episodes. Whatever is not asked for is background, as in PASCAL-5i."""
    return custom_protocol(name=GENERAL, training_split=training_split, novel_in_training="background", **PROTOCOL)


def general_data(source: JointSource, backbone: Backbone, cache: Path, *, left_out: int | None = None) -> FoldData:
    """The general model's data: everything at hand but the generated pictures' novel classes, which stay unseen.

    With `left_out`, a check: that part of the classes of the photos is novel too, and photos for evaluation do not
    train. Either way the next part of the classes is the first group of the cross-fitting.
    """
    generated = source.sources["synthetic"]
    assert isinstance(generated, SyntheticSource)
    own = source.own_classes(generated.name)
    novel = [class_id for class_id, its_own in own.items() if its_own in generated.novel_class_ids]
    if left_out is not None:
        novel += [class_id for class_id in source.class_names if class_id % PARTS == left_out and class_id not in own]
    data = open_fold(
        source,
        backbone,
        general_protocol("all" if left_out is None else "train"),
        fold=0,
        novel_classes=[source.class_names[class_id] for class_id in novel],
        cache=cache,
        byte_budget=BYTES,
        show_progress=True,
    )
    part = 0 if left_out is None else (left_out + 1) % PARTS
    held_out = tuple(class_id for class_id in data.split.base if class_id % PARTS == part)
    kept = tuple(class_id for class_id in data.split.base if class_id not in held_out)
    return dataclasses.replace(data, held_out=ClassSplit(base=kept, novel=held_out))


def members_seen(source: JointSource, base: Sequence[int]) -> dict[str, list[int]]:
    """By data set, the trained classes under its own ids: what `fewshot_seg.runs.check_classes` reads."""
    return {
        member: [own for class_id, own in source.own_classes(member).items() if class_id in set(base)]
        for member in source.sources
    }


def check_general(
    source: JointSource,
    backbone: Backbone,
    recipe: Recipe,
    cache: Path,
    folder: Path,
    parts: Sequence[int],
    photo_size: int,
) -> list[Record]:
    """Scores on classes that were left out of the training, on each data set's photos for evaluation.

    One training a part. A score over several parts is their mean. Photos are scored at `photo_size`.
    """
    found: dict[tuple[str, int, SupportKind], list[IoUResult]] = {}
    for part in parts:
        data = general_data(source, backbone, cache, left_out=part)
        segmenter = train_recipe(recipe, data, folder / f"check{part}").segmenter
        data = at_resolution(data, photo_size, cache=cache, byte_budget=BYTES)
        for member in (one.name for one in source.members):
            for shots, kind in _asked(recipe):
                result = _score_member(segmenter, data, member, shots, kind)
                found.setdefault((member, shots, kind), []).append(result)
    names, at = source.class_names, f", photos at {photo_size}"
    return [
        score_record(mean_result(results), f"{member}, classes left out{at}", data, shots, kind, names)
        for (member, shots, kind), results in found.items()
    ]


def _asked(recipe: Recipe) -> list[tuple[int, SupportKind]]:
    """(shots, kind of support) that a check scores."""
    weak = [kind for kind in recipe.training.get("supports", ("mask",)) if kind != "mask"]
    return [*((shots, "mask") for shots in SHOTS), *((1, kind) for kind in weak)]


def _score_member(segmenter: FewShotSegmenter, data: FoldData, member: str, shots: int, kind: SupportKind) -> IoUResult:
    index = data.evaluation_index
    pairs = [pair for pair in data.evaluation_pairs if pair[0].startswith(f"{member}/")]
    specs = draw(data, index, pairs, shots=shots, count=CHECK_EPISODES, seed=0, order="random")
    drawn = stored_episodes(data, specs, support=kind, show_progress=True)
    size = data.protocol.scoring_size
    return evaluate(segmenter.eval(), drawn, scoring_size=size, source=data.source, show_progress=True).result
