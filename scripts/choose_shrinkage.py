"""What looks like an object in photos of classes that nothing was fitted to: linear classifiers and a network.

    python scripts/choose_shrinkage.py --root ../shared/data/VOCdevkit/VOC2012

For every test fold the next fold's classes are held out, photos are of the training split, and all is fitted or trained
on the two other folds' classes. Each photo is cut at the one threshold that is best for the method, and compared with
the mask of its class: this places `fewshot_seg.objectness.SHRINKAGE` without a look at any evaluation photo.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from general_model import BYTES
from reproduce_supports import MIX
from weight_runs import BACKBONE

from episodes.protocols import get_protocol
from episodes.sources import VocSource
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.config import default_cache
from fewshot_seg.cross_fitting import train_embedding
from fewshot_seg.episode_logits import ShotLogits
from fewshot_seg.evaluation import choose_logit_thresholds
from fewshot_seg.feature_episodes import FeatureBatch
from fewshot_seg.fold_data import FoldData, class_cells, held_out_episodes, open_fold, training_episodes
from fewshot_seg.objectness import ObjectClassifier
from fewshot_seg.report import Table, text_table
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.similarity import join_levels

NETWORK = "completion's network"
_BATCH = 8


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = _parse(given)
    backbone, source = build_backbone(**BACKBONE), VocSource(arguments.root)
    per_fold = [_of_fold(fold, backbone, source, arguments) for fold in arguments.folds]
    rows = []
    for name in per_fold[0]:
        values = [found[name][1] for found in per_fold]
        rows.append([name, *(f"{value:.1f}" for value in values), f"{sum(values) / len(values):.1f}"])
    columns = [f"without fold {fold}" for fold in arguments.folds]
    print(text_table(Table(header=["method", *columns, "mean"], rows=rows)))


def _of_fold(
    fold: int, backbone: Backbone, source: VocSource, arguments: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Threshold and mIoU by method."""
    protocol = get_protocol("hsnet", "pascal")
    data = open_fold(source, backbone, protocol, fold=fold, cache=arguments.cache, byte_budget=BYTES)
    cells, shares = class_cells(data, show_progress=True).of(data.choices.base)
    linear = {f"shrinkage {one:g}": ObjectClassifier(feature_channels=cells.shape[1]) for one in arguments.shrinkages}
    for classifier, shrinkage in zip(linear.values(), arguments.shrinkages, strict=True):
        classifier.fit(cells, shares, shrinkage=shrinkage)
    network = _trained(data, arguments.steps) if arguments.steps else None
    drawn = held_out_episodes(data, shots=1, count=arguments.episodes, seed=0)
    return choose_logit_thresholds(partial(_read, linear, network), drawn, show_progress=True)


def _trained(data: FoldData, steps: int) -> FewShotSegmenter:
    """A model whose completion learned from all kinds of supports of the base classes that are not held out."""
    segmenter = build_segmenter(data.backbone, completion=True)
    drawn = training_episodes(data, data.choices, shots=1, count=steps * _BATCH, seed=0, supports=MIX)
    train_embedding(segmenter, drawn, steps=steps, batch_size=_BATCH, show_progress=True)
    return segmenter.eval()


@torch.no_grad()
def _read(
    linear: Mapping[str, ObjectClassifier],
    network: FewShotSegmenter | None,
    batch: FeatureBatch,
    size: tuple[int, int],
) -> ShotLogits:
    """Every method's map of the queries; no support is looked at."""
    frozen = join_levels(batch.query_levels)
    maps = {name: classifier(frozen) for name, classifier in linear.items()}
    if network is not None:
        maps[NETWORK] = network.objectness(network.similarity.turn(frozen), frozen)
    heads = {
        name: F.interpolate(one[:, None], size, mode="bilinear", align_corners=False) for name, one in maps.items()
    }
    return ShotLogits(heads=heads, weights=torch.ones(len(frozen), 1), rule="pooled")


def _parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--folds", type=int, nargs="+", choices=range(4), default=list(range(4)))
    parser.add_argument("--episodes", type=int, default=200, help="photos per fold")
    parser.add_argument("--shrinkages", type=float, nargs="+", default=[0.1, 0.3, 1, 3, 10, 1000])
    parser.add_argument("--steps", type=int, default=160, help="of training the network; 0 leaves it out")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
