"""Fixtures of the rivals' tests: small batches of made-up features, the same batch on demand in any number of shots."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from episodes.types import EpisodeSpec
from fewshot_seg.feature_episodes import FeatureBatch

MakeBatch = Callable[..., FeatureBatch]
CHANNELS, SIDES, SIZE = (5, 7), (8, 4), 32


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """make_batch(episodes=2, shots=1, seed=0): levels of 5 and 7 channels on 8 x 8 and 4 x 4, masks of 32 x 32.

    The object is a square at another place in every photo; its cells share a direction, so that it can be learnt.
    """

    def make(episodes: int = 2, shots: int = 1, seed: int = 0) -> FeatureBatch:
        generator = torch.Generator().manual_seed(seed)
        count = episodes * (1 + shots)
        masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
        for mask in masks:
            top, left = torch.randint(0, 4, (2,), generator=generator).mul(4).tolist()
            mask[top : top + 16, left : left + 16] = 1
            mask[:, -1] = 255
        levels = []
        for channels, side in zip(CHANNELS, SIDES, strict=True):
            noise = torch.randn(count, channels, side, side, generator=generator)
            objects = torch.nn.functional.adaptive_avg_pool2d((masks == 1).float()[:, None], side)
            direction = torch.ones(1, channels, 1, 1)
            levels.append(noise + 1.5 * objects * direction)
        supports, queries = slice(episodes, None), slice(0, episodes)
        support_masks = masks[supports].reshape(episodes, shots, SIZE, SIZE)
        specs = tuple(
            EpisodeSpec(
                class_id=1 + row % 2,
                support_ids=tuple(f"s{row}_{shot}" for shot in range(shots)),
                query_id=f"q{row}",
                seed=row,
            )
            for row in range(episodes)
        )
        return FeatureBatch(
            support_levels=tuple(level[supports] for level in levels),
            support_masks=support_masks,
            support_dense=torch.ones(episodes, shots, dtype=torch.bool),
            support_truth=support_masks,
            query_levels=tuple(level[queries] for level in levels),
            query_masks=masks[queries],
            specs=specs,
        )

    return make
