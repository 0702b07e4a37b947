"""How large should photos be? The shipped models of PASCAL-5i at several sizes, and their scores at the chosen one.

    python scripts/reproduce_sizes.py --root ../shared/data/VOCdevkit/VOC2012

First every model segments base classes in photos of the training split, fitted into squares of each of --sizes: what
the choice of `train_weights.PHOTO_SIZE` was made on. Then it is scored on its novel classes, 1- and 5-shot, at
--score-at: the size that it was trained at, and the chosen one. Masks are compared at the protocol's size every time.
Scores that scripts/train_weights.py computed when it shipped a model are taken from the manifest; --again computes them
anew. Interrupted runs go on where they stopped. With all four folds, docs/results.json and docs/results.md are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fold_benchmark import records_of
from render_results import Record, fold_means, merge_records, provenance, render
from train_weights import PASCAL_NAMES, PHOTO_SIZE

from episodes.protocols import get_protocol
from episodes.sources import VocSource
from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.config import default_cache
from fewshot_seg.evaluation import evaluate
from fewshot_seg.fold_data import FoldData, evaluation_episodes, group_episodes, open_fold
from fewshot_seg.runs import benchmark_name
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.shipped import file_digest, shipped_models, weights_folder

OURS = "ours, cross-fitted"
CHOICE = "selection of the size"
"""Task of the records that the choice was made on."""
_SEED = 5
"""Of the base classes' episodes: not those of the training, whose seeds are 0 and 1."""


def method_at(size: int, protocol_size: int) -> str:
    """Title of the models at a size."""
    return OURS if size == protocol_size else f"{OURS}, photos at {size}"


def main(given: Sequence[str] | None = None) -> None:
    """Every fold, then the records."""
    arguments = _parse(given)
    records = [record for fold in arguments.folds for record in _fold(fold, arguments)]
    if sorted(arguments.folds) == list(range(4)):
        records += fold_means(records)
        merge_records(arguments.results, records, replace_tasks=[CHOICE] if arguments.sizes else [])
        render(arguments.results, arguments.results.with_suffix(".md"))
    for record in records:
        if record["metric"] == "mIoU":
            print(f"fold {record['fold']}, {record['task']}, {record['shots']}-shot, {record['method']}: ", end="")
            print(f"{record['value']:.1f} [{record['low']:.1f}, {record['high']:.1f}]")


def _fold(fold: int, arguments: argparse.Namespace) -> list[Record]:
    model = arguments.weights / f"{PASCAL_NAMES[fold]}.safetensors"
    segmenter = load_segmenter(model).segmenter
    records: list[Record] = []
    for size in dict.fromkeys([*arguments.sizes, *arguments.score_at]):
        data = open_fold(
            VocSource(arguments.root),
            segmenter.backbone,
            get_protocol("hsnet", "pascal"),
            fold=fold,
            resolution=size,
            cache=arguments.cache,
            byte_budget=int(arguments.cache_gigabytes * 2**30),
        )
        for shots in (0, *arguments.shots):
            if size in (arguments.score_at if shots else arguments.sizes):
                records += _cell(segmenter, data, model, shots, arguments)
    return [record | provenance() for record in records]


def _cell(
    segmenter: FewShotSegmenter, data: FoldData, model: Path, shots: int, arguments: argparse.Namespace
) -> list[Record]:
    """Records of one size: of novel classes, or with `shots` 0 of base classes, 1-shot."""
    count = arguments.episodes if shots else arguments.base_episodes
    if shots and not arguments.again and (shipped := _shipped_records(model, data, shots, count)):
        return shipped
    kept = arguments.out / f"fold{data.fold}" / f"{data.resolution}, {shots or 'base'}-shot, {count or 'all'}.json"
    digest = file_digest(model)
    if kept.exists() and read_json(kept, what="finished cell")["model"] == digest:
        return list(read_json(kept, what="finished cell")["records"])
    if shots:
        drawn = evaluation_episodes(data, shots=shots, count=count, show_progress=True)
    else:
        base = data.split.base
        drawn = group_episodes(data, base, shots=1, count=count, seed=_SEED, show_progress=True)
    scoring_size = data.protocol.scoring_size
    found = evaluate(segmenter, drawn, scoring_size=scoring_size, source=data.source, show_progress=True)
    common: dict[str, Any] = {
        "data": benchmark_name(data),
        "protocol": data.protocol.name,
        "fold": data.fold,
        "support": "mask",
        "seeds": [data.protocol.seed if shots else _SEED],
    }
    method = method_at(data.resolution, data.protocol.resolution)
    records = [common | record for record in records_of(method, shots or 1, found, data)]
    if not shots:
        chosen = {"task": CHOICE, "method": f"photos at {data.resolution}"}
        records = [record | chosen for record in records if record["metric"] == "mIoU"]
    write_json(kept, {"model": digest, "records": records})
    return records


def _shipped_records(model: Path, data: FoldData, shots: int, count: int | None) -> list[Record]:
    """Records of a shipped file's scores over these episodes; none where the manifest beside it has no such score."""
    asked = {"data": benchmark_name(data), "protocol": data.protocol.name, "fold": data.fold, "shots": shots}
    asked |= {"support": "mask", "metric": "mIoU", "episodes": count or data.protocol.episodes}
    digest = file_digest(model)
    same = (one for one in shipped_models(model.parent) if (one.sha256, one.resolution) == (digest, data.resolution))
    scores = [score for one in same for score in one.scores if all(score[name] == asked[name] for name in asked)]
    if not scores:
        return []
    common: Record = asked | {"task": "segmentation", "method": method_at(data.resolution, data.protocol.resolution)}
    common |= {"seeds": [data.protocol.seed]}
    values = {"FB-IoU": scores[0]["fb_iou"]}
    values |= {f"IoU: {name}": value for name, value in scores[0]["per_class"].items()}
    interval = {name: scores[0][name] for name in ("value", "low", "high")}
    return [common | interval, *(common | {"metric": name, "value": one} for name, one in values.items())]


def _parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--weights", type=Path, default=weights_folder(), help="folder of pascal-fold0.safetensors ...")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(4)))
    parser.add_argument("--sizes", type=int, nargs="*", default=[400, 480, 560, 640], help="to choose from")
    parser.add_argument("--score-at", type=int, nargs="*", default=[400, PHOTO_SIZE], help="novel classes")
    parser.add_argument("--shots", type=int, nargs="*", default=[1, 5])
    parser.add_argument("--episodes", type=int, help="of novel classes a fold; the protocol's 1000 by default")
    parser.add_argument("--base-episodes", type=int, default=100, help="of base classes a fold")
    parser.add_argument("--again", action="store_true", help="compute the scores of the manifest anew")
    parser.add_argument("--out", type=Path, default=Path("runs/sizes"), help="finished cells")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--cache-gigabytes", type=float, default=16.0, help="features of four sizes are large")
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
