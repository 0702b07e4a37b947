"""Held-out mIoU and best threshold of the training-free soft margin at several temperatures, on base classes only.

    python scripts/choose_temperature.py --root ../shared/data/VOCdevkit/VOC2012

For every test fold the next fold's classes are held out, photos are of the training split, and the threshold is the
best for each temperature: this places `fewshot_seg.priors.TEMPERATURE` without a look at any evaluation photo.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from episodes.protocols import get_protocol
from episodes.sources import VocSource
from fewshot_seg.backbones import build_backbone
from fewshot_seg.config import default_cache
from fewshot_seg.evaluation import choose_threshold
from fewshot_seg.fold_data import held_out_episodes, open_fold
from fewshot_seg.report import Table, text_table
from fewshot_seg.segmenter import training_free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--episodes", type=int, default=200, help="per fold")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    arguments = parser.parse_args()
    backbone = build_backbone()
    source = VocSource(arguments.root)
    columns = []
    for fold in range(4):
        data = open_fold(source, backbone, get_protocol("hsnet"), fold=fold, cache=arguments.cache)
        episodes = held_out_episodes(data, shots=1, count=arguments.episodes, seed=0)
        models = [training_free(backbone, temperature=temperature).eval() for temperature in arguments.temperatures]
        columns.append([choose_threshold(model, episodes) for model in models])
    rows = [
        [
            f"{temperature:g}",
            *(f"{miou:.1f} at {threshold:.2f}" for threshold, miou in values),
            f"{sum(miou for _, miou in values) / 4:.1f}",
        ]
        for temperature, values in zip(arguments.temperatures, zip(*columns, strict=True), strict=True)
    ]
    print(text_table(Table(header=["temperature", *(f"without fold {fold}" for fold in range(4)), "mean"], rows=rows)))


if __name__ == "__main__":
    main()
