"""Rivals, each written from its paper, against ours: the same features, training episodes, budget and test episodes.

    python scripts/reproduce_rivals.py --root ../shared/data/VOCdevkit/VOC2012 \\
        --ours 'runs/weights/pascal-fold{fold}/model.safetensors' --record

Trains every rival on every fold of PASCAL-5i (protocol hsnet), one after the other, scores it at the threshold chosen
on held-out base classes and at its own (0), and measures its seconds beside ours. Interrupted runs go on where they
stopped: finished cells are kept under --out. --record writes docs/results.json and docs/results.md; folds may be
recorded one after another, means are taken when all four are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from render_results import Record, fold_means, merge_records, provenance, render

from episodes.episode_files import fingerprint_episodes
from episodes.protocols import get_protocol
from episodes.sources import VocSource
from episodes.types import DataError
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.config import default_cache
from fewshot_seg.episode_logits import ShotLogits, shot_logits
from fewshot_seg.evaluation import Evaluation, evaluate, evaluate_logits
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.fold_data import FoldData, evaluation_episodes, open_fold
from fewshot_seg.guided_upsampling import PIXELS_PER_CELL, guided_margins
from fewshot_seg.rivals.experiment import RIVALS, TITLES, train_rival_fold, trainable_parameters
from fewshot_seg.rivals.model import HEAD, EpisodeModel, rival_logits
from fewshot_seg.runs import benchmark_name
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.shipped import file_digest

OURS = "ours"
AT_ZERO = "mIoU at threshold 0"
GUIDED = "mIoU with guided upsampling"
PARAMETERS = "trainable parameters"
SECONDS = "seconds of an episode, ours = 1"
_FOLDS = (0, 1, 2, 3)
_TIMED_EPISODES, _ROUNDS = 12, 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Every fold, then the records."""
    given = _parse(arguments)
    records = [record for fold in given.folds for record in _fold(fold, given)]
    records += fold_means(_of_all_folds([*_recorded(given), *records]))
    for record in records:
        print(f"fold {record['fold']} {record['shots']}-shot {record['method']}: ", end="")
        print(f"{record['metric']} {record['value']:.4g}")
    if given.record:
        merge_records(given.results, records, replace_tasks=("rivals",) if set(given.folds) == set(_FOLDS) else ())
        render(given.results, given.results.with_suffix(".md"))


def _recorded(given: argparse.Namespace) -> list[Record]:
    """Records of the other folds, which earlier runs may have written."""
    if not given.record or not given.results.exists():
        return []
    kept = read_json(given.results, what="results")
    others = set(_FOLDS) - set(given.folds)
    return [record for record in kept if record["task"] == "rivals" and record["fold"] in others]


def _of_all_folds(records: Sequence[Record]) -> list[Record]:
    """Those of methods and metrics that every fold has, by as many episodes: what a mean may be taken of.

    Methods' seconds are compared with those of ours in the same run, so that they have a mean, too.
    """
    folds: dict[tuple[Any, ...], set[int]] = {}
    for record in records:
        folds.setdefault(_of_mean(record), set()).add(record["fold"])
    return [record for record in records if folds[_of_mean(record)] == set(_FOLDS)]


def _of_mean(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("data", "shots", "method", "metric", "episodes"))


def _fold(fold: int, given: argparse.Namespace) -> list[Record]:
    ours = load_segmenter(Path(given.ours.format(fold=fold))).segmenter if given.ours else None
    if given.backbone is not None:
        backbone = build_backbone(given.backbone, weights=given.backbone_weights)
    else:  # the features that ours reads
        backbone = build_backbone() if ours is None else ours.backbone
    data = _open(given, backbone, fold)
    cells: dict[str, Callable[[], list[Record]]] = {}
    if ours is not None:
        cells[OURS] = partial(_score_ours, ours, _open(given, ours.backbone, fold), given)
    cells |= {name: partial(_score_rival, name, data, given, _cell_folder(given, fold)) for name in given.methods}
    if ours is not None:
        cells["seconds"] = partial(_seconds, ours, _open(given, ours.backbone, fold), data, given)
    records = [record for name, compute in cells.items() for record in _kept(name, compute, data, given)]
    common = {
        "task": "rivals",
        "data": benchmark_name(data),
        "protocol": data.protocol.name,
        "fold": fold,
        "support": "mask",
        "seeds": [data.protocol.seed],
        **provenance(),
    }
    return [common | record for record in records]


def _open(given: argparse.Namespace, backbone: Backbone, fold: int) -> FoldData:
    protocol = get_protocol("hsnet", "pascal")
    return open_fold(
        VocSource(given.root), backbone, protocol, fold=fold, resolution=given.resolution, cache=given.cache
    )


def _cell_folder(given: argparse.Namespace, fold: int | None) -> Path:
    return Path(given.out) / f"fold{fold}"


def _kept(name: str, compute: Callable[[], list[Record]], data: FoldData, given: argparse.Namespace) -> list[Record]:
    """A finished cell, computed unless it is kept.

    Raises:
        DataError: what is kept was computed with other settings.
    """
    settings: dict[str, Any] = {"backbone": data.backbone.fingerprint, "side": data.resolution}
    settings |= {"shots": given.shots, "episodes": given.episodes}
    if name in (OURS, "seconds"):
        settings["ours"] = file_digest(Path(given.ours.format(fold=data.fold)))
    if name == "seconds":
        settings["methods"] = given.methods
    elif name != OURS:
        settings |= {"steps": given.steps, "batch_size": given.batch_size, "validation": given.validation_episodes}
    path = _cell_folder(given, data.fold) / f"{name}.json"
    if not path.exists():
        write_json(path, {"settings": settings, "records": compute()})
        print(f"fold {data.fold}: {name} done", flush=True)
    kept = read_json(path, what="finished cell")
    if kept["settings"] != settings:
        raise DataError(f"{path} was computed with {kept['settings']}, now {settings}; choose another --out")
    records: list[Record] = kept["records"]
    return records


def _score_ours(segmenter: FewShotSegmenter, data: FoldData, given: argparse.Namespace) -> list[Record]:
    records = [_count(OURS, segmenter.trainable_parameters())]
    for shots in given.shots:
        drawn = evaluation_episodes(data, shots=shots, count=given.episodes, show_progress=True)
        size = data.protocol.scoring_size
        scored = evaluate(segmenter.eval(), drawn, scoring_size=size, source=data.source, show_progress=True)
        records.append(_record(OURS, shots, "mIoU", scored))
    return records


def _score_rival(name: str, data: FoldData, given: argparse.Namespace, folder: Path) -> list[Record]:
    trained = train_rival_fold(
        lambda: RIVALS[name](data),
        data,
        steps=given.steps,
        batch_size=given.batch_size,
        validation_episodes=given.validation_episodes,
        folder=folder / name,
        resume=True,
        show_progress=True,
    )
    records = [_count(TITLES[name], trainable_parameters(trained.model))]
    for shots in given.shots:
        drawn = evaluation_episodes(data, shots=shots, count=given.episodes, show_progress=True)
        scored = evaluate_logits(
            partial(_plain_and_guided, trained.model, trained.threshold),
            {"mIoU": (HEAD, trained.threshold), GUIDED: (GUIDED, trained.threshold), AT_ZERO: (HEAD, 0.0)},
            drawn,
            scoring_size=data.protocol.scoring_size,
            source=data.source,
            show_progress=True,
        )
        records += [_record(TITLES[name], shots, metric, one) for metric, one in scored.items()]
    return records


def _plain_and_guided(model: EpisodeModel, threshold: float, batch: FeatureBatch, size: tuple[int, int]) -> ShotLogits:
    """A rival's logits, and the same led by the photo's edges as ours are: what that step alone is worth to it."""
    found = rival_logits(model, batch, size)
    assert batch.query_photos is not None
    photos, maps = batch.query_photos(size[0]), found.heads[HEAD]
    height, width = batch.query_levels[0].shape[2:]
    working = (height * PIXELS_PER_CELL, width * PIXELS_PER_CELL)
    led = [guided_margins(maps[:, k] - threshold, photos, working) + threshold for k in range(maps.shape[1])]
    return dataclasses.replace(found, heads={**found.heads, GUIDED: torch.stack(led, dim=1)})


def _record(method: str, shots: int, metric: str, evaluation: Evaluation) -> Record:
    result = evaluation.result
    return {
        "shots": shots,
        "method": method,
        "metric": metric,
        "value": result.miou,
        "low": result.miou_low,
        "high": result.miou_high,
        "episodes": result.episodes,
        "episodes_fingerprint": fingerprint_episodes(evaluation.specs),
    }


def _count(method: str, parameters: Sequence[torch.nn.Parameter]) -> Record:
    value = sum(parameter.numel() for parameter in parameters)
    return {"shots": 1, "method": method, "metric": PARAMETERS, "value": value, "episodes": 0}


def _seconds(ours: FewShotSegmenter, ours_data: FoldData, data: FoldData, given: argparse.Namespace) -> list[Record]:
    """Seconds of an episode from features in memory to logits at the scored size, support and query both encoded anew.

    One episode at a time; all methods take turns on each, and medians are compared. Weights do not matter here.
    """
    models = {TITLES[name]: RIVALS[name](data).eval() for name in given.methods}
    records = []
    for shots in given.shots:
        size = (data.protocol.scoring_size or data.resolution,) * 2
        calls: dict[str, Callable[[int], object]] = {OURS: _timed_ours(ours, ours_data, shots, size)}
        calls |= {name: _timed_rival(model, data, shots, size) for name, model in models.items()}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(_TIMED_EPISODES * (_ROUNDS + 1)):
            for name, call in calls.items():
                began = time.perf_counter()
                call(number % _TIMED_EPISODES)
                if number >= _TIMED_EPISODES:  # the first round warms up
                    taken[name].append(time.perf_counter() - began)
        base = statistics.median(taken[OURS])
        records += [
            {"shots": shots, "method": name, "metric": SECONDS, "value": statistics.median(each) / base}
            | {"episodes": _TIMED_EPISODES}
            for name, each in taken.items()
        ]
    return records


def _timed_ours(
    segmenter: FewShotSegmenter, data: FoldData, shots: int, size: tuple[int, int]
) -> Callable[[int], object]:
    batches, decoders = list(_in_memory(data, shots)), {OURS: segmenter.eval().decoder}
    return lambda number: shot_logits(segmenter, decoders, batches[number], size)


def _timed_rival(model: EpisodeModel, data: FoldData, shots: int, size: tuple[int, int]) -> Callable[[int], object]:
    batches = list(_in_memory(data, shots))
    return lambda number: rival_logits(model, batches[number], size)


def _in_memory(data: FoldData, shots: int) -> Iterator[FeatureBatch]:
    for batch in evaluation_episodes(data, shots=shots, count=_TIMED_EPISODES).batches(1):
        _ = batch.query_levels[0], batch.support_levels[0]  # read now, not when timed
        yield batch


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--ours", help="trained model of each fold, '{fold}' standing for its number")
    parser.add_argument("--backbone", help="of the rivals; that of ours by default")
    parser.add_argument("--backbone-weights", default="embedded", help="of --backbone: embedded, random or a file")
    parser.add_argument("--methods", nargs="+", choices=tuple(RIVALS), default=list(RIVALS))
    parser.add_argument("--folds", nargs="+", type=int, choices=_FOLDS, default=list(_FOLDS))
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--episodes", type=int, help="test episodes a fold; the protocol's 1000 by default")
    parser.add_argument("--validation-episodes", type=int, default=200, help="that the threshold is chosen on")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--resolution", type=int, help="side of the square; the protocol's by default")
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"), help="checkpoints and finished cells")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--record", action="store_true", help="write --results and the page beside it")
    given = parser.parse_args(arguments)
    if given.record and given.ours is None:
        parser.error("--record needs --ours, whose scores the others are compared with")
    return given


if __name__ == "__main__":
    main()
