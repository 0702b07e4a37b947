from __future__ import annotations

import pickle
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from episodes.augment import EpisodeTransform
from episodes.types import DataError

PRESETS = ("none", "flip", "standard")
presets = st.sampled_from(PRESETS)


def picture(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = draw.choice(np.array([0, 1, 255], dtype=np.uint8), (height, width))
    return image, mask


@settings(max_examples=40, deadline=None)
@given(presets, st.integers(8, 90), st.integers(8, 90), st.integers(8, 64), st.integers(0, 2**62))
def test_shapes_types_and_mask_values(preset: str, height: int, width: int, size: int, seed: int) -> None:
    image, mask = picture(height, width, seed % 1000)
    before = image.copy(), mask.copy()
    tensor, label = EpisodeTransform(preset, size)(image, mask, seed=seed)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (3, size, size))
    assert (label.dtype, tuple(label.shape)) == (torch.uint8, (size, size))
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert set(label.unique().tolist()) <= {0, 1, 255}
    np.testing.assert_array_equal(before[0], image)
    np.testing.assert_array_equal(before[1], mask)


@settings(max_examples=30, deadline=None)
@given(presets, st.integers(0, 2**62))
def test_image_and_mask_move_together(preset: str, seed: int) -> None:
    # The image shows its own mask, so that wherever the mask goes the image must go too.
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[10:35, 8:30] = 1
    mask[40:55, 50:75] = 1
    image = np.repeat((mask * 200 + 20)[..., None], 3, axis=2)
    tensor, label = EpisodeTransform(preset, 64)(image, mask, seed=seed)
    bright = tensor.mean(dim=0) > 0.5 * (tensor.mean(dim=0).min() + tensor.mean(dim=0).max())
    assert (bright == (label == 1)).float().mean() > 0.97


@settings(max_examples=20, deadline=None)
@given(presets, st.integers(0, 2**62), st.integers(0, 2**62))
def test_result_depends_on_the_seed_alone(preset: str, seed: int, other: int) -> None:
    image, mask = picture(40, 50, 1)
    fresh, used = EpisodeTransform(preset, 32), EpisodeTransform(preset, 32)
    used(image, mask, seed=other)
    np.random.seed(other % 2**32)  # noqa: NPY002  the global state must not matter
    random.seed(other)
    for one, two in zip(fresh(image, mask, seed=seed), used(image, mask, seed=seed), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("preset", PRESETS)
def test_global_random_states_are_left_alone(preset: str) -> None:
    image, mask = picture(40, 50, 1)
    transform = EpisodeTransform(preset, 32)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    transform(image, mask, seed=9)
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_none_squashes_like_pillow() -> None:
    # A smooth picture, enlarged: bilinear of an independent library with the same pixel-centre convention.
    y, x = np.mgrid[0:20, 0:30]
    image = np.stack([4 * x, 6 * y, 2 * x + 3 * y], axis=2).astype(np.uint8)
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[5:11, 6:16] = 1
    tensor, label = EpisodeTransform("none", 60)(image, mask, seed=0)
    expected = np.asarray(Image.fromarray(image).resize((60, 60), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=2 / 255)
    np.testing.assert_array_equal(label.numpy(), mask.repeat(3, axis=0).repeat(2, axis=1))


def test_none_averages_when_it_shrinks() -> None:
    # A fine checkerboard becomes its mean; plain bilinear would alias.
    image = np.repeat((np.indices((96, 96)).sum(axis=0) % 2 * 255)[..., None], 3, axis=2).astype(np.uint8)
    tensor, _ = EpisodeTransform("none", 16)(image, np.zeros((96, 96), np.uint8), seed=0)
    assert (tensor - 0.5).abs().max() < 0.01


def test_none_ignores_the_seed_and_flip_mirrors_half() -> None:
    image, mask = picture(32, 32, 5)
    plain, flip = EpisodeTransform("none", 32), EpisodeTransform("flip", 32)
    straight, label = plain(image, mask, seed=0)
    assert torch.equal(straight, plain(image, mask, seed=77)[0])
    mirrored = 0
    for seed in range(100):
        moved, moved_label = flip(image, mask, seed=seed)
        if torch.equal(moved, straight.flip(-1)):
            mirrored += 1
            assert torch.equal(moved_label, label.flip(-1))
        else:
            assert torch.equal(moved, straight)
    assert 30 <= mirrored <= 70


def test_crop_keeps_a_small_object() -> None:
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[2:14, 84:96] = 1  # in a corner: a blind crop loses it most of the time
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    standard = EpisodeTransform("standard", 64)
    shares = [(standard(image, mask, seed=seed)[1] == 1).float().mean().item() for seed in range(60)]
    assert min(shares) >= 0.5 * mask.mean()
    assert len(set(shares)) > 5


def test_mirroring_does_not_fix_the_crop() -> None:
    # With one seed for every step, all mirrored pictures would start at the same crop position.
    image = np.repeat(np.tile(np.arange(100, dtype=np.uint8), (100, 1))[..., None], 3, axis=2)
    standard = EpisodeTransform("standard", 32)
    middles = {True: [], False: []}  # type: dict[bool, list[float]]
    for seed in range(80):
        tensor, _ = standard(image, np.zeros((100, 100), np.uint8), seed=seed)
        row = tensor.mean(dim=(0, 1))
        middles[bool(row[0] > row[-1])].append(float(row.mean()))
    for values in middles.values():
        assert len(values) > 20
        assert np.std(values) > 0.02
        assert any(later < earlier for earlier, later in pairwise(values))


def test_transform_travels_into_workers() -> None:
    image, mask = picture(40, 50, 2)
    transform = EpisodeTransform("standard", 32)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(image, mask, seed=3)[0], transform(image, mask, seed=3)[0])


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="no augmentation 'strong'; known are: none, flip, standard"):
        EpisodeTransform("strong", 64)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="image size must be at least 8 pixels, got 0"):
        EpisodeTransform("none", 0)
    image, mask = picture(20, 30, 0)
    with pytest.raises(DataError, match=r"expected a uint8 mask of \(20, 30\), got uint8 \(19, 30\)"):
        EpisodeTransform("none", 32)(image, mask[:-1], seed=0)
    with pytest.raises(DataError, match=r"expected a uint8 image \(H, W, 3\), got float64"):
        EpisodeTransform("none", 32)(image / 255, mask, seed=0)


def test_a_photo_without_a_mask_moves_like_one_with_it() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    transform = EpisodeTransform("none", 32)
    assert torch.equal(transform.photo(image), transform(image, np.ones((40, 56), np.uint8), seed=7)[0])
