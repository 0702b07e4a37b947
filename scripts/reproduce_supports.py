"""How little may a support say? Masks, boxes, scribbles, points and image-level labels on the same episodes.

    python scripts/reproduce_supports.py --root ../shared/data/VOCdevkit/VOC2012

    python scripts/reproduce_supports.py --root ../shared/data/VOCdevkit/VOC2012 --training cross-fitted --no-bare

One model a fold is trained on a mix of all kinds and evaluated with each, 1- and 5-shot: by default the small joint
model over one backbone, whose threshold is chosen for each kind on held-out base classes; with --training cross-fitted
the recipe of the shipped models, whose threshold is 0 and which are used on larger photos than they are trained on,
and the same without the look back from query to bare photos.
Beside it stands the bare soft margin with nothing trained at all, 1-shot (not with --no-bare). Interrupted runs go on
where they stopped. docs/results.md is written at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from general_model import BYTES
from render_results import fold_means, merge_records, provenance, render
from train_weights import MODEL, PHOTO_SIZE, TRAINING
from weight_runs import BACKBONE

from episodes.episode_files import fingerprint_episodes
from episodes.protocols import get_protocol
from episodes.sources import VocSource
from episodes.types import SUPPORT_KINDS, SupportKind
from fewshot_seg.backbones import build_backbone
from fewshot_seg.checkpoint import load_segmenter, save_segmenter
from fewshot_seg.config import default_cache
from fewshot_seg.cross_fitted_fold import train_cross_fitted
from fewshot_seg.evaluation import choose_threshold, evaluate
from fewshot_seg.experiment import train_fold
from fewshot_seg.fold_data import FoldData, at_resolution, evaluation_episodes, held_out_episodes, open_fold
from fewshot_seg.runs import benchmark_name
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free

MIX: tuple[SupportKind, ...] = ("label", "label", *SUPPORT_KINDS)
"""What supports of training episodes are marked by: image-level labels, the hardest, come three times in seven."""
TRAINED = "ours, trained on all kinds of supports"
CROSS_FITTED = f"ours, cross-fitted on all kinds of supports, photos at {PHOTO_SIZE}"
FIRST_ANSWER = f"{CROSS_FITTED}, without looking back"
BARE = "soft margin alone, training-free"  # as reproduce_pascal calls it
EPISODES = {1: 1000, 5: 500}
"""Episodes by shots; those of 5 supports take three times as long."""
STEPS = 160
HELD_OUT_EPISODES = 200


def main() -> None:
    arguments = _arguments()
    source, protocol = VocSource(arguments.root), get_protocol("hsnet", "pascal")
    cross_fitted = arguments.training == "cross-fitted"
    common = {"root": arguments.root, "out": arguments.out, "cache": arguments.cache, "quick": arguments.quick}
    # features first, in one process: two would compute the same ones
    backbone = build_backbone(**BACKBONE) if cross_fitted else build_backbone()
    cache = {"cache": arguments.cache, "byte_budget": BYTES}
    data = open_fold(source, backbone, protocol, fold=0, **cache, show_progress=True)
    data.store.ensure([*data.training_index.image_ids, *data.evaluation_index.image_ids], show_progress=True)
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        trained = partial(_cross_fitted if cross_fitted else _trained, episodes=arguments.episodes)
        per_fold = list(pool.map(partial(trained, **common), arguments.folds))
        per_fold += pool.map(partial(_bare, **common), arguments.folds) if arguments.bare else []
    described = {
        "data": benchmark_name(data),
        "protocol": protocol.name,
        "seeds": [protocol.seed],
        **provenance(),
    }
    records = [described | record for fold in per_fold for record in fold]
    means = fold_means(records) if set(arguments.folds) == set(range(4)) else []
    merge_records(arguments.results, [*records, *means])
    render(arguments.results, arguments.results.with_suffix(".md"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--out", type=Path, default=Path("runs/supports"), help="models and finished cells")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--training", choices=("joint", "cross-fitted"), default="joint")
    parser.add_argument("--folds", type=int, nargs="+", choices=range(4), default=list(range(4)))
    parser.add_argument("--episodes", type=int, nargs="+", help="a cell: of 1 shot, and of 5 shots if there is another")
    parser.add_argument("--jobs", type=int, default=2, help="folds at a time")
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--bare", action=argparse.BooleanOptionalAction, default=True, help="nothing trained, too")
    parser.add_argument("--quick", action="store_true", help="a few steps and episodes, to try the script")
    arguments = parser.parse_args()
    if arguments.quick:  # neither kept cells nor published records may come from a trial
        arguments.out = arguments.out / "quick"
        arguments.results = arguments.out / "results.json"
    return arguments


def _open(fold: int, root: Path, cache: Path, **backbone: Any) -> FoldData:
    protocol = get_protocol("hsnet", "pascal")
    return open_fold(VocSource(root), build_backbone(**backbone), protocol, fold=fold, cache=cache, byte_budget=BYTES)


def _counts(episodes: Sequence[int] | None) -> dict[int, int]:
    return EPISODES if episodes is None else dict(zip(EPISODES, episodes, strict=False))


def _cross_fitted(
    fold: int, *, root: Path, out: Path, cache: Path, quick: bool, episodes: Sequence[int] | None
) -> list[dict[str, Any]]:
    """The recipe of the shipped models, but for the supports; used at the same size."""
    data, folder = _open(fold, root, cache, **BACKBONE), out / f"cross-fitted{fold}"
    model = folder / "model.safetensors"
    if not model.exists():
        build = partial(_build, data)
        few = {"steps": 6, "decoder_steps": 6, "decoder_episodes": ((1, 8),)} if quick else {}
        recipe = {**TRAINING, "supports": MIX, **few}
        trained = train_cross_fitted(build, data, folder=folder, resume=True, show_progress=True, **recipe)
        notes = {"source": data.source.name, "fold": fold, "base_classes": data.split.base, "supports": MIX}
        save_segmenter(model, trained.segmenter, backbone_weights="embedded", resolution=PHOTO_SIZE, notes=notes)
    segmenter = load_segmenter(model).segmenter
    scored = at_resolution(data, PHOTO_SIZE, cache=cache, byte_budget=BYTES)
    records = _cells(scored, folder, CROSS_FITTED, (segmenter, None), _counts(episodes), quick)
    assert segmenter.weak_decoder is not None
    segmenter.decoder, segmenter.weak_decoder = segmenter.weak_decoder, None  # the first answer is the last
    records += _cells(scored, folder, FIRST_ANSWER, (segmenter, None), _counts(episodes), quick, kinds=("label",))
    return [record | {"fold": fold} for record in records]


def _build(data: FoldData, base_classes: int) -> FewShotSegmenter:
    return build_segmenter(data.backbone, base_classes=base_classes, **MODEL, completion=True)


def _trained(
    fold: int, *, root: Path, out: Path, cache: Path, quick: bool, episodes: Sequence[int] | None
) -> list[dict[str, Any]]:
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
    records = _cells(data, folder, TRAINED, (trained.segmenter, trained.selection), _counts(episodes), quick)
    return [record | {"fold": fold} for record in records]


def _bare(fold: int, *, root: Path, out: Path, cache: Path, quick: bool) -> list[dict[str, Any]]:
    data, folder = _open(fold, root, cache), out / f"fold{fold}"
    bare = training_free(data.backbone)
    return [record | {"fold": fold} for record in _cells(data, folder, BARE, (bare, bare), {1: EPISODES[1]}, quick)]


def _cells(
    data: FoldData,
    folder: Path,
    method: str,
    models: tuple[FewShotSegmenter, FewShotSegmenter | None],
    counts: Mapping[int, int],
    quick: bool,
    *,
    kinds: Sequence[SupportKind] = SUPPORT_KINDS,
) -> list[dict[str, Any]]:
    """Records of a method with some kinds of support.

    `models`: the one to score, and that of the threshold (None: it keeps its own); `counts`: shots -> episodes.
    """
    segmenter, selection = models[0].eval(), models[1]
    records: list[dict[str, Any]] = []
    for shots, count in counts.items():
        for kind in kinds:
            few = "" if count == EPISODES[shots] else f", {count} episodes"
            kept = folder / f"{method}, {kind}, {shots}-shot{few}.json"
            if not kept.exists():
                if selection is not None:
                    segmenter.threshold = _threshold(data, folder, method, selection.eval(), kind, quick)
                write_json(kept, _score(data, method, segmenter, kind, shots, 20 if quick else count))
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
    data: FoldData, method: str, segmenter: FewShotSegmenter, kind: SupportKind, shots: int, count: int
) -> list[dict[str, Any]]:
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
