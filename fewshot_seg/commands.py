"""What each verb of the command line does; results go to stdout, progress to stderr."""

from __future__ import annotations

import sys

from episodes.types import DataError
from episodes.verify import verify
from fewshot_seg.config import (
    DemoConfig,
    EpisodeSettings,
    EvaluateConfig,
    ExplainConfig,
    PredictConfig,
    TrainConfig,
    VerifyConfig,
)
from fewshot_seg.demo import run_demo, score_table
from fewshot_seg.evaluation import evaluate
from fewshot_seg.experiment import FoldData, evaluation_episodes, evaluation_specs
from fewshot_seg.explanation import write_explanations
from fewshot_seg.method import open_method, open_on_data
from fewshot_seg.metrics import IoUResult
from fewshot_seg.photos import find_queries, read_support
from fewshot_seg.prediction import Predictor, predict_folder
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.report import Figure, Section, Table, text_table, write_page
from fewshot_seg.runs import (
    MODEL_NAME,
    RUN_NAME,
    benchmark_name,
    episode_records,
    open_protocol,
    open_source,
    run_record,
    run_training,
    score_record,
)
from fewshot_seg.runtime import environment, pick_device, write_json

_PREDICT_SIZE = 400
_PREDICT_THRESHOLD = 0.5  # of the bare soft margin: best on held-out base classes (scripts/choose_temperature.py)


def demo(config: DemoConfig) -> int:
    """Train and score on generated pictures."""
    result = run_demo(config, show_progress=True)
    print(f"novel classes of the synthetic pictures, 1-shot, {config.episodes} episodes\n")
    print(text_table(score_table(result.scores)))
    print(f"\npictures and figures: {result.page.resolve()}")
    return 0


def data_verify(config: VerifyConfig) -> int:
    """List every problem of a data set; 1 if there are any."""
    source = open_source(config)
    protocol = open_protocol(config, source)
    problems = []
    for split in config.splits or (protocol.training_split, protocol.evaluation_split):
        found = verify(source, split)
        print(f"{split}: {len(source.ids(split))} images, {len(found)} problems")
        problems += found
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def train(config: TrainConfig) -> int:
    """Train one fold and write its model."""
    trained = run_training(config, device=pick_device(config.device), show_progress=True)
    if trained.held_out_miou is not None:
        threshold = trained.segmenter.threshold
        print(f"threshold {threshold:.3f}: mIoU {trained.held_out_miou:.1f} on held-out base classes")
    print(f"model: {config.out / MODEL_NAME}")
    return 0


def evaluate_method(config: EvaluateConfig) -> int:
    """Score a model or a prior map on the novel classes."""
    method, data = open_on_data(config, show_progress=True)
    evaluation = evaluate(
        method.segmenter,
        evaluation_episodes(data, shots=config.shots, count=config.episodes, seed=config.seed, show_progress=True),
        scoring_size=data.protocol.scoring_size if config.scoring == "protocol" else None,
        source=data.source,
        batch_size=config.batch_size,
        show_progress=True,
    )
    results = {
        "benchmark": benchmark_name(data),
        "protocol": data.protocol.name,
        "scoring": config.scoring,
        "fold": data.fold,
        "shots": config.shots,
        "method": method.name,
        "threshold": method.segmenter.threshold,
        "threshold_origin": method.threshold_origin,
        "seconds": evaluation.seconds,
        **score_record(evaluation.result, data.source.class_names),
    }
    write_json(config.out / "evaluation.json", results | {"episodes": episode_records(evaluation)})
    write_json(config.out / RUN_NAME, run_record("evaluate", config, data) | {"results": results})
    scoring = ", scored at original size" if config.scoring == "original" else ""
    print(f"{_title(config, data)}, protocol {data.protocol.name}{scoring}: {method.name}\n")
    print(text_table(_class_table(evaluation.result, data)))
    print(f"\n{evaluation.result.episodes} episodes, threshold {results['threshold']:.3f} {method.threshold_origin}")
    print(f"per episode: {config.out / 'evaluation.json'}")
    return 0


def _title(config: EpisodeSettings, data: FoldData) -> str:
    fold = "" if data.fold is None else f", fold {data.fold}"
    return f"{benchmark_name(data)}{fold}, {config.shots}-shot"


def _class_table(result: IoUResult, data: FoldData) -> Table:
    names = data.source.class_names
    rows = [[names[class_id], f"{iou:.1f}", ""] for class_id, iou in result.per_class.items()]
    rows.append(["mIoU", f"{result.miou:.1f}", f"{result.miou_low:.1f} - {result.miou_high:.1f}"])
    rows.append(["FB-IoU", f"{result.fb_iou:.1f}", f"{result.fb_iou_low:.1f} - {result.fb_iou_high:.1f}"])
    return Table(header=["class", "IoU %", "95% interval"], rows=rows)


def explain(config: ExplainConfig) -> int:
    """Draw episodes of the evaluation."""
    method, data = open_on_data(config, show_progress=True)
    numbers = tuple(range(config.count)) if config.numbers is None else config.numbers
    count = max(data.protocol.episodes, max(numbers) + 1)
    written = write_explanations(
        method.segmenter,
        data.source,
        evaluation_specs(data, shots=config.shots, count=count, seed=config.seed),
        numbers=numbers,
        resolution=data.resolution,
        folder=config.out,
        show_progress=True,
    )
    page = config.out / "index.html"
    figures = [Figure(path=one.path, caption=f"{one.number}. {one.title}: IoU {one.iou:.0f}%") for one in written]
    section = Section(heading=f"{_title(config, data)}: {method.name}", figures=figures)
    write_page(page, title="fewshot-seg explain", sections=[section])
    results = {"method": method.name, "episodes": [{"number": one.number, "iou": one.iou} for one in written]}
    write_json(config.out / RUN_NAME, run_record("explain", config, data) | {"results": results})
    print(f"{len(written)} pictures: {page.resolve()}")
    return 0


def predict(config: PredictConfig) -> int:
    """Segment people's own photos; 1 if some could not be read."""
    queries = find_queries(config.query)
    supports = [read_support(pair) for pair in config.support]
    method = open_method(config)
    if not method.threshold_origin:
        if config.prior_map not in (None, PRIOR_CHANNELS[0]):
            raise DataError(f"--prior-map {config.prior_map!r} has no threshold of its own; give one with --threshold")
        method.segmenter.threshold = _PREDICT_THRESHOLD
    predictor = Predictor(method.segmenter, config.size or method.resolution or _PREDICT_SIZE)
    predictor.remember([photo for photo, _ in supports], [mask for _, mask in supports])
    result = predict_folder(predictor, queries, config.out, show_progress=True)
    record = {
        "verb": "predict",
        "configuration": config.as_json(),
        "environment": environment(),
        "results": {
            "method": method.name,
            "threshold": method.segmenter.threshold,
            "photos": [
                {
                    "query": str(one.query),
                    "mask": str(one.mask.relative_to(config.out)),
                    "overlay": str(one.overlay.relative_to(config.out)),
                    "share": one.share,
                    "confidence": one.confidence,
                }
                for one in result.written
            ],
            "failures": list(result.failures),
        },
    }
    write_json(config.out / RUN_NAME, record)
    print(f"{len(result.written)} of {len(queries)} photos: {config.out}/masks, {config.out}/overlays")
    for failure in result.failures:
        print(f"fewshot-seg: skipped {failure}", file=sys.stderr)
    return 1 if result.failures else 0
