"""What each verb of the command line does; results go to stdout, progress to stderr."""

from __future__ import annotations

import sys
from typing import Any

from episodes.episode_files import check_episodes, fingerprint_episodes, read_episodes
from episodes.files import user_path
from episodes.fold_lists import evaluation_specs, left_out_classes
from episodes.types import DataError
from fewshot_seg.config import (
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
    ReportConfig,
    TrainConfig,
)
from fewshot_seg.demo import run_demo, score_table
from fewshot_seg.distributed import current_ranks
from fewshot_seg.evaluation import Evaluation, evaluate
from fewshot_seg.export import check_packages, export_segmenter
from fewshot_seg.fold_data import FoldData, stored_episodes
from fewshot_seg.method import Method, open_on_data
from fewshot_seg.metrics import IoUResult
from fewshot_seg.n_way import NWayEvaluation, evaluate_n_way
from fewshot_seg.photos import WORKING_PIXELS, find_queries
from fewshot_seg.predicted_files import COCO_NAME, FolderPrediction, predict_folder
from fewshot_seg.predictors import USUAL_SIZE, method_for_photos, predictor_of
from fewshot_seg.report import Table, text_table
from fewshot_seg.reports import REPORT_NAME, check_gallery, chosen_episodes, draw_gallery, read_run, write_report
from fewshot_seg.runs import (
    EVALUATION_NAME,
    MODEL_NAME,
    RUN_NAME,
    benchmark_name,
    check_novel,
    known_by_name,
    of_episodes,
    run_record,
    run_training,
    score_record,
    title_of,
    write_evaluation,
)
from fewshot_seg.runtime import environment, pick_device, write_json
from fewshot_seg.support_photos import read_supports, split_name


def demo(config: DemoConfig) -> int:
    """Train and score on generated pictures."""
    result = run_demo(config, show_progress=True)
    print(f"novel classes of the synthetic pictures, 1-shot, {config.episodes} episodes\n")
    print(text_table(score_table(result.scores)))
    print(f"\nreport: {result.page.resolve()}")
    return 0


def train(config: TrainConfig) -> int:
    """Train one fold and write its model."""
    first = current_ranks().first
    trained = run_training(config, device=pick_device(config.device), show_progress=first)
    if not first:
        return 0
    if trained.held_out_miou is not None:
        threshold = trained.segmenter.threshold
        where = "base classes that the embedding had not seen" if config.cross_fits else "held-out base classes"
        print(f"threshold {threshold:.3f}: mIoU {trained.held_out_miou:.1f} on {where}")
    print(f"model: {config.out / MODEL_NAME}")
    return 0


def evaluate_method(config: EvaluateConfig) -> int:
    """Score a model or a prior map on the novel classes."""
    first = current_ranks().first
    file, listed = config.episodes, None if config.episodes is None else read_episodes(config.episodes)
    if listed is not None:
        config = of_episodes(config, listed)
    if config.report_episodes and config.ways == 1:
        check_gallery(config.out)
    method, data = open_on_data(config, show_progress=first)
    if listed is None:
        specs = evaluation_specs(data, shots=config.shots, count=config.count, seed=config.seed, ways=config.ways)
        repeats = data.protocol.repeats
    else:
        check_episodes(listed, data.source, str(data.protocol.evaluation_split))
        check_novel(listed, data)
        specs, repeats = listed.specs, len(listed.seeds)
    rule = data.protocol.shot_rule if config.shot_rule == "protocol" else config.shot_rule
    arguments: dict[str, Any] = {
        "scoring_size": data.protocol.scoring_size if config.scoring == "protocol" else None,
        "source": data.source,
        "fit": data.protocol.fit,
        "shot_rule": rule,
        "repeats": repeats,
        "support_cells": config.support_cells,
        "batch_size": max(1, config.batch_size // config.ways),
        "show_progress": first,
    }
    episodes = stored_episodes(data, specs, support=config.support, show_progress=first)
    evaluation: Evaluation | NWayEvaluation
    if config.ways == 1:
        evaluation = evaluate(method.segmenter, episodes, findings=True, **arguments)
    else:
        evaluation = evaluate_n_way(method.segmenter, episodes, ways=config.ways, **arguments)
    if not first:
        return 0
    left_out = () if listed is not None else left_out_classes(data, shots=config.shots)
    results = {
        "benchmark": benchmark_name(data),
        "protocol": data.protocol.name,
        "scoring": config.scoring,
        "resolution": data.resolution,
        "fold": data.fold,
        "shots": config.shots,
        "ways": config.ways,
        "support": config.support,
        "shot_rule": rule,
        "method": method.name,
        "threshold": method.segmenter.threshold,
        "threshold_origin": method.threshold_origin,
        "episodes_file": None if file is None else str(file),
        "episodes_fingerprint": fingerprint_episodes(specs),
        "left_out": [data.source.class_names[class_id] for class_id in left_out],
        "known_by_name": known_by_name(method.notes, data),
        "seconds": evaluation.seconds,
        **score_record(evaluation.result, data.source.class_names),
        "repeats": [one.miou for one in evaluation.repeats],
    }
    write_evaluation(config.out, run_record("evaluate", config, data), results, evaluation, data.source.class_names)
    _print_scores(config, data, evaluation.result, results)
    scores = evaluation.episode_iou.tolist() if isinstance(evaluation, Evaluation) else []  # ways compete: not drawn
    draw_gallery(
        method.segmenter,
        data.source,
        specs,
        numbers=chosen_episodes(specs, scores, config.report_episodes),
        fingerprint=results["episodes_fingerprint"],
        resolution=data.resolution,
        folder=config.out,
        support=config.support,
        fit=data.protocol.fit,
        show_progress=True,
    )
    write_report(config.out / REPORT_NAME, [read_run(config.out)])
    print(f"report: {(config.out / REPORT_NAME).resolve()}")
    return 0


def report(config: ReportConfig) -> int:
    """One page of one run, or of several side by side."""
    write_report(config.out, [read_run(folder) for folder in config.runs])
    print(f"report: {config.out.resolve()}")
    return 0


def _print_scores(config: EvaluateConfig, data: FoldData, result: IoUResult, results: dict[str, Any]) -> None:
    scoring = ", scored at original size" if config.scoring == "original" else ""
    if data.resolution != data.protocol.resolution:
        scoring += f", photos of {data.resolution} pixels (the protocol's: {data.protocol.resolution})"
    print(f"{title_of(config, data)}, protocol {data.protocol.name}{scoring}: {results['method']}\n")
    print(text_table(_class_table(result, data)))
    print(f"\n{result.episodes} episodes, threshold {results['threshold']:.3f} {results['threshold_origin']}")
    if results["left_out"]:
        print(f"left out, with too few images for {config.shots} shot(s): {', '.join(results['left_out'])}")
    if results["known_by_name"]:
        known = ", ".join(results["known_by_name"])
        print(f"not novel: {results['method']} was trained on classes of these names from other data: {known}")
    print(f"per episode: {config.out / EVALUATION_NAME}")


def _class_table(result: IoUResult, data: FoldData) -> Table:
    names = data.source.class_names
    rows = [[names[class_id], f"{iou:.1f}", ""] for class_id, iou in result.per_class.items()]
    rows.append(["mIoU", f"{result.miou:.1f}", f"{result.miou_low:.1f} - {result.miou_high:.1f}"])
    if data.protocol.reports_fb_iou:
        rows.append(["FB-IoU", f"{result.fb_iou:.1f}", f"{result.fb_iou_low:.1f} - {result.fb_iou_high:.1f}"])
    return Table(header=["class", "IoU %", "95% interval"], rows=rows)


def predict(config: PredictConfig) -> int:
    """Segment people's own photos; 1 if some could not be read."""
    queries = find_queries(config.query or ())
    supports = read_supports(config.support or ())
    if config.save_support is not None and len(supports) > 1:
        raise DataError(f"--save-support keeps one class, got {', '.join(supports)}; save them one by one")
    files = [split_name(text) for text in config.support_set or ()]
    names = [*supports, *(name for name, _ in files)]
    if len(set(names)) < len(names):
        raise DataError(f"each support set is a class of its own, got {', '.join(names)}; give NAME=FILE, each once")
    method = method_for_photos(config)
    predictor = predictor_of(method, size=config.size, tile=config.tile, flip=config.flip)
    for name, shown in supports.items():
        predictor.remember_supports(shown, name=name)
    noted = list(config.support or ())
    for name, file in files:
        noted.extend(predictor.load_support(user_path(file), name=name))
    if config.save_support is not None:
        predictor.save_support(config.save_support, noted)
        print(f"support set of {len(noted)} photo(s): {config.save_support}")
        if not queries:
            return 0
    del supports  # photos, of which nothing is needed any more
    result = predict_folder(
        predictor, queries, config.out, confidence=config.confidence, coco=config.coco, show_progress=True
    )
    write_json(config.out / RUN_NAME, _prediction_record(config, method, noted, predictor.classes, result))
    kinds = ["masks", "overlays", *(["confidence"] if config.confidence else []), *([COCO_NAME] if config.coco else [])]
    print(f"{len(result.written)} of {len(queries)} photos: {', '.join(f'{config.out}/{kind}' for kind in kinds)}")
    reduced = sum(one.reduced for one in result.written)
    if reduced:
        limit = f"{WORKING_PIXELS // 10**6} megapixels"
        print(f"fewshot-seg: {reduced} photo(s) of more than {limit}: worked on reduced, see run.json", file=sys.stderr)
    for failure in result.failures:
        print(f"fewshot-seg: skipped {failure}", file=sys.stderr)
    return 1 if result.failures else 0


def _prediction_record(
    config: PredictConfig, method: Method, supports: list[str], classes: tuple[str, ...], result: FolderPrediction
) -> dict[str, Any]:
    photos = []
    for one in result.written:
        photo: dict[str, Any] = {
            "query": str(one.query),
            "mask": str(one.mask.relative_to(config.out)),
            "overlay": str(one.overlay.relative_to(config.out)),
            "share": one.share,
            "confidence": one.confidence,
        }
        if len(classes) > 1:
            photo["classes"] = {
                found.name: {"share": found.share, "confidence": found.confidence} for found in one.found if found.share
            }
        if one.reduced:
            photo["size"], photo["worked_on"] = list(one.shape[::-1]), list(one.worked_on[::-1])
        photos.append(photo)
    return {
        "verb": "predict",
        "configuration": config.as_json(),
        "environment": environment(),
        "results": {
            "method": method.name,
            "threshold": method.segmenter.threshold,
            "classes": list(classes),
            "supports": supports,
            "photos": photos,
            "failures": list(result.failures),
        },
    }


def export(config: ExportConfig) -> int:
    """Write the method as ONNX graphs."""
    check_packages()
    method = method_for_photos(config)
    size = config.size or method.resolution or USUAL_SIZE
    metadata = export_segmenter(method.segmenter, config.out, size=size, fit=method.fit, name=method.name)
    print(f"{', '.join(graph['file'] for graph in metadata['graphs'].values())} and how to use them: {config.out}")
    return 0
