"""Does the trainable constraint help retrieval and the faithfulness of attention? Folders of labelled photos.

    python scripts/reproduce_retrieval.py --root ../shared/data/cub_subset

First every variant is trained without a third of the training classes and scored on them; of each domain of the mask,
the one with the highest MAP@R there is taken. Then metric loss alone and metric loss + constraint are trained on all
training classes with five seeds (three for masks on photos) and scored on the test classes. Writes the records of task
``retrieval`` in docs/results.json; finished cells are kept under --out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from render_results import merge_records, provenance, render
from scipy import stats

from fewshot_seg.backbones import build_backbone
from fewshot_seg.config import SimilarityTrainConfig
from fewshot_seg.embedding import ImageEmbedder
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.similarity import SimilarityNetwork
from fewshot_seg.similarity_evaluation import draw_comparisons, evaluate_retrieval, pair_faithfulness
from fewshot_seg.similarity_runs import PHOTO_SIZE, open_photos, open_store, photo_part, train_photos_configured

METRIC = "metric loss alone"
FEATURES = "mask on features"
PHOTOS = "mask on photos"
VARIANTS: dict[str, dict[str, Any]] = {
    METRIC: {},
    f"{FEATURES}, gamma 0.1": {"constraint": 0.1},
    f"{FEATURES}, gamma 0.3": {"constraint": 0.3},
    f"{FEATURES}, gamma 1": {"constraint": 1.0},
    f"{FEATURES}, gamma 0.3, triplet form": {"constraint": 0.3, "constraint_form": "triplet"},
    f"{FEATURES}, gamma 0.3, cosine form": {"constraint": 0.3, "constraint_form": "cosine"},
    f"{FEATURES}, gamma 0.3, sharpness 30": {"constraint": 0.3, "sharpness": 30.0},
    f"{FEATURES}, gamma 0.3, threshold 0.3": {"constraint": 0.3, "mask_threshold": 0.3},
    f"{FEATURES}, gamma 0.3, learned mask": {"constraint": 0.3, "learn_mask": True},
    f"{PHOTOS}, gamma 0.3": {"constraint": 0.3, "constraint_domain": "photos", "constraint_triples": 4},
    f"{PHOTOS}, gamma 1": {"constraint": 1.0, "constraint_domain": "photos", "constraint_triples": 4},
    "stride 32 alone, metric loss alone": {"strides": (32,)},
    f"stride 32 alone, {FEATURES}, gamma 0.3": {"strides": (32,), "constraint": 0.3},
}
"""What is tried, as changes of the default settings of `fewshot-seg similarity train`."""

SEARCH_PAIRS, TEST_PAIRS = 24, 32
SCORES = ("recall@1", "recall@2", "recall@4", "recall@8", "MAP@R", "deletion", "insertion")


def main() -> None:
    arguments = _arguments()
    work = partial(_cell, root=arguments.root, out=arguments.out, cache=arguments.cache, quick=arguments.quick)
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        pool.submit(work, ("test", "frozen features", 0)).result()  # computes the features, once
        tried = {
            (name, seed): pool.submit(work, ("search", name, seed)) for name in VARIANTS for seed in _search_seeds(name)
        }
        found = {place: future.result() for place, future in tried.items()}
        searched = {name: [found[name, seed] for seed in _search_seeds(name)] for name in VARIANTS}
        chosen = [METRIC, *(_best(searched, domain) for domain in (FEATURES, PHOTOS))]
        final = {(name, seed): pool.submit(work, ("test", name, seed)) for name in chosen for seed in _test_seeds(name)}
        tested = {name: [final[name, seed].result() for seed in _test_seeds(name)] for name in chosen}
        frozen = pool.submit(work, ("test", "frozen features", 0)).result()
    records = _table("held-out training classes", searched) + _table("test classes", tested)
    records += _table("test classes", {"frozen features": [frozen]})
    records += _differences(tested)
    common = {
        "task": "retrieval",
        "data": arguments.root.name,
        "fold": None,
        "shots": None,
        "support": None,
        **provenance(),
    }
    merge_records(arguments.results, [common | record for record in records], replace_tasks=("retrieval",))
    render(arguments.results, arguments.results.with_suffix(".md"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"), help="finished cells")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fewshot-seg")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--quick", action="store_true", help="a few steps and pairs, to try the script")
    return parser.parse_args()


def _cell(place: tuple[str, str, int], *, root: Path, out: Path, cache: Path, quick: bool) -> dict[str, float]:
    """Scores in percent of one training, by name."""
    stage, name, seed = place
    kept = out / stage / f"{name}-{seed}.json"
    if not kept.exists():
        changes = VARIANTS.get(name, {})
        config = SimilarityTrainConfig(
            data="folders", root=root, cache=cache, seed=seed, steps=4 if quick else 160, **changes
        )
        data, backbone = open_photos(config), build_backbone(strides=config.strides)
        store = open_store(data.train, backbone, config, size=PHOTO_SIZE)
        if name == "frozen features":
            similarity, seconds = SimilarityNetwork(backbone.channels, rank=0), 0.0
        else:
            part = photo_part(data, "kept" if stage == "search" else "train")
            similarity, result = train_photos_configured(part, store, backbone, config)
            seconds = result.seconds
        images = photo_part(data, "held-out" if stage == "search" else "test")
        scores = {"training seconds": seconds}
        retrieved = evaluate_retrieval(similarity, store, images)
        scores |= {f"recall@{k}": score[0] for k, score in retrieved.recall.items()}
        scores["MAP@R"] = retrieved.map_at_r[0]
        pairs = 2 if quick else SEARCH_PAIRS if stage == "search" else TEST_PAIRS
        comparisons = draw_comparisons(images, count=pairs, seed=seed)
        embedder = ImageEmbedder(backbone, similarity)
        kinds = {"": "margin"} | ({" in random order": "random"} if stage == "test" and name == METRIC else {})
        for suffix, kind in kinds.items():
            faithful = pair_faithfulness(embedder, images, comparisons, size=PHOTO_SIZE, kind=kind)  # type: ignore[arg-type]
            for mode in ("deletion", "insertion"):
                scores[mode + suffix] = faithful.normalised(mode)
        write_json(kept, scores)
        print(f"{stage}: {name}, seed {seed} done", flush=True)
    found: dict[str, float] = read_json(kept, what="finished cell")
    return found


def _search_seeds(name: str) -> tuple[int, ...]:
    """Two; one where every step passes photos through the backbone, which takes minutes."""
    return (0,) if name.startswith(PHOTOS) else (0, 1)


def _test_seeds(name: str) -> tuple[int, ...]:
    """Five; three where every step passes photos through the backbone."""
    return (0, 1, 2) if name.startswith(PHOTOS) else (0, 1, 2, 3, 4)


def _best(searched: Mapping[str, Sequence[Mapping[str, float]]], domain: str) -> str:
    candidates = [name for name in searched if name.startswith(domain)]
    return max(candidates, key=lambda name: statistics.mean(scores["MAP@R"] for scores in searched[name]))


def _table(classes: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    records = []
    for name, scores in runs.items():
        for metric in (*SCORES, "training seconds"):
            records.append(_record(classes, name, metric, [one[metric] for one in scores]))
        if "deletion in random order" in scores[0]:
            for mode in ("deletion", "insertion"):
                values = [one[f"{mode} in random order"] for one in scores]
                records.append(_record(classes, f"{name}, cells in random order", mode, values))
    return records


def _differences(tested: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Each constraint minus the metric loss alone, seed by seed."""
    records = []
    for name in list(tested)[1:]:
        for metric in SCORES:
            pairs = zip(tested[name], tested[METRIC], strict=False)  # the same seeds, in order
            values = [one[metric] - other[metric] for one, other in pairs]
            records.append(_record("test classes", f"difference: {name} - {METRIC}", metric, values))
    return records


def _record(classes: str, method: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with the 95% interval of Student's t; the photos are the same for all seeds."""
    record: dict[str, Any] = {"protocol": classes, "method": method, "metric": metric}
    record |= {"value": statistics.mean(values), "seeds": list(range(len(values))), "episodes": None}
    if len(values) > 2:  # two seeds give no interval worth printing
        half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
        record |= {"low": record["value"] - half, "high": record["value"] + half}
    return record


if __name__ == "__main__":
    main()
