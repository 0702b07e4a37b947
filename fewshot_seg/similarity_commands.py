"""What ``fewshot-seg similarity train|evaluate|explain`` do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from episodes.labelled import LabelledImages
from episodes.reidentification import ReidentificationData
from episodes.types import UInt8Array
from fewshot_seg.attention import ATTENTION_KINDS, NEGATIVES_NEEDED
from fewshot_seg.checkpoint import LoadedSimilarity
from fewshot_seg.config import SimilarityEvaluateConfig, SimilarityExplainConfig, SimilarityTrainConfig
from fewshot_seg.embedding import ImageEmbedder
from fewshot_seg.fold_data import evaluation_episodes, held_out_episodes
from fewshot_seg.photos import read_photo
from fewshot_seg.pictures import write_picture
from fewshot_seg.prior_evaluation import evaluate_priors
from fewshot_seg.report import Figure, Section, Table, text_table, write_page
from fewshot_seg.retrieval_metrics import ReidentificationResult, RetrievalResult, bootstrap_means
from fewshot_seg.runs import RUN_NAME, run_record
from fewshot_seg.runtime import environment, pick_device, write_json
from fewshot_seg.segmenter import training_free
from fewshot_seg.similarity_evaluation import (
    draw_comparisons,
    evaluate_reidentification,
    evaluate_retrieval,
    pair_faithfulness,
)
from fewshot_seg.similarity_pictures import comparison_picture
from fewshot_seg.similarity_runs import (
    PHOTO_SIZE,
    SIMILARITY_NAME,
    check_episodes,
    check_labels,
    episodes_name,
    open_episodes,
    open_network,
    open_photos,
    open_store,
    photo_part,
    photo_record,
    run_similarity_training,
)

_Scores = dict[str, tuple[float, float, float]]


def similarity_train(config: SimilarityTrainConfig) -> int:
    """Train a similarity network and write it."""
    run_similarity_training(config, device=pick_device(config.device), show_progress=True)
    print(f"network: {config.out / SIMILARITY_NAME}")
    return 0


def similarity_evaluate(config: SimilarityEvaluateConfig) -> int:
    """Score a network: retrieval, re-identification, or attention maps on episodes."""
    network = open_network(config, pick_device(config.device))
    name = "frozen features" if config.model is None else str(config.model)
    record, title, scores, facts = (
        _score_episodes(config, network, name) if config.episodic else _score_photos(config, network, name)
    )
    results = {"method": name, "part": config.part, **facts, "scores": scores}
    write_json(config.out / "evaluation.json", results)
    write_json(config.out / RUN_NAME, record | {"results": results})
    print(f"{title}: {name}\n")
    print(text_table(_score_table(scores)))
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"record: {config.out / RUN_NAME}")
    return 0


def _score_table(scores: _Scores) -> Table:
    rows = [[name, f"{value:.1f}", f"{low:.1f} - {high:.1f}"] for name, (value, low, high) in scores.items()]
    return Table(header=["score", "value", "95% interval"], rows=rows)


def _score_episodes(
    config: SimilarityEvaluateConfig, network: LoadedSimilarity, name: str
) -> tuple[dict[str, Any], str, _Scores, dict[str, Any]]:
    """Record, title, scores and facts: AUC and best-threshold IoU of every map, in percent."""
    fold = int(network.notes.get("fold") or 0) if config.fold is None else config.fold
    data = open_episodes(config, network.backbone, fold=fold, resolution=network.resolution or None)
    held_out = config.part == "held-out"
    check_episodes(name, network.notes, data, held_out=held_out)
    count = config.episodes or data.protocol.episodes
    episodes = (
        held_out_episodes(data, shots=config.shots, count=count, seed=config.seed or 0)
        if held_out
        else evaluation_episodes(data, shots=config.shots, count=count, seed=config.seed, show_progress=True)
    )
    segmenter = training_free(network.backbone, similarity=network.similarity).eval()
    found = evaluate_priors(segmenter, episodes, kinds=ATTENTION_KINDS, show_progress=True)
    scores: _Scores = {}
    for one, score in found.items():
        for metric, (value, low, high) in (("AUC", score.auc), ("best IoU", score.best_iou)):
            scores[f"{one}, {metric}"] = (100 * value, 100 * low, 100 * high)
    record = run_record("similarity evaluate", config, data)
    return record, f"{episodes_name(data)}, {config.shots}-shot", scores, {"episodes": count}


def _score_photos(
    config: SimilarityEvaluateConfig, network: LoadedSimilarity, name: str
) -> tuple[dict[str, Any], str, _Scores, dict[str, Any]]:
    """Record, title, scores in percent, and facts of retrieval or re-identification."""
    data = open_photos(config)
    images, size = photo_part(data, config.part), config.resolution or network.resolution or PHOTO_SIZE
    check_labels(name, network.notes, images, config.data)
    store = open_store(images, network.backbone, config, size=size)
    result: RetrievalResult | ReidentificationResult
    if config.part == "test" and isinstance(data, ReidentificationData):
        result = evaluate_reidentification(network.similarity, store, data, ranks=config.ranks, show_progress=True)
        scores = {**{f"rank-{rank}": score for rank, score in result.rank.items()}, "mAP": result.mean_ap}
        record, title = photo_record("similarity evaluate", config, data.query, gallery=data.gallery), data.query.name
    else:
        result = evaluate_retrieval(network.similarity, store, images, ks=config.ks, show_progress=True)
        scores = {**{f"recall@{k}": score for k, score in result.recall.items()}, "MAP@R": result.map_at_r}
        record, title = photo_record("similarity evaluate", config, images), images.name
    facts: dict[str, Any] = {"queries": result.queries, "skipped": result.skipped}
    if config.faithfulness:
        scores |= _faithfulness(config, network, images, size)
        facts |= {"pairs": config.faithfulness, "form": config.form}
    return record, title, scores, facts


def _faithfulness(
    config: SimilarityEvaluateConfig, network: LoadedSimilarity, images: LabelledImages, size: int
) -> _Scores:
    """Areas in percent of similarity 1; each pair counts once, with the mean of its two directions."""
    comparisons = draw_comparisons(images, count=config.faithfulness, seed=config.seed or 0)
    embedder = ImageEmbedder(network.backbone, network.similarity)
    found = pair_faithfulness(embedder, images, comparisons, size=size, kind=config.form, show_progress=True)
    scores: _Scores = {}
    for name, values in asdict(found).items():
        scores[f"{name} similarity" if name in ("whole", "blank") else name] = bootstrap_means(
            100 * values.mean(axis=1, keepdims=True)
        )[0]
    return scores


def similarity_explain(config: SimilarityExplainConfig) -> int:
    """Draw compared photos with their attention."""
    device = pick_device(config.device)
    network = open_network(config, device)
    embedder = ImageEmbedder(network.backbone, network.similarity).to(device)
    size = config.resolution or network.resolution or PHOTO_SIZE
    compared = 2 + NEGATIVES_NEEDED[config.form]
    record: dict[str, Any]
    if config.images is not None:
        photos = [read_photo(path) for path in config.images[:compared]]
        labels = [path.name for path in config.images[:compared]]
        figures = [_draw(config, embedder, photos, labels, size, config.out / "comparison.png")]
        record = {"verb": "similarity explain", "configuration": config.as_json(), "environment": environment()}
    else:
        images = photo_part(open_photos(config), config.part)
        figures = []
        for number, comparison in enumerate(draw_comparisons(images, count=config.count, seed=config.seed or 0)):
            positions = comparison[:compared]
            photos = [images.image(images.files[position]) for position in positions]
            labels = [images.labels[position] for position in positions]
            path = config.out / f"comparison-{number:04d}.png"
            figures.append(_draw(config, embedder, photos, labels, size, path))
        record = photo_record("similarity explain", config, images)
    page = config.out / "index.html"
    name = "frozen features" if config.model is None else str(config.model)
    section = Section(heading=f"{name}: attention of the score '{config.form}'", figures=figures)
    write_page(page, title="fewshot-seg similarity explain", sections=[section])
    write_json(config.out / RUN_NAME, record | {"results": {"pictures": [figure.path.name for figure in figures]}})
    print(f"{len(figures)} pictures: {page.resolve()}")
    return 0


def _draw(
    config: SimilarityExplainConfig,
    embedder: ImageEmbedder,
    photos: list[UInt8Array],
    labels: list[str],
    size: int,
    path: Path,
) -> Figure:
    title = f"what makes them alike, by the gradient of the score '{config.form}'"
    picture = comparison_picture(embedder, photos, kind=config.form, size=size, title=title, labels=labels)
    write_picture(path, picture)
    return Figure(path=path, caption=" / ".join(labels))
