"""What must not influence a training is changed, and the weights stay the same to the last bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from episodes.protocols import get_protocol
from episodes.sources import VocSource
from episodes.types import DataError
from fewshot_seg import cross_fitted_fold
from fewshot_seg.backbones import Backbone
from fewshot_seg.checkpoint import trained_tensors
from fewshot_seg.cross_fitted_fold import train_cross_fitted
from fewshot_seg.experiment import TrainedFold, train_fold
from fewshot_seg.fold_data import FoldData, held_out_episodes, open_fold, training_episodes
from fewshot_seg.segmenter import build_segmenter

NOVEL = (1, 2)
CORNER = (slice(0, 10), slice(0, 10))
Change = Callable[[Path], None]


def opened(root: Path, backbone: Backbone, protocol: str) -> FoldData:
    rules = replace(get_protocol(protocol), min_area=1)  # the pictures are small
    return open_fold(VocSource(root), backbone, rules, fold=0, resolution=64, validation_fold=3)


def trained(root: Path, backbone: Backbone, protocol: str, kind: str) -> tuple[dict[str, Tensor], float, FoldData]:
    """Weights and threshold of a short training."""
    data = opened(root, backbone, protocol)
    found: TrainedFold
    if kind == "joint":
        build = partial(build_segmenter, backbone, similarity_rank=3, decoder_width=8, seed=1)
        found = train_fold(build, data, steps=3, batch_size=4, validation_episodes=6, seed=2)
    else:
        found = train_cross_fitted(
            lambda classes: build_segmenter(backbone, similarity_rank=3, base_classes=classes),
            data,
            steps=2,
            batch_size=4,
            decoder_steps=3,
            decoder_episodes=((1, 6),),
            seed=2,
        )
    return trained_tensors(found.segmenter), found.segmenter.threshold, data


def scramble(file: Path) -> None:
    """Another photo of the same size."""
    with Image.open(file) as photo:
        size = photo.size
    noise = np.random.default_rng([*file.name.encode()]).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(noise).save(file, quality=80)


def relabel(file: Path, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    with Image.open(file) as opened_file:
        labels = np.array(opened_file)
    Image.fromarray(change(labels).astype(np.uint8)).save(file)


def scramble_the_evaluation(root: Path) -> None:
    """Every photo of it, and every label, within the classes of the data set."""
    for number, file in enumerate(sorted((root / "JPEGImages").glob("val_*.jpg"))):
        scramble(file)
        relabel(
            root / "SegmentationClassAug" / f"{file.stem}.png",
            lambda labels, by=number: np.where((labels > 0) & (labels < 255), (labels + by) % 20 + 1, labels),
        )


def erase_novel_labels(root: Path) -> None:
    for file in (root / "SegmentationClassAug").glob("trainaug_*.png"):
        relabel(file, lambda labels: np.where(np.isin(labels, NOVEL), 0, labels))


def swap_novel_labels(root: Path) -> None:
    for file in (root / "SegmentationClassAug").glob("trainaug_*.png"):
        relabel(file, lambda labels: np.where(labels == 1, 2, np.where(labels == 2, 5, labels)))


def ignore_novel_labels(root: Path) -> None:
    for file in (root / "SegmentationClassAug").glob("trainaug_*.png"):
        relabel(file, lambda labels: np.where(np.isin(labels, NOVEL), 255, labels))


def scramble_photos_with_novel_classes(root: Path) -> None:
    for file in (root / "SegmentationClassAug").glob("trainaug_*.png"):
        with Image.open(file) as labels:
            shown = set(np.unique(np.array(labels)).tolist())
        if shown & set(NOVEL):
            scramble(root / "JPEGImages" / f"{file.stem}.jpg")
            relabel(file, lambda labels: np.where(labels == 17, 6, labels))


CASES: list[tuple[str, str, Change]] = [
    ("hsnet", "joint", scramble_the_evaluation),
    ("hsnet", "cross-fitted", scramble_the_evaluation),
    ("bam", "joint", scramble_the_evaluation),
    ("repri", "cross-fitted", scramble_the_evaluation),
    ("hsnet", "joint", erase_novel_labels),
    ("hsnet", "cross-fitted", swap_novel_labels),
    ("repri", "joint", swap_novel_labels),
    ("repri", "cross-fitted", ignore_novel_labels),
    ("bam", "joint", scramble_photos_with_novel_classes),
    ("bam", "cross-fitted", scramble_photos_with_novel_classes),
]


@pytest.fixture(autouse=True)
def _quick_base_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(cross_fitted_fold.train_base_learner, steps=5, batch_size=32)
    monkeypatch.setattr(cross_fitted_fold, "train_base_learner", quick)


@pytest.fixture(scope="module")
def base_runs() -> dict[tuple[str, str], tuple[dict[str, Tensor], float]]:
    return {}


@pytest.mark.parametrize(("protocol", "kind", "change"), CASES)
def test_the_weights_are_the_same_to_the_last_bit(
    tmp_path: Path,
    shared_voc: Path,
    tiny_backbone: Backbone,
    base_runs: dict[tuple[str, str], tuple[dict[str, Tensor], float]],
    protocol: str,
    kind: str,
    change: Change,
) -> None:
    if (protocol, kind) not in base_runs:
        base_runs[protocol, kind] = trained(shared_voc, tiny_backbone, protocol, kind)[:2]
    weights, threshold = base_runs[protocol, kind]
    root = tmp_path / "VOC2012"
    shutil.copytree(shared_voc, root)
    change(root)
    changed, its_threshold, data = trained(root, tiny_backbone, protocol, kind)
    assert its_threshold == threshold
    assert [name for name in weights if not torch.equal(weights[name], changed[name])] == []
    record = data.guard.record()
    assert record["training"]["episodes"] > 0
    assert not set(record["training"]["classes"]) & set(NOVEL)


def test_the_oracle_sees_a_leak(tmp_path: Path, shared_voc: Path, tiny_backbone: Backbone) -> None:
    """The same change under a protocol that allows it does change the weights: the test above can fail."""
    weights = trained(shared_voc, tiny_backbone, "hsnet", "joint")[0]
    root = tmp_path / "VOC2012"
    shutil.copytree(shared_voc, root)
    scramble_photos_with_novel_classes(root)
    changed = trained(root, tiny_backbone, "hsnet", "joint")[0]
    assert any(not torch.equal(weights[name], changed[name]) for name in weights)


def test_choices_keep_to_the_rules_of_the_training(shared_voc: Path, tiny_backbone: Backbone) -> None:
    """BAM's protocol trains on no photo that shows a novel class; thresholds are not chosen on one either."""
    data = opened(shared_voc, tiny_backbone, "bam")
    assert set(data.choices.novel) >= {16, 17}
    episodes = held_out_episodes(data, shots=1, count=40, seed=0)
    for batch in episodes.batches(8):
        for spec in batch.specs:
            for image_id in (*spec.support_ids, spec.query_id):
                assert not set(data.training_index.areas[image_id]) & set(data.split.novel)
    assert data.guard.record()["choices"]["episodes"] == 40


def test_the_record_of_a_resumed_run_is_that_of_a_run_in_one_go(
    tmp_path: Path, shared_voc: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all that a group trained is there already: the guard looks at it again."""

    def run(**more: Any) -> Any:
        data = opened(shared_voc, tiny_backbone, "hsnet")
        train_cross_fitted(
            lambda classes: build_segmenter(tiny_backbone, similarity_rank=3, base_classes=classes),
            data,
            **{"steps": 2, "batch_size": 4, "decoder_steps": 3, "decoder_episodes": ((1, 6), (2, 4))},
            **{"known_episodes": ((1, 5),), "seed": 2, "folder": tmp_path, **more},
        )
        return data.guard.record()

    record = run()
    monkeypatch.setattr(cross_fitted_fold, "priors_of_episodes", None)  # they are in the folder
    assert run(resume=True) == record
    assert record["training"]["episodes"] == 4 * 2 * 4 + 3 * (6 + 4) + 5


def test_training_on_a_photo_of_the_evaluation_stops(tiny_voc: Path, tiny_backbone: Backbone) -> None:
    photos = tiny_voc / "JPEGImages"
    for number in range(4):
        shutil.copy(photos / "val_01_0.jpg", photos / f"trainaug_06_{number}.jpg")
    data = opened(tiny_voc, tiny_backbone, "hsnet")
    with pytest.raises(DataError, match=r"leak: .*the same photo as .*val_01_0\.jpg of the evaluation"):
        training_episodes(data, data.split, shots=1, count=60, seed=0)
