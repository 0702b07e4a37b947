"""Fixtures of the model's tests: a tiny frozen backbone, a tiny synthetic data set, its features."""

from __future__ import annotations

from collections.abc import Callable

import pytest

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
