"""`fewshot-seg explain`: what made query and supports alike, drawn or scored."""

from __future__ import annotations

import sys

from episodes.episode_files import fingerprint_episodes
from episodes.fold_lists import evaluation_specs
from episodes.types import DataError
from fewshot_seg.config import ExplainConfig
from fewshot_seg.explainer_scores import ScoringRule, score_explainers
from fewshot_seg.explainer_table import score_tables, summarise
from fewshot_seg.explainers import EXPLAINERS
from fewshot_seg.explanation import write_explanations
from fewshot_seg.fold_data import FoldData
from fewshot_seg.method import Method, open_on_data
from fewshot_seg.photo_explanation import explain_files
from fewshot_seg.photos import find_queries
from fewshot_seg.predictors import USUAL_SIZE, method_for_photos
from fewshot_seg.report import Figure, Section, text_table, write_page
from fewshot_seg.runs import RUN_NAME, benchmark_name, run_record, title_of
from fewshot_seg.runtime import environment, write_json
from fewshot_seg.shipped import file_digest
from fewshot_seg.support_photos import read_supports

_LEGEND = (
    "Each picture has a row for the query and one for each support. query: attention, where the query looks like the "
    "supports' object rather than like their background (gradient of the similarity); like background, what speaks "
    "against; prior, the map that the decoder starts from. support: attention, which of its pixels made the query "
    "alike; like query, which of its pixels resemble what was found although they count as background there: where a "
    "support misleads, or at the border of its object.",
    "Every map is scaled by itself, from its least value (dark) to its largest (bright): colours compare places in one "
    "photo, not photos. A photo without the object has bright places, too; whether anything was found says the mask.",
)


def explain(config: ExplainConfig) -> int:
    """Draw episodes or photos with what made them alike, or score how faithful explainers are."""
    if config.query is not None:
        return _explain_photos(config)
    settings, rule = config.episodes, _scoring_rule(config)
    method, data = open_on_data(settings, show_progress=True)
    if config.score:
        return _score_explainers(config, rule, method, data)
    numbers = tuple(range(config.count)) if config.numbers is None else config.numbers
    longer = max(data.protocol.episodes, max(numbers) + 1)  # only where it does not change the episodes of later runs
    count = longer if data.protocol.repeats == 1 else None
    specs = evaluation_specs(data, shots=config.shots, count=count, seed=config.seed)
    if max(numbers) >= len(specs):
        asked = f"--count {config.count}" if config.numbers is None else f"--numbers {max(numbers)}"
        raise DataError(f"{asked}: the episodes of {data.protocol.name} are 0 to {len(specs) - 1}")
    written = write_explanations(
        method.segmenter,
        data.source,
        specs,
        numbers=numbers,
        resolution=data.resolution,
        folder=config.out,
        support=settings.support,
        fit=data.protocol.fit,
        scale=config.panel / 256,
        maps=True,
        show_progress=True,
    )
    page = config.out / "index.html"
    figures = [Figure(path=one.path, caption=f"{one.number}. {one.title}: IoU {one.iou:.0f}%") for one in written]
    section = Section(heading=f"{title_of(settings, data)}: {method.name}", paragraphs=_LEGEND, figures=figures)
    write_page(page, title="fewshot-seg explain", sections=[section])
    results = {"method": method.name, "episodes": [{"number": one.number, "iou": one.iou} for one in written]}
    write_json(config.out / RUN_NAME, run_record("explain", config, data) | {"results": results})
    print(f"{len(written)} pictures: {page.resolve()}")
    return 0


def _explain_photos(config: ExplainConfig) -> int:
    """One's own photos; 1 if some could not be read."""
    queries, supports = find_queries(config.query or ()), read_supports(config.support)
    method = method_for_photos(config)
    resolution = config.resolution or method.resolution or USUAL_SIZE
    written, failures = explain_files(
        method.segmenter,
        supports,
        queries,
        config.out,
        resolution=resolution,
        fit=method.fit,
        scale=config.panel / 256,
        show_progress=True,
    )
    page = config.out / "index.html"
    figures = [
        Figure(path=one.path, caption=f"{one.title}: marked {100 * one.share:.0f}% of the photo") for one in written
    ]
    write_page(
        page, title="fewshot-seg explain", sections=[Section(heading=method.name, paragraphs=_LEGEND, figures=figures)]
    )
    photos = [
        {
            "query": str(one.query),
            "class": one.name,
            "picture": one.path.name,
            "maps": one.maps.name,
            "share": one.share,
        }
        for one in written
    ]
    results = {"method": method.name, "photos": photos, "failures": failures, "resolution": resolution}
    record = {"verb": "explain", "configuration": config.as_json(), "environment": environment(), "results": results}
    write_json(config.out / RUN_NAME, record)
    print(f"{len(written)} pictures: {page.resolve()}")
    for failure in failures:
        print(f"fewshot-seg: skipped {failure}", file=sys.stderr)
    return 1 if failures else 0


def _scoring_rule(config: ExplainConfig) -> ScoringRule:
    return ScoringRule(
        explainers=config.explainers or tuple(EXPLAINERS), steps=config.score_steps, sanity_every=config.sanity_every
    )


def _score_explainers(config: ExplainConfig, rule: ScoringRule, method: Method, data: FoldData) -> int:
    longer = max(data.protocol.episodes, config.score_episodes) if data.protocol.repeats == 1 else None
    specs = evaluation_specs(data, shots=config.shots, count=longer, seed=config.seed)[: config.score_episodes]
    settings = config.episodes
    identity = {
        "method": method.name,
        "threshold": method.segmenter.threshold,
        "backbone": method.segmenter.backbone.fingerprint,
        "precision": str(method.segmenter.backbone.precision),
        # a path says nothing: something else may have been trained into it since
        "weights": [file_digest(one) for one in (method.model, config.similarity) if one is not None],
        "data": benchmark_name(data),
        "first_episode": fingerprint_episodes(specs[:1]),  # a later run may ask for more of them
    }
    records = score_explainers(
        method.segmenter,
        data.source,
        specs,
        config.out / "episodes.jsonl",
        rule=rule,
        resolution=data.resolution,
        identity=identity,
        support=settings.support,
        fit=data.protocol.fit,
        show_progress=True,
    )
    scores = summarise(records)
    results = {"method": method.name, "episodes": len(records), "resolution": data.resolution, "scores": scores}
    write_json(config.out / "scores.json", results)
    write_json(config.out / RUN_NAME, run_record("explain", config, data) | {"results": results})
    print(f"{title_of(settings, data)}, {len(records)} episodes at {data.resolution} pixels: {method.name}")
    for side, table in score_tables(scores).items():
        print(f"\n{side} side\n\n{text_table(table)}")
    print(f"\nper episode: {config.out / 'episodes.jsonl'}")
    return 0
