"""Score every attention form on novel classes of PASCAL-5i, before and after training the similarity network.

    python scripts/reproduce_priors.py --root ../shared/data/VOCdevkit/VOC2012

Writes the records of task ``prior`` in docs/results.json. Interrupted runs go on where they stopped: finished cells
are kept under --out, and a network can be used elsewhere (`fewshot-seg predict --similarity`).
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

from episodes.protocols import get_protocol
from episodes.sources import VocSource
from fewshot_seg.attention import ATTENTION_KINDS
from fewshot_seg.backbones import build_backbone
from fewshot_seg.checkpoint import load_similarity
from fewshot_seg.config import SimilarityTrainConfig
from fewshot_seg.fold_data import FoldData, evaluation_episodes, held_out_episodes, open_fold
from fewshot_seg.prior_evaluation import evaluate_priors
from fewshot_seg.runs import benchmark_name
from fewshot_seg.runtime import pick_device, read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter, training_free
from fewshot_seg.similarity_runs import SIMILARITY_NAME, run_similarity_training

STATES: dict[str, dict[str, Any] | None] = {
    "untrained": None,
    "trained on all maps": {},
    "trained on the soft margin alone": {"maps": ("soft margin",)},
    "trained on the soft margin and its gradient": {"maps": ("soft margin", "soft margin gradient")},
    "trained on regions (multi-similarity)": {"map_weight": 0.0, "metric_weight": 1.0},
}
"""What the network was trained with, as changes of the default settings of `fewshot-seg similarity train`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--out", type=Path, default=Path("runs/priors"), help="networks and finished cells")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fewshot-seg")
    parser.add_argument("--jobs", type=int, default=2, help="folds at a time")
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--quick", action="store_true", help="a few steps and episodes, to try the script")
    arguments = parser.parse_args()
    protocol = get_protocol("hsnet")
    # features first, in one process: two would compute the same ones
    data = open_fold(
        VocSource(arguments.root), build_backbone(), protocol, fold=0, cache=arguments.cache, show_progress=True
    )
    data.store.ensure([*data.training_index.image_ids, *data.evaluation_index.image_ids], show_progress=True)
    work = partial(_cell, root=arguments.root, out=arguments.out, cache=arguments.cache, quick=arguments.quick)
    cells = [(state, fold) for state in STATES for fold in range(4)]
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        found = list(pool.map(work, cells))
    common = {
        "data": benchmark_name(data),
        "protocol": protocol.name,
        "support": "mask",
        "shots": 1,
        "seeds": [protocol.seed],
        **provenance(),
    }
    records = [common | record for cell in found for record in cell]
    merge_records(arguments.results, [*records, *fold_means(records)], replace_tasks=("prior", "prior, held-out base"))
    render(arguments.results, arguments.results.with_suffix(".md"))


def _cell(place: tuple[str, int], *, root: Path, out: Path, cache: Path, quick: bool) -> list[dict[str, Any]]:
    state, fold = place
    folder = out / f"fold{fold}" / state
    kept = folder / "scores.json"
    if not kept.exists():
        backbone = build_backbone()
        data = open_fold(VocSource(root), backbone, get_protocol("hsnet"), fold=fold, cache=cache)
        changes = STATES[state]
        records = []
        for held_out in (True, False):
            segmenter = training_free(backbone)
            if changes is not None:
                where = folder / ("held-out" if held_out else "network")
                segmenter = _trained(changes, where, fold, root, cache, held_out=held_out, quick=quick)
            records += _scores(segmenter, data, state, held_out=held_out, quick=quick)
        write_json(kept, records)
        print(f"fold {fold}: {state} done", flush=True)
    return [record | {"fold": fold} for record in read_json(kept, what="finished cell")]


def _trained(
    changes: dict[str, Any], folder: Path, fold: int, root: Path, cache: Path, *, held_out: bool, quick: bool
) -> FewShotSegmenter:
    config = SimilarityTrainConfig(
        data="voc",
        root=root,
        fold=fold,
        cache=cache,
        out=folder,
        held_out=held_out,
        steps=4 if quick else 160,
        resume=True,
        **changes,
    )
    run_similarity_training(config, device=pick_device("cpu"))
    loaded = load_similarity(folder / SIMILARITY_NAME)
    return training_free(loaded.backbone, similarity=loaded.similarity)


def _scores(
    segmenter: FewShotSegmenter, data: FoldData, state: str, *, held_out: bool, quick: bool
) -> list[dict[str, Any]]:
    """Novel classes by the protocol; and the held-out base classes, on which choices are made."""
    if held_out:
        drawn, task = held_out_episodes(data, shots=1, count=20 if quick else 200, seed=0), "prior, held-out base"
    else:
        drawn, task = evaluation_episodes(data, shots=1, count=20 if quick else None), "prior"
    records = []
    for name, score in evaluate_priors(segmenter.eval(), drawn, kinds=ATTENTION_KINDS).items():
        base = {"task": task, "method": f"{name}, {state}", "episodes": score.episodes}
        for metric, bounds in (("AUC", score.auc), ("best-IoU", score.best_iou)):
            value, low, high = (100 * bound for bound in bounds)
            records.append(base | {"metric": metric, "value": value, "low": low, "high": high})
    return records


if __name__ == "__main__":
    main()
