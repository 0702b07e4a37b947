"""How little may a support say? Masks, boxes, scribbles, points and image-level labels on the same episodes.

    python scripts/reproduce_supports.py --root ../shared/data/VOCdevkit/VOC2012

One model a fold is trained on a mix of all kinds and evaluated with each, 1- and 5-shot; its threshold is chosen for
each kind on held-out base classes. Beside it stands the bare soft margin with nothing trained at all, 1-shot (not with
--no-bare). Interrupted runs go on where they stopped. docs/results.md is written at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from render_results import fold_means, merge_records, provenance, render

from episodes.episode_files import fingerprint_episodes
from episodes.protocols import get_protocol
from episodes.sources import VocSource
from episodes.types import SUPPORT_KINDS, SupportKind
from fewshot_seg.backbones import build_backbone
from fewshot_seg.checkpoint import save_segmenter
from fewshot_seg.config import default_cache
from fewshot_seg.evaluation import choose_threshold, evaluate
from fewshot_seg.experiment import train_fold
from fewshot_seg.fold_data import FoldData, evaluation_episodes, held_out_episodes, open_fold
from fewshot_seg.runs import benchmark_name
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free

MIX: tuple[SupportKind, ...] = ("label", "label", *SUPPORT_KINDS)
"""What supports of training episodes are marked by: image-level labels, the hardest, come three times in seven."""
TRAINED = "ours, trained on all kinds of supports"
BARE = "soft margin alone, training-free"  # as reproduce_pascal calls it
EPISODES = {1: 1000, 5: 500}
"""Episodes by shots; those of 5 supports take three times as long."""
STEPS = 160
HELD_OUT_EPISODES = 200


def main() -> None:
    arguments = _arguments()
    source, protocol = VocSource(arguments.root), get_protocol("hsnet", "pascal")
    common = {"root": arguments.root, "out": arguments.out, "cache": arguments.cache, "quick": arguments.quick}
    # features first, in one process: two would compute the same ones
    data = open_fold(source, build_backbone(), protocol, fold=0, cache=arguments.cache, show_progress=True)
    data.store.ensure([*data.training_index.image_ids, *data.evaluation_index.image_ids], show_progress=True)
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        per_fold = list(pool.map(partial(_trained, **common), range(4)))
        per_fold += pool.map(partial(_bare, **common), range(4)) if arguments.bare else []
    described = {
        "data": benchmark_name(data),
        "protocol": protocol.name,
        "seeds": [protocol.seed],
        **provenance(),
    }
    records = [described | record for fold in per_fold for record in fold]
    merge_records(arguments.results, [*records, *fold_means(records)])
    render(arguments.results, arguments.results.with_suffix(".md"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--out", type=Path, default=Path("runs/supports"), help="models and finished cells")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--jobs", type=int, default=2, help="folds at a time")
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--bare", action=argparse.BooleanOptionalAction, default=True, help="nothing trained, too")
    parser.add_argument("--quick", action="store_true", help="a few steps and episodes, to try the script")
    arguments = parser.parse_args()
    if arguments.quick:  # neither kept cells nor published records may come from a trial
        arguments.out = arguments.out / "quick"
        arguments.results = arguments.out / "results.json"
    return arguments


def _open(fold: int, root: Path, cache: Path) -> FoldData:
    return open_fold(VocSource(root), build_backbone(), get_protocol("hsnet", "pascal"), fold=fold, cache=cache)


def _trained(fold: int, *, root: Path, out: Path, cache: Path, quick: bool) -> list[dict[str, Any]]:
    data, folder = _open(fold, root, cache), out / f"fold{fold}"
    build = partial(build_segmenter, data.backbone, decoder_width=48, decoder_blocks=4, completion=True)
    trained = train_fold(
        build,
        data,
        supports=MIX,
        steps=6 if quick else STEPS,
        validation_episodes=20 if quick else HELD_OUT_EPISODES,
        folder=folder,
        resume=True,
    )
    assert trained.selection is not None
    notes = {"source": data.source.name, "fold": fold, "base_classes": data.split.base, "supports": MIX}
    model = folder / "model.safetensors"
    save_segmenter(model, trained.segmenter, backbone_weights="embedded", resolution=data.resolution, notes=notes)
    records = _cells(data, folder, TRAINED, (trained.segmenter, trained.selection), tuple(EPISODES), quick)
    return [record | {"fold": fold} for record in records]


def _bare(fold: int, *, root: Path, out: Path, cache: Path, quick: bool) -> list[dict[str, Any]]:
    data, folder = _open(fold, root, cache), out / f"fold{fold}"
    bare = training_free(data.backbone)
    return [record | {"fold": fold} for record in _cells(data, folder, BARE, (bare, bare), (1,), quick)]


def _cells(
    data: FoldData,
    folder: Path,
    method: str,
    models: tuple[FewShotSegmenter, FewShotSegmenter],
    all_shots: tuple[int, ...],
    quick: bool,
) -> list[dict[str, Any]]:
    """Records of a method with every kind of support; `models`: the one to score, and that of the threshold."""
    segmenter, selection = (model.eval() for model in models)
    records: list[dict[str, Any]] = []
    for shots in all_shots:
        for kind in SUPPORT_KINDS:
            kept = folder / f"{method}, {kind}, {shots}-shot.json"
            if not kept.exists():
                segmenter.threshold = _threshold(data, folder, method, selection, kind, quick)
                write_json(kept, _score(data, method, segmenter, kind, shots, quick))
                print(f"fold {data.fold}: {kept.stem} done", flush=True)
            records += read_json(kept, what="finished cell")
    return records


def _threshold(
    data: FoldData, folder: Path, method: str, selection: FewShotSegmenter, kind: SupportKind, quick: bool
) -> float:
    """One threshold a kind, for any number of shots, on base classes that `selection` was not trained on."""
    kept = folder / f"{method}, {kind}, threshold.json"
    if not kept.exists():
        count = 20 if quick else HELD_OUT_EPISODES
        held_out = held_out_episodes(data, shots=1, count=count, seed=0, supports=(kind,))
        write_json(kept, choose_threshold(selection, held_out)[0])
    return float(read_json(kept, what="chosen threshold"))


def _score(
    data: FoldData, method: str, segmenter: FewShotSegmenter, kind: SupportKind, shots: int, quick: bool
) -> list[dict[str, Any]]:
    count = 20 if quick else EPISODES[shots]
    evaluation = evaluate(
        segmenter,
        evaluation_episodes(data, shots=shots, count=count, support=kind),
        scoring_size=data.protocol.scoring_size,
        source=data.source,
    )
    result = evaluation.result
    base = {"task": "segmentation", "shots": shots, "support": kind, "method": method, "episodes": result.episodes}
    base["episodes_fingerprint"] = fingerprint_episodes(evaluation.specs)
    return [
        base | {"metric": "mIoU", "value": result.miou, "low": result.miou_low, "high": result.miou_high},
        base | {"metric": "FB-IoU", "value": result.fb_iou, "low": result.fb_iou_low, "high": result.fb_iou_high},
    ]


if __name__ == "__main__":
    main()
