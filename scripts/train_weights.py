"""Train the weights that come with the package, and write them with their model cards and manifest.

    python scripts/train_weights.py --voc ../shared/data/VOCdevkit/VOC2012 --coco ../shared/data/coco

One run folder a model under --runs; interrupted runs go on where they stopped, finished parts are kept. The models
`pascal-fold0` to `pascal-fold3` are scored on their novel classes. The model `general` has seen every class at hand:
what it does for classes it has not seen is estimated by training it again with part of the classes left out (--check).
The recipes are the dictionaries in this file and in general_model.py.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import general_model
from model_cards import Facts, write_card
from weight_runs import SHOTS, Recipe, Record, kept_scores, open_backbone, score_record, train_model

from episodes.protocols import get_protocol
from episodes.sources import VocSource
from fewshot_seg.backbones import Backbone
from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.config import default_cache
from fewshot_seg.evaluation import evaluate
from fewshot_seg.fold_data import FoldData, at_resolution, evaluation_episodes, open_fold
from fewshot_seg.runs import MODEL_NAME, benchmark_name
from fewshot_seg.runtime import atomic_path, git_commit
from fewshot_seg.shipped import GENERAL, ShippedModel, file_digest, shipped_models, weights_folder, write_manifest

MODEL: dict[str, Any] = {}
"""Arguments of `build_segmenter`."""
TRAINING: dict[str, Any] = {
    "steps": 160,
    "batch_size": 8,
    "seed": 0,
    "decoder_steps": 800,
    "decoder_episodes": ((1, 500), (5, 80)),
}
"""Arguments of `train_cross_fitted`."""
RESOLUTION: int | None = None
"""Side of the square in training; None is the protocol's."""
PHOTO_SIZE = 560
"""Side of the square that shipped models fit photos into: larger than in training, chosen on base classes by
scripts/reproduce_sizes.py (docs/method.md)."""
PASCAL_NAMES = tuple(f"pascal-fold{fold}" for fold in range(4))
NAMES = (*PASCAL_NAMES, GENERAL)


def pascal_data(voc: Path, fold: int, backbone: Backbone, cache: Path) -> FoldData:
    """A fold of PASCAL-5i by protocol hsnet."""
    protocol = get_protocol("hsnet", "pascal")
    source = VocSource(voc)
    return open_fold(
        source, backbone, protocol, fold=fold, resolution=RESOLUTION, cache=cache, byte_budget=general_model.BYTES
    )


def score_pascal(model: Path, data: FoldData, count: int | None) -> list[Record]:
    """Scores of a model file on the novel classes of its fold."""
    segmenter, records = load_segmenter(model).segmenter, []
    for shots in SHOTS:
        drawn = evaluation_episodes(data, shots=shots, count=count, show_progress=True)
        size = data.protocol.scoring_size
        found = evaluate(segmenter, drawn, scoring_size=size, source=data.source, show_progress=True)
        names = {class_id: data.source.class_names[class_id] for class_id in data.split.novel}
        records.append(score_record(found.result, benchmark_name(data), data, shots, "mask", names))
    return records


def ship(folder: Path, out: Path, facts: Facts) -> None:
    """Copy a trained model to the folder of weights, write its card, and enter it in the manifest."""
    target = out / f"{facts.name}.safetensors"
    with atomic_path(target) as temporary:
        shutil.copyfile(folder / MODEL_NAME, temporary)
    loaded = load_segmenter(target)
    entry = ShippedModel(
        name=facts.name,
        sha256=file_digest(target),
        bytes=target.stat().st_size,
        backbone=loaded.segmenter.backbone.name,
        summary=facts.summary,
        data=facts.data,
        protocol=str(loaded.notes["protocol"]),
        fold=loaded.notes["fold"],
        resolution=loaded.resolution,
        parameters=facts.record["results"]["parameters"],
        commit=facts.record["environment"]["commit"],
        command=facts.command,
        licence=facts.licence,
        scores=facts.scores,
    )
    write_card(out / entry.card, entry, facts)
    others = [model for model in shipped_models(out) if model.name != entry.name]
    write_manifest(out, sorted([*others, entry], key=lambda model: (model.name == GENERAL, model.name)))
    print(f"{entry.name}: {entry.bytes / 1e6:.2f} MB, {entry.headline}: {target}", flush=True)


def make_pascal(fold: int, arguments: argparse.Namespace, backbone: Backbone) -> None:
    """Train, score and ship the model of a fold."""
    name = PASCAL_NAMES[fold]
    folder = arguments.runs / name
    recipe = Recipe(model=MODEL, training=TRAINING).with_steps(arguments.steps)
    data = pascal_data(arguments.voc, fold, backbone, arguments.cache)
    record = train_model(recipe, data, folder, {}, PHOTO_SIZE)
    scored = at_resolution(data, PHOTO_SIZE, cache=arguments.cache, byte_budget=general_model.BYTES)
    scores = kept_scores(
        folder / f"scores-{PHOTO_SIZE}-{arguments.episodes or 'all'}.json",
        partial(score_pascal, folder / MODEL_NAME, scored, arguments.episodes),
    )
    novel = [data.source.class_names[class_id] for class_id in data.split.novel]
    photos = {"voc": len(data.training_index.image_ids)}
    command = _command(arguments, name)
    facts = Facts(name=name, photos=photos, novel=novel, command=command, record=record, scores=scores)
    ship(folder, arguments.out, facts)


def make_general(arguments: argparse.Namespace, backbone: Backbone) -> None:
    """Train, check and ship the general model."""
    folder = arguments.runs / GENERAL
    recipe = Recipe(model=general_model.MODEL, training=general_model.TRAINING).with_steps(arguments.steps)
    source = general_model.joint_source(arguments.voc, arguments.coco, composites=arguments.composites)
    data = general_model.general_data(source, backbone, arguments.cache)
    members = general_model.members_seen(source, data.split.base)
    record = train_model(recipe, data, folder, {"members": members}, PHOTO_SIZE)
    checked = recipe.with_steps(arguments.check_steps)
    steps = checked.training["steps"]
    check = partial(
        general_model.check_general,
        source,
        backbone,
        checked,
        arguments.cache,
        folder,
        range(arguments.check),
        arguments.check_size or PHOTO_SIZE,
    )
    kept = folder / f"scores-{arguments.check_size or PHOTO_SIZE}-{arguments.check}x{steps}.json"
    scores = kept_scores(kept, check) if arguments.check else []
    ids = data.training_index.image_ids
    photos = {member: sum(one.startswith(f"{member}/") for one in ids) for member in source.sources}
    facts = Facts(
        name=GENERAL, photos=photos, novel=[], command=_command(arguments, GENERAL), record=record, scores=scores
    )
    ship(folder, arguments.out, facts)


def _command(arguments: argparse.Namespace, name: str) -> str:
    """The command that makes this model alone, without what does not change it."""
    given = {"--voc": arguments.voc, "--only": name}
    given |= {"--coco": arguments.coco} if name == GENERAL else {}
    more = {"--steps": arguments.steps}
    if name == GENERAL:
        more |= {"--composites": arguments.composites or None, "--check-steps": arguments.check_steps}
        more |= {"--check": arguments.check, "--check-size": arguments.check_size}
    words = [word for flag, value in (given | more).items() if value is not None for word in (flag, str(value))]
    return "python scripts/train_weights.py " + shlex.join(words)


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--coco", type=Path, help="folder of annotations/ and photos; for the general model")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, default=weights_folder(), help="default: the package's own folder")
    parser.add_argument("--runs", type=Path, default=Path("runs/weights"), help="run folders and finished scores")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=int, help="instead of those of the recipes")
    parser.add_argument("--episodes", type=int, help="of the scores on PASCAL-5i, instead of the protocol's")
    parser.add_argument("--composites", type=int, default=0, help="composed photos to train the general model on")
    parser.add_argument(
        "--check", type=int, default=1, choices=range(general_model.PARTS + 1), help="parts of classes to leave out"
    )
    parser.add_argument("--check-size", type=int, help="of a check's photos, instead of what the models ask for")
    parser.add_argument("--check-steps", type=int, help="of a check's training, instead of the model's")
    arguments = parser.parse_args(given)
    if GENERAL in arguments.only and arguments.coco is None:
        parser.error("the general model needs --coco; or name the models to train with --only")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Make the models that are asked for, one after another."""
    arguments = parse_arguments(given)
    if (git_commit() or "").endswith("-dirty"):
        print("the checkout has changes: the cards will name a commit with -dirty", flush=True)
    backbone = open_backbone(arguments.device)
    for fold, name in enumerate(PASCAL_NAMES):
        if name in arguments.only:
            make_pascal(fold, arguments, backbone)
    if GENERAL in arguments.only:
        make_general(arguments, backbone)


if __name__ == "__main__":
    main()
