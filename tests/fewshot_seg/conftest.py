"""Fixtures of the model's tests: a tiny frozen backbone, a tiny synthetic data set, its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.index import ClassIndex, build_index
from episodes.sampler import EpisodeSampler
from episodes.sources import SyntheticSource
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.feature_episodes import CachedEpisodes
from fewshot_seg.features import FeatureStore, MaskStore

TINY_SIZE = 64


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """Random weights, frozen: strides 16 and 32 of 64 x 64 images give grids of 4 x 4 and 2 x 2."""
    return build_backbone("mobilenetv3_small_050", weights="random")


@pytest.fixture(scope="session")
def tiny_source() -> SyntheticSource:
    """64 x 64 pictures: classes 1-3 in ``train``, 4 and 5 in ``val``, six pictures each."""
    return SyntheticSource(base_classes=3, novel_classes=2, images_per_class=6, size=TINY_SIZE)


@pytest.fixture(scope="session")
def tiny_index(tiny_source: SyntheticSource) -> ClassIndex:
    """Index of the tiny source's ``train``."""
    return build_index(tiny_source, "train")


@pytest.fixture(scope="session")
def tiny_store(tiny_backbone: Backbone, tiny_source: SyntheticSource) -> FeatureStore:
    """Features in memory."""
    return FeatureStore(tiny_backbone, tiny_source, size=TINY_SIZE, directory=None)


@pytest.fixture(scope="session")
def tiny_masks(tiny_source: SyntheticSource) -> MaskStore:
    """Masks in memory."""
    return MaskStore(tiny_source, size=TINY_SIZE)


def write_photo(path: Path, look: int, *, size: tuple[int, int] | None = None) -> None:
    """A photo of 48 to 64 pixels a side: noisy stripes in colours that follow from `look`; else from its name."""
    random, own = np.random.default_rng([look]), np.random.default_rng([look, *path.name.encode()])
    width, height = size or (int(own.integers(48, 65)), int(own.integers(48, 65)))
    colours = random.integers(0, 256, (2, 3))
    stripes = (np.arange(width) // random.integers(3, 9) + own.integers(2)) % 2
    pixels = colours[np.broadcast_to(stripes, (height, width))] + own.integers(-60, 61, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def photo_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layout ``folders``: six classes in ``train``, four in ``test``, four photos each. Do not change it.

    Two classes at a time look alike, so that retrieval is neither perfect nor at chance.
    """
    root, names = tmp_path_factory.mktemp("birds"), ("auk", "booby", "crow", "dove", "eider", "finch")
    for split, classes in (("train", names), ("test", ("gull", "hawk", "ibis", "jay"))):
        for number, name in enumerate(classes):
            for photo in range(4):
                write_photo(root / split / name / f"{photo}.png", 10 * len(classes) + number // 2)
    return root


@pytest.fixture(scope="session")
def photo_persons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layout ``market1501``: persons 2, 7 and 9 to train on; 1, 3, 4 and 5 to find. Do not change it.

    One camera alone saw person 5, who cannot be found. Distractors and junk are in the gallery.
    """
    root = tmp_path_factory.mktemp("persons")
    photos = {
        "bounding_box_train": [(person, camera) for person in ("0002", "0007", "0009") for camera in (1, 2, 3)],
        "query": [("0001", 1), ("0003", 6), ("0004", 2), ("0005", 1)],
        "bounding_box_test": [
            *[(person, camera) for person in ("0001", "0003", "0004") for camera in (1, 2, 6)],
            *[("0005", 1), ("0000", 3), ("0000", 4), ("0000", 5), ("-1", 1), ("-1", 2)],
        ],
    }
    for folder, shown in photos.items():
        for number, (person, camera) in enumerate(shown):
            name = f"{person}_c{camera}s1_{number:06d}_01.png"
            write_photo(root / folder / name, abs(int(person)) + number % 2, size=(32, 64))
    return root


DrawEpisodes = Callable[..., CachedEpisodes]


@pytest.fixture(scope="session")
def draw_episodes(tiny_index: ClassIndex, tiny_store: FeatureStore, tiny_masks: MaskStore) -> DrawEpisodes:
    """Makes `CachedEpisodes` of ``train``: draw_episodes(length, shots=1, seed=0, mirror=False)."""

    def draw(length: int, *, shots: int = 1, seed: int = 0, mirror: bool = False) -> CachedEpisodes:
        specs = EpisodeSampler(
            tiny_index.pairs((1, 2, 3)), shots=shots, seed=seed, length=length, order="random", repeat_supports=False
        )
        return CachedEpisodes(tiny_store, tiny_masks, specs, mirror=mirror)

    return draw
