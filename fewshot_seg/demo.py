"""``fewshot-seg demo``: the whole method on generated pictures, without any download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.episode_files import fingerprint_episodes
from episodes.fold_lists import evaluation_specs, protocol_for
from episodes.protocols import get_protocol
from episodes.sources import SyntheticSource
from episodes.types import EpisodeSpec
from fewshot_seg.backbones import build_backbone
from fewshot_seg.config import DemoConfig, TrainConfig
from fewshot_seg.decoder import Decoder, PriorReadout
from fewshot_seg.evaluation import Evaluation, choose_thresholds, evaluate, evaluate_heads
from fewshot_seg.feature_episodes import FeatureEpisodes
from fewshot_seg.fold_data import FoldData, held_out_episodes, open_fold, stored_episodes
from fewshot_seg.metrics import IoUResult
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.report import Table
from fewshot_seg.reports import REPORT_NAME, check_gallery, chosen_episodes, draw_gallery, read_run, write_report
from fewshot_seg.runs import benchmark_name, run_record, score_record, train_configured, write_evaluation
from fewshot_seg.runtime import pick_device
from fewshot_seg.segmenter import training_free

_ALONE: dict[str, Decoder] = {
    "gradient attention alone, nothing trained": PriorReadout(PRIOR_CHANNELS.index("gradient attention"), scaled=True),
    "soft margin alone, nothing trained": PriorReadout(PRIOR_CHANNELS.index("soft margin")),
}
_TRAINED = "decoder on all prior maps, trained"
_THRESHOLD_EPISODES = 100


_FOLDERS = {name: name.split(",")[0].replace(" ", "-") for name in _ALONE}
"""Where the runs of the bare priors are kept, below that of the trained method."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Scores by method on the novel classes, and the page."""

    scores: dict[str, IoUResult]
    page: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    evaluation: Evaluation
    threshold: float


def run_demo(config: DemoConfig, *, show_progress: bool = False) -> DemoResult:
    """Train on the synthetic base classes, score on the novel ones, write runs and their report to `config.out`."""
    if config.report_episodes:
        check_gallery(config.out)
    source = SyntheticSource(
        seed=config.seed, images_per_class=12, size=config.resolution
    )  # enough, in a minute or two
    backbone = build_backbone(config.backbone, weights=config.backbone_weights).to(pick_device(config.device))
    protocol = protocol_for(source, get_protocol("hsnet"))
    data = open_fold(source, backbone, protocol, fold=0, show_progress=show_progress)
    trained = train_configured(data, _training(config), folder=None, show_progress=show_progress).segmenter
    specs = evaluation_specs(data, shots=1, count=config.episodes, seed=config.seed)
    episodes = stored_episodes(data, specs, show_progress=show_progress)
    scored = _score_priors(data, episodes, show_progress)
    evaluation = evaluate(
        trained,
        episodes,
        scoring_size=protocol.scoring_size,
        source=source,
        findings=True,
        show_progress=show_progress,
    )
    scored[_TRAINED] = _Scored(evaluation=evaluation, threshold=trained.threshold)
    folders = {name: config.out / _FOLDERS.get(name, "") for name in scored}
    for name, one in scored.items():
        _write_run(folders[name], name, one, specs, config, data)
    draw_gallery(
        trained,
        source,
        specs,
        numbers=chosen_episodes(specs, evaluation.episode_iou.tolist(), config.report_episodes),
        fingerprint=fingerprint_episodes(specs),
        resolution=data.resolution,
        folder=config.out,
        show_progress=show_progress,
    )
    page = config.out / REPORT_NAME
    write_report(page, [read_run(folders[name]) for name in (_TRAINED, *_ALONE)])
    return DemoResult(scores={name: one.evaluation.result for name, one in scored.items()}, page=page)


def _score_priors(data: FoldData, episodes: FeatureEpisodes, show_progress: bool) -> dict[str, _Scored]:
    """The bare prior maps, each at the threshold that is best on held-out base classes."""
    untrained = training_free(data.backbone).eval()
    held_out = held_out_episodes(data, shots=1, count=_THRESHOLD_EPISODES, seed=0)
    chosen = choose_thresholds(untrained, _ALONE, held_out, show_progress=show_progress)
    evaluations = evaluate_heads(
        untrained,
        {name: (decoder, chosen[name][0]) for name, decoder in _ALONE.items()},
        episodes,
        scoring_size=data.protocol.scoring_size,
        source=data.source,
        findings=True,
        show_progress=show_progress,
    )
    return {name: _Scored(evaluation=one, threshold=chosen[name][0]) for name, one in evaluations.items()}


def _training(config: DemoConfig) -> TrainConfig:
    return TrainConfig(
        data="synthetic",
        training="joint",  # one short training is enough for generated pictures
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        validation_episodes=_THRESHOLD_EPISODES,
    )


def score_table(scores: dict[str, IoUResult]) -> Table:
    """mIoU and FB-IoU of several methods, in percent with 95% intervals."""
    return Table(
        header=["method", "mIoU", "95% interval", "FB-IoU"],
        rows=[
            [name, f"{s.miou:.1f}", f"{s.miou_low:.1f} - {s.miou_high:.1f}", f"{s.fb_iou:.1f}"]
            for name, s in scores.items()
        ],
    )


def _write_run(
    folder: Path, name: str, scored: _Scored, specs: Sequence[EpisodeSpec], config: DemoConfig, data: FoldData
) -> None:
    """The same files as of `fewshot-seg evaluate`."""
    result, class_names = scored.evaluation.result, data.source.class_names
    results = {
        "benchmark": benchmark_name(data),
        "protocol": data.protocol.name,
        "scoring": "protocol",
        "shots": 1,
        "method": name,
        "threshold": scored.threshold,
        "threshold_origin": "chosen on base classes",
        "episodes_fingerprint": fingerprint_episodes(specs),
        "seconds": scored.evaluation.seconds,
        **score_record(result, class_names),
    }
    write_evaluation(folder, run_record("demo", config, data), results, scored.evaluation, class_names)
