"""``fewshot-seg demo``: the whole method on generated pictures, without any download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from episodes.fold_lists import evaluation_specs, protocol_for
from episodes.protocols import get_protocol
from episodes.sources import SyntheticSource
from fewshot_seg.backbones import build_backbone
from fewshot_seg.config import DemoConfig, TrainConfig
from fewshot_seg.decoder import Decoder, PriorReadout
from fewshot_seg.evaluation import choose_thresholds, evaluate, evaluate_heads
from fewshot_seg.explanation import WrittenExplanation, write_explanations
from fewshot_seg.feature_episodes import FeatureEpisodes
from fewshot_seg.fold_data import FoldData, evaluation_episodes, held_out_episodes, open_fold
from fewshot_seg.metrics import IoUResult
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.report import Figure, Section, Table, write_page
from fewshot_seg.runs import RUN_NAME, run_record, score_record, train_configured
from fewshot_seg.runtime import pick_device, write_json
from fewshot_seg.segmenter import training_free

_ALONE: dict[str, Decoder] = {
    "gradient attention alone, nothing trained": PriorReadout(PRIOR_CHANNELS.index("gradient attention"), scaled=True),
    "soft margin alone, nothing trained": PriorReadout(PRIOR_CHANNELS.index("soft margin")),
}
_TRAINED = "decoder on all prior maps, trained"
_THRESHOLD_EPISODES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Scores by method on the novel classes, the pictures, and the page."""

    scores: dict[str, IoUResult]
    pictures: tuple[WrittenExplanation, ...]
    page: Path


def run_demo(config: DemoConfig, *, show_progress: bool = False) -> DemoResult:
    """Train on the synthetic base classes, score on the novel ones, write pictures and a page to `config.out`."""
    source = SyntheticSource(
        seed=config.seed, images_per_class=12, size=config.resolution
    )  # enough, in a minute or two
    backbone = build_backbone(config.backbone, weights=config.backbone_weights).to(pick_device(config.device))
    protocol = protocol_for(source, get_protocol("hsnet"))
    data = open_fold(source, backbone, protocol, fold=0, show_progress=show_progress)
    trained = train_configured(data, _training(config), folder=None, show_progress=show_progress).segmenter
    episodes = evaluation_episodes(data, shots=1, count=config.episodes, seed=config.seed, show_progress=show_progress)
    scores = _score_priors(data, episodes, show_progress)
    scores[_TRAINED] = evaluate(
        trained, episodes, scoring_size=protocol.scoring_size, source=source, show_progress=show_progress
    ).result
    pictures = write_explanations(
        trained,
        source,
        evaluation_specs(data, shots=1, count=config.episodes, seed=config.seed),
        numbers=range(min(config.pictures, config.episodes)),
        resolution=data.resolution,
        folder=config.out / "pictures",
        show_progress=show_progress,
    )
    result = DemoResult(scores=scores, pictures=tuple(pictures), page=config.out / "index.html")
    _write(config, data, result)
    return result


def _score_priors(data: FoldData, episodes: FeatureEpisodes, show_progress: bool) -> dict[str, IoUResult]:
    """The bare prior maps, each at the threshold that is best on held-out base classes."""
    untrained = training_free(data.backbone).eval()
    held_out = held_out_episodes(data, shots=1, count=_THRESHOLD_EPISODES, seed=0)
    chosen = choose_thresholds(untrained, _ALONE, held_out, show_progress=show_progress)
    heads = {name: (decoder, chosen[name][0]) for name, decoder in _ALONE.items()}
    size = data.protocol.scoring_size
    scored = evaluate_heads(
        untrained, heads, episodes, scoring_size=size, source=data.source, show_progress=show_progress
    )
    return {name: evaluation.result for name, evaluation in scored.items()}


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


def _write(config: DemoConfig, data: FoldData, result: DemoResult) -> None:
    base, novel = len(data.split.base), len(data.split.novel)
    summary = Section(
        heading="Objects that it never saw in training",
        paragraphs=[
            f"Trained on {base} kinds of generated objects, scored on {novel} others, in {config.episodes} "
            "episodes: one picture with a marked object is the support, and the same kind of object is to be found "
            "in another picture, the query. Thresholds were chosen on base classes.",
        ],
        table=score_table(result.scores),
    )
    episodes = Section(
        heading="What it looks at",
        paragraphs=[
            "Attention is the gradient of the similarity between support and query with respect to the query's "
            "features: it shows what the network finds alike, for classes it has no name for.",
        ],
        figures=[Figure(path=one.path, caption=f"{one.title}: IoU {one.iou:.0f}%") for one in result.pictures],
    )
    write_page(result.page, title="fewshot-seg demo", sections=[summary, episodes])
    results = {name: score_record(score, data.source.class_names) for name, score in result.scores.items()}
    write_json(config.out / RUN_NAME, run_record("demo", config, data) | {"results": results})
