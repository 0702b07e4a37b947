"""Score our attention and its rivals as explanations on the novel classes of PASCAL-5i: deletion, insertion, and so on.

    python scripts/reproduce_explainers.py --root ../shared/data/VOCdevkit/VOC2012

Writes the records of task ``explainers`` in docs/results.json, from 125 episodes of each fold, the same for all
explainers. The model is the training-free soft margin over the default backbone at --resolution pixels: a few hundred
passes an episode. Interrupted runs go on where they stopped: finished episodes are kept under --out. A good part of
the time is the kernel's, for memory that is given back and taken again; the environment variables
MALLOC_MMAP_THRESHOLD_=4000000000 and MALLOC_TRIM_THRESHOLD_=8000000000 spare it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from render_results import merge_records, provenance, render

from episodes.episode_files import fingerprint_episodes
from episodes.fold_lists import evaluation_specs
from episodes.protocols import get_protocol
from episodes.sources import VocSource
from fewshot_seg.backbones import build_backbone
from fewshot_seg.config import default_cache
from fewshot_seg.explainer_scores import ScoringRule, score_explainers
from fewshot_seg.explainer_table import Bounds, score_tables, summarise
from fewshot_seg.fold_data import open_fold
from fewshot_seg.method import SOFT_MARGIN_THRESHOLD
from fewshot_seg.report import text_table
from fewshot_seg.runs import benchmark_name
from fewshot_seg.runtime import write_json
from fewshot_seg.segmenter import training_free

EPISODES = 125
"""Of each fold; a run of fewer (--episodes) takes the first of these."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--out", type=Path, default=Path("runs/explainers"), help="finished episodes and scores")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--resolution", type=int, default=192, help="side of the square photos")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of each fold, the first of those of the table")
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--quick", action="store_true", help="two episodes a fold, to try the script")
    arguments = parser.parse_args()
    if arguments.quick:  # neither kept episodes nor published records may come from a trial
        arguments.out = arguments.out / "quick"
        arguments.results = arguments.out / "results.json"
    torch.set_num_threads(1)
    backbone = build_backbone()
    segmenter = training_free(backbone, threshold=SOFT_MARGIN_THRESHOLD).eval()
    source, rule = VocSource(arguments.root), ScoringRule(sanity_every=1 if arguments.quick else 5)
    found: list[dict[str, Any]] = []
    for fold in range(4):
        data = open_fold(source, backbone, get_protocol("hsnet"), fold=fold, cache=arguments.cache)
        specs = evaluation_specs(data, shots=1)[:EPISODES]
        asked = specs[: 2 if arguments.quick else arguments.episodes]
        found += score_explainers(
            segmenter,
            source,
            asked,
            arguments.out / f"fold{fold}.jsonl",
            rule=rule,
            resolution=arguments.resolution,
            identity={"fold": fold, "episodes": fingerprint_episodes(specs), "data": benchmark_name(data)},
            show_progress=True,
        )
    scores = summarise(found)
    write_json(arguments.out / "scores.json", scores)
    for side, table in score_tables(scores).items():
        print(f"{side} side\n\n{text_table(table)}\n")
    common = {
        "data": benchmark_name(data),
        "protocol": data.protocol.name,
        "support": "mask",
        "shots": 1,
        "seeds": [data.protocol.seed],
        "resolution": arguments.resolution,
        **provenance(),
    }
    merge_records(arguments.results, [common | one for one in records_of(scores, found)], replace_tasks=("explainers",))
    render(arguments.results, arguments.results.with_suffix(".md"))


def records_of(scores: Mapping[str, Mapping[str, Bounds]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records for docs/results.json; passes have no interval."""
    sane = sum(any("sanity" in one["query"] for one in episode["explainers"].values()) for episode in found)
    records = []
    for name, row in scores.items():
        for metric, (value, low, high) in row.items():
            record = {"task": "explainers", "fold": "mean", "method": name, "metric": metric, "value": value}
            record["episodes"] = sane if metric.endswith("sanity") else len(found)
            if metric not in ("forward", "backward"):
                record |= {"low": low, "high": high}
            records.append(record)
    return records


if __name__ == "__main__":
    main()
