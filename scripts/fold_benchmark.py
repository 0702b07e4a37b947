"""Train and evaluate all folds of a benchmark with its ablations: what reproduce_pascal and reproduce_coco share.

Interrupted runs go on where they stopped: finished cells are kept under --out. docs/results.md is then written by
scripts/render_results.py, which this calls at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from render_results import fold_means, merge_records, provenance, render

from episodes.episode_files import fingerprint_episodes
from episodes.protocols import get_protocol
from episodes.sources import CocoSource, VocSource
from episodes.types import FoldedDataset, MaskSource, SupportKind
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.checkpoint import save_segmenter
from fewshot_seg.config import default_cache
from fewshot_seg.decoder import Decoder, PriorReadout
from fewshot_seg.evaluation import Evaluation, choose_thresholds, evaluate_heads
from fewshot_seg.experiment import train_fold
from fewshot_seg.fold_data import FoldData, evaluation_episodes, held_out_episodes, open_fold
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.runs import benchmark_name
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free

OURS = "ours: decoder on our prior maps"
PFENET = "decoder on PFENet's prior"
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: {"prior": "similarity"},
    PFENET: {"prior": "pfenet"},
    "decoder on features and prototype, no prior": {"prior": "none", "appearance": 32},
    "ours + appearance features": {"prior": "similarity", "appearance": 16},
}
READOUTS: dict[str, Decoder] = {
    "gradient attention alone": PriorReadout(PRIOR_CHANNELS.index("gradient attention"), scaled=True),
    "soft margin alone": PriorReadout(PRIOR_CHANNELS.index("soft margin")),
}
HELD_OUT_EPISODES = 200


@dataclass(frozen=True)
class Benchmark:
    """What is run: `dataset` names the folds; `variants` are those of `VARIANTS` by name."""

    dataset: FoldedDataset
    variants: tuple[str, ...]
    shots: tuple[int, ...]

    def open(self, root: Path, backbone: Backbone, fold: int, cache: Path) -> FoldData:
        """The data of a fold."""
        source: MaskSource = VocSource(root) if self.dataset == "pascal" else CocoSource(root)
        return open_fold(source, backbone, get_protocol("hsnet", self.dataset), fold=fold, cache=cache)


def run_benchmark(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """All folds, then the records and the page."""
    work = partial(_fold, benchmark=benchmark, root=arguments.root, out=arguments.out, cache=arguments.cache)
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    # features first, in one process: two would compute the same ones
    data = benchmark.open(arguments.root, build_backbone(), 0, arguments.cache)
    data.store.ensure([*data.training_index.image_ids, *data.evaluation_index.image_ids], show_progress=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        per_fold = list(pool.map(partial(work, quick=arguments.quick), range(4)))
    common = {
        "data": benchmark_name(data),
        "protocol": data.protocol.name,
        "support": "mask",
        "seeds": [data.protocol.seed],
        **provenance(),
    }
    records = [common | record for fold in per_fold for record in fold]
    merge_records(arguments.results, [*records, *fold_means(records)])
    render(arguments.results, arguments.results.with_suffix(".md"))


def parse_arguments(description: str, *, root: str, out: Path) -> argparse.Namespace:
    """Arguments of a benchmark's script; `root` says which folder that is, `out` is the default of --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help=root)
    parser.add_argument("--out", type=Path, default=out, help="models and finished cells")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--jobs", type=int, default=2, help="folds at a time")
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--quick", action="store_true", help="a few steps and episodes, to try the script")
    arguments = parser.parse_args()
    if arguments.quick:  # neither kept cells nor published records may come from a trial
        arguments.out = arguments.out / "quick"
        arguments.results = arguments.out / "results.json"
    return arguments


def _fold(fold: int, *, benchmark: Benchmark, root: Path, out: Path, cache: Path, quick: bool) -> list[dict[str, Any]]:
    data = benchmark.open(root, build_backbone(), fold, cache)
    folder = out / f"fold{fold}"
    cells = {"training-free": partial(_training_free, data, quick)}
    cells |= {name: partial(_variant, name, data, folder, benchmark.shots, quick) for name in benchmark.variants}
    records: list[dict[str, Any]] = []
    for name, compute in cells.items():
        kept = folder / f"{name}.json"
        if not kept.exists():
            write_json(kept, compute())
            print(f"fold {fold}: {name} done", flush=True)
        records += read_json(kept, what="finished cell")
    return [record | {"fold": fold} for record in records]


def _variant(name: str, data: FoldData, folder: Path, shots: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    build = partial(build_segmenter, data.backbone, decoder_width=48, decoder_blocks=4, **VARIANTS[name])
    steps = 6 if quick else 160
    trained = train_fold(
        build,
        data,
        steps=steps,
        validation_episodes=20 if quick else HELD_OUT_EPISODES,
        folder=folder / name,
        resume=True,
    )
    assert trained.selection is not None
    assert trained.held_out_miou is not None
    notes = {
        "source": data.source.name,
        "protocol": data.protocol.name,
        "fold": data.fold,
        "base_classes": data.split.base,
        "novel_classes": data.split.novel,
        "fingerprint": data.fingerprint,
        "variant": name,
    }
    model = folder / name / "model.safetensors"
    save_segmenter(model, trained.segmenter, backbone_weights="embedded", resolution=data.resolution, notes=notes)
    heads: dict[str, tuple[Decoder, float]] = {name: (trained.segmenter.decoder, trained.segmenter.threshold)}
    if name == OURS:
        drawn = held_out_episodes(data, shots=1, count=20 if quick else HELD_OUT_EPISODES, seed=0)
        chosen = choose_thresholds(trained.selection, READOUTS, drawn)
        heads |= {f"{key}, trained": (READOUTS[key], threshold) for key, (threshold, _) in chosen.items()}
    records = scored(trained.segmenter, heads, data, quick, shots)
    timing = folder / name / "timing.json"  # a resumed run only knows its own last part
    if len(trained.result.losses) == steps:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        write_json(timing, {"seconds": trained.result.seconds, "peak": peak})
    measured = read_json(timing, what="timing") if timing.exists() else None
    base = {"shots": 1, "method": name, "episodes": HELD_OUT_EPISODES}
    return [
        *records,
        base | {"task": "selection", "metric": "held-out base mIoU", "value": trained.held_out_miou},
        *([] if measured is None else _speed(base, steps, **measured)),
    ]


def _speed(base: dict[str, Any], steps: int, *, seconds: float, peak: float) -> list[dict[str, Any]]:
    return [
        base | {"task": "speed", "metric": f"training seconds ({steps} steps, warm, one thread)", "value": seconds},
        base | {"task": "speed", "metric": "peak memory of the process up to the end of training, GiB", "value": peak},
    ]


def _training_free(data: FoldData, quick: bool) -> list[dict[str, Any]]:
    segmenter = training_free(data.backbone)
    drawn = held_out_episodes(data, shots=1, count=20 if quick else HELD_OUT_EPISODES, seed=0)
    chosen = choose_thresholds(segmenter, READOUTS, drawn)
    heads = {f"{key}, training-free": (READOUTS[key], threshold) for key, (threshold, _) in chosen.items()}
    return scored(segmenter, heads, data, quick, (1,))


def scored(
    segmenter: FewShotSegmenter,
    heads: dict[str, tuple[Decoder, float]],
    data: FoldData,
    quick: bool,
    shots: Sequence[int],
    support: SupportKind = "mask",
) -> list[dict[str, Any]]:
    """Records of several heads of a model over the novel classes' episodes."""
    records = []
    for shot_count in shots:
        drawn = evaluation_episodes(data, shots=shot_count, count=20 if quick else None, support=support)
        scored = evaluate_heads(
            segmenter.eval(), heads, drawn, scoring_size=data.protocol.scoring_size, source=data.source
        )
        for method, evaluation in scored.items():
            records += records_of(method, shot_count, evaluation, data)
    return records


def records_of(method: str, shots: int, evaluation: Evaluation, data: FoldData) -> list[dict[str, Any]]:
    """Records of one method's evaluation, also per class."""
    result = evaluation.result
    base = {"task": "segmentation", "shots": shots, "method": method, "episodes": result.episodes}
    base["episodes_fingerprint"] = fingerprint_episodes(evaluation.specs)
    names = data.source.class_names
    return [
        base | {"metric": "mIoU", "value": result.miou, "low": result.miou_low, "high": result.miou_high},
        base | {"metric": "FB-IoU", "value": result.fb_iou, "low": result.fb_iou_low, "high": result.fb_iou_high},
        *(base | {"metric": f"IoU: {names[class_id]}", "value": iou} for class_id, iou in result.per_class.items()),
    ]
