from __future__ import annotations

import pickle
import random
from itertools import pairwise
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from episodes.augment import EpisodeTransform, Preset, fitted_size, keep_object
from episodes.types import IGNORE, OUTSIDE, DataError, UInt8Array

PRESETS = get_args(Preset)
WHOLE = ("none", "flip", "colour")  # they show the whole picture, always
FITS = ("squash", "pad")
MEAN_COLOUR = torch.tensor([124, 116, 104]) / 255
presets, fits = st.sampled_from(PRESETS), st.sampled_from(FITS)


def picture(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = draw.choice(np.array([0, 1, 255], dtype=np.uint8), (height, width))
    return image, mask


def far_from_edges(label: torch.Tensor, value: int, distance: int = 3) -> torch.Tensor:
    """Where every pixel within `distance` has this value and lies in the square: beyond may be what it is not."""
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    same = (label.numpy() == value).astype(np.uint8)
    return torch.from_numpy(cv2.erode(same, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)).bool()


@settings(max_examples=120, deadline=None)
@given(presets, fits, st.integers(1, 90), st.integers(1, 90), st.integers(8, 64), st.integers(0, 2**62))
def test_shapes_types_and_mask_values(preset: str, fit: str, height: int, width: int, size: int, seed: int) -> None:
    image, mask = picture(height, width, seed % 1000)
    before = image.copy(), mask.copy()
    tensor, label = EpisodeTransform(preset, size, fit)(image, mask, seed=seed)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (3, size, size))
    assert (label.dtype, tuple(label.shape)) == (torch.uint8, (size, size))
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert set(label.unique().tolist()) <= {0, 1, 255}
    np.testing.assert_array_equal(before[0], image)
    np.testing.assert_array_equal(before[1], mask)


@settings(max_examples=100, deadline=None)
@given(presets, fits, st.integers(12, 90), st.integers(12, 90), st.integers(8, 64), st.integers(0, 2**62))
def test_masks_get_no_values_but_255_where_filled(
    preset: str, fit: str, height: int, width: int, size: int, seed: int
) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    transform = EpisodeTransform(preset, size, fit)
    for value in (0, 1):
        label = transform(image, np.full((height, width), value, np.uint8), seed=seed)[1]
        assert set(label.unique().tolist()) <= {value, 255}
        if fit == "squash" and preset in (*WHOLE, "standard"):
            assert (label == value).all()
    assert (transform(image, np.full((height, width), 255, np.uint8), seed=seed)[1] == 255).all()


@settings(max_examples=150, deadline=None)
@given(presets, fits, st.integers(0, 2**62))
def test_image_and_mask_move_together(preset: str, fit: str, seed: int) -> None:
    # The image shows its own mask, so that wherever the mask goes the image must go too. Blur and interpolation
    # soften edges, no more.
    mask = np.zeros((120, 160), dtype=np.uint8)
    mask[20:70, 16:60] = 1
    mask[80:110, 100:150] = 1
    mask[75:100, 20:60] = 255
    shade = np.select([mask == 1, mask == 0], [220, 20], 120)
    image = np.repeat(shade[..., None], 3, axis=2).astype(np.uint8)
    tensor, label = EpisodeTransform(preset, 96, fit)(image, mask, seed=seed)
    brightness = tensor.mean(dim=0)
    objects, background = far_from_edges(label, 1), far_from_edges(label, 0)
    assert objects.any()
    if background.any():
        assert brightness[objects].min() > brightness[background].max() + 0.2
        ignored = far_from_edges(label, 255) & (brightness > 0)  # black where a photo was padded
        assert (brightness[ignored] > brightness[background].max()).all()
        assert (brightness[ignored] < brightness[objects].min()).all()


@settings(max_examples=40, deadline=None)
@given(presets, fits, st.integers(0, 2**62), st.integers(0, 2**62))
def test_result_depends_on_the_seed_alone(preset: str, fit: str, seed: int, other: int) -> None:
    image, mask = picture(40, 50, 1)
    fresh, used = EpisodeTransform(preset, 32, fit), EpisodeTransform(preset, 32, fit)
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


@pytest.mark.parametrize("preset", ["standard", "pfenet", "strong"])
@pytest.mark.parametrize("fit", FITS)
def test_crop_keeps_a_small_object(preset: str, fit: str) -> None:
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[2:14, 84:96] = 1  # in a corner: a blind crop loses it most of the time
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    transform = EpisodeTransform(preset, 64, fit)
    shares = [(transform(image, mask, seed=seed)[1] == 1).float().mean().item() for seed in range(60)]
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


@pytest.mark.parametrize("preset", PRESETS)
def test_transform_travels_into_workers(preset: str) -> None:
    image, mask = picture(40, 50, 2)
    transform = EpisodeTransform(preset, 32)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(image, mask, seed=3)[0], transform(image, mask, seed=3)[0])


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="no augmentation 'weak'; known are: none, flip, standard, pfenet"):
        EpisodeTransform("weak", 64)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no fit 'crop'; known are: squash, pad"):
        EpisodeTransform("none", 64, "crop")  # type: ignore[arg-type]
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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(8, 512))
def test_fitted_size_keeps_the_aspect(height: int, width: int, size: int) -> None:
    assert fitted_size(height, width, size, "squash") == (size, size)
    rows, columns = fitted_size(height, width, size, "pad")
    assert max(rows, columns) == size
    long, short = max(height, width), min(height, width)
    assert abs(min(rows, columns) - max(1, size * short / long)) <= 0.5


class TestPad:
    """A photo of another aspect than the square."""

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(WHOLE), st.integers(8, 90), st.integers(8, 90), st.integers(8, 64), st.integers(0, 2**62))
    def test_the_photo_is_at_the_top_left(self, preset: str, height: int, width: int, size: int, seed: int) -> None:
        image = np.full((height, width, 3), 150, np.uint8)
        tensor, label = EpisodeTransform(preset, size, "pad")(image, np.ones((height, width), np.uint8), seed=seed)
        rows, columns = fitted_size(height, width, size, "pad")
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[:rows, :columns] = True
        assert torch.equal(label == 1, inside)
        assert torch.equal(label == 255, ~inside)
        assert torch.equal(tensor.amax(dim=0) > 0, inside)

    @pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20)])
    def test_agrees_with_pillow(self, height: int, width: int) -> None:
        y, x = np.mgrid[0:height, 0:width]
        image = np.stack([4 * x, 6 * y, 2 * x + 3 * y], axis=2).astype(np.uint8)
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[5:11, 6:16] = 1
        tensor, label = EpisodeTransform("none", 60, "pad")(image, mask, seed=0)
        larger = Image.fromarray(image).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
        expected = np.zeros((60, 60, 3))
        expected[: 2 * height, : 2 * width] = np.asarray(larger) / 255
        np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=2 / 255)
        expected_mask = np.full((60, 60), 255, np.uint8)
        expected_mask[: 2 * height, : 2 * width] = mask.repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(label.numpy(), expected_mask)

    def test_a_mirrored_photo_stays_at_the_left(self) -> None:
        image, mask = picture(32, 16, 5)
        plain, label = EpisodeTransform("none", 32, "pad")(image, mask, seed=0)
        seen = set()
        for seed in range(20):
            moved, moved_label = EpisodeTransform("flip", 32, "pad")(image, mask, seed=seed)
            mirrored = not torch.equal(moved, plain)
            seen.add(mirrored)
            assert torch.equal(moved[..., :16], plain[..., :16].flip(-1) if mirrored else plain[..., :16])
            assert torch.equal(moved_label[:, :16], label[:, :16].flip(-1) if mirrored else label[:, :16])
            assert (moved[..., 16:] == 0).all()
            assert (moved_label[:, 16:] == 255).all()
        assert seen == {True, False}

    def test_the_share_of_the_object_is_that_of_the_padded_square(self) -> None:
        # A crop of pfenet keeps the padding, so that the object's share is a quarter of that in the photo; compared
        # with the photo's, every crop would be refused, and no picture would ever be scaled.
        image, mask = np.full((16, 64, 3), 200, np.uint8), np.ones((16, 64), np.uint8)
        transform = EpisodeTransform("pfenet", 64, "pad")
        heights = {int((transform(image, mask, seed=seed)[1][:, 32] == 1).sum()) for seed in range(40)}
        assert min(heights) < 16 < max(heights)


class TestMarks:
    """Marks of weak supports: what was not known stays apart from what was filled."""

    @settings(max_examples=120, deadline=None)
    @given(presets, fits, st.integers(12, 90), st.integers(12, 90), st.integers(8, 64), st.integers(0, 2**62))
    def test_255_stays_and_fills_become_254(
        self, preset: str, fit: str, height: int, width: int, size: int, seed: int
    ) -> None:
        image, marks = picture(height, width, seed % 1000)
        before = image.copy(), marks.copy()
        transform = EpisodeTransform(preset, size, fit)
        tensor, moved = transform.marks(image, marks, seed=seed)
        as_mask, label = transform(image, marks, seed=seed)
        filled = transform(image, np.where(marks == IGNORE, 0, marks).astype(np.uint8), seed=seed)[1] == IGNORE
        assert torch.equal(tensor, as_mask)
        assert moved.dtype == torch.uint8
        assert torch.equal(moved, label.masked_fill(filled, OUTSIDE))
        np.testing.assert_array_equal(before[0], image)
        np.testing.assert_array_equal(before[1], marks)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_of_a_padded_photo_of_which_nothing_is_known(self, preset: str) -> None:
        image, marks = np.full((20, 60, 3), 200, np.uint8), np.full((20, 60), IGNORE, np.uint8)
        transform = EpisodeTransform(preset, 60, "pad")
        seen = {int(value) for seed in range(5) for value in transform.marks(image, marks, seed=seed)[1].unique()}
        whole = transform.marks(image, marks, seed=0)[1]
        if preset in WHOLE:
            assert (whole[:20] == IGNORE).all()
            assert (whole[20:] == OUTSIDE).all()
        assert seen <= {IGNORE, OUTSIDE}
        assert IGNORE in seen


class TestKeepObject:
    @staticmethod
    def resized(original: UInt8Array, size: int, fit: str) -> torch.Tensor:
        image = np.zeros((*original.shape, 3), np.uint8)
        return EpisodeTransform("none", size, fit).marks(image, original, seed=0)[1]

    @pytest.mark.parametrize(("fit", "place"), [("squash", (32, 12)), ("pad", (24, 12))])
    @pytest.mark.parametrize(("value", "around"), [(1, 0), (1, IGNORE), (IGNORE, 0)], ids=["mask", "point", "box"])
    def test_two_pixels_of_a_large_photo_stay_where_they_are(
        self, fit: str, place: tuple[int, int], value: int, around: int
    ) -> None:
        original = np.full((900, 1200), around, np.uint8)
        original[600:602, 305] = value  # 602 * 48 / 900 = 32.1 and 602 * 48 / 1200 = 24.1; 305 * 48 / 1200 = 12.2
        before, resized = original.copy(), self.resized(original, 48, fit)
        assert not (resized == value).any()  # lost
        lost = resized.clone()
        kept = keep_object(original, resized, fit)
        assert (kept == value).nonzero().tolist() == [list(place)]
        changed = resized.clone()
        changed[place] = value
        assert torch.equal(kept, changed)
        assert torch.equal(resized, lost)  # arguments are left alone
        np.testing.assert_array_equal(original, before)

    @settings(max_examples=100, deadline=None)
    @given(fits, st.integers(1, 300), st.integers(1, 300), st.integers(8, 64), st.data())
    def test_of_any_pixel_of_any_photo_one_stays_in_the_photo(
        self, fit: str, height: int, width: int, size: int, data: st.DataObject
    ) -> None:
        original = np.zeros((height, width), np.uint8)
        y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        original[y, x] = 1
        resized = self.resized(original, size, fit)
        kept = keep_object(original, resized, fit)
        if (resized == 1).any():
            assert torch.equal(kept, resized)
            return
        rows, columns = fitted_size(height, width, size, fit)
        ((row, column),) = (kept == 1).nonzero().tolist()
        assert resized[row, column] == 0  # within the photo
        assert abs((row + 0.5) / rows - (y + 0.5) / height) <= 0.5 / rows + 0.5 / height
        assert abs((column + 0.5) / columns - (x + 0.5) / width) <= 0.5 / columns + 0.5 / width
        assert int((kept != resized).sum()) == 1

    @pytest.mark.parametrize("fit", FITS)
    def test_nothing_changes_where_something_survived_or_nothing_was(self, fit: str) -> None:
        large, none, unknown = (np.zeros((90, 120), np.uint8) for _ in range(3))
        large[20:60, 30:90] = 1
        large[0, 0] = IGNORE  # lost, but the object is there
        unknown[:] = IGNORE
        for original in (large, none, unknown):
            resized = self.resized(original, 32, fit)
            assert keep_object(original, resized, fit) is resized


class TestPfenet:
    white = np.full((64, 64, 3), 250, np.uint8)
    empty = np.zeros((64, 64), np.uint8)

    @pytest.mark.parametrize("fit", FITS)
    def test_fills_with_the_mean_colour(self, fit: str) -> None:
        transform, filled_any = EpisodeTransform("pfenet", 256, fit), False
        for seed in range(40):
            tensor, label = transform(self.white, self.empty, seed=seed)
            filled, photo = far_from_edges(label, 255, 4), far_from_edges(label, 0, 4)  # blur reaches two pixels
            assert torch.allclose(tensor[:, photo], torch.tensor(250 / 255))
            assert torch.allclose(tensor[:, filled], MEAN_COLOUR[:, None])
            filled_any |= bool(filled.any())
        assert filled_any

    def test_scales_by_a_tenth_and_turns_half_of_the_time(self) -> None:
        # A bar in the middle shows angle and scale.
        mask = np.zeros((200, 200), np.uint8)
        mask[95:105, 40:160] = 1
        image = np.repeat((mask * 200)[..., None], 3, axis=2)
        transform = EpisodeTransform("pfenet", 200)
        angles, lengths = [], []
        for seed in range(120):
            y, x = np.nonzero(transform(image, mask, seed=seed)[1].numpy() == 1)
            angles.append(np.degrees(np.arctan(np.polyfit(x, y, 1)[0])))
            lengths.append(np.hypot(np.ptp(x), np.ptp(y)) / 119)
        turned = np.abs(angles) > 0.3
        assert 40 <= turned.sum() <= 80
        assert np.abs(angles).max() <= 10.5
        assert min(angles) < -5
        assert max(angles) > 5
        straight = np.array(lengths)[~turned]
        assert 0.88 <= straight.min() < 0.94
        assert 1.06 < straight.max() <= 1.12

    def test_blurs_half_of_the_time(self) -> None:
        # Noise loses three quarters of its spread by that blur, and at most half by scaling and turning.
        image, _ = picture(40, 40, 7)
        empty = np.zeros((40, 40), np.uint8)
        plain = EpisodeTransform("none", 40)(image, empty, seed=0)[0]
        transform, blurred, as_opencv = EpisodeTransform("pfenet", 40), 0, 0
        smooth = torch.from_numpy(cv2.GaussianBlur(image, (5, 5), 1.1).transpose(2, 0, 1)) / 255
        for seed in range(200):
            tensor, label = transform(image, empty, seed=seed)
            blurred += bool(tensor[:, far_from_edges(label, 0)].std() < 0.35 * plain.std())
            # Of those that are neither scaled nor turned, some are what OpenCV makes, mirrored or not.
            as_opencv += any(bool((tensor - one).abs().max() < 3 / 255) for one in (smooth, smooth.flip(-1)))
        assert 70 <= blurred <= 130
        assert as_opencv >= 1


class TestColour:
    def test_leaves_the_geometry_and_changes_colours_mildly(self) -> None:
        image, mask = picture(40, 50, 3)
        plain, label = EpisodeTransform("none", 32)(image, mask, seed=0)
        changed = 0
        for seed in range(60):
            tensor, moved_label = EpisodeTransform("colour", 32)(image, mask, seed=seed)
            assert torch.equal(moved_label, label)
            changed += not torch.equal(tensor, plain)
            assert np.corrcoef(tensor.mean(dim=0).flatten(), plain.mean(dim=0).flatten())[0, 1] > 0.9
            assert 0.6 < float(tensor.mean() / plain.mean()) < 1.5
        assert 36 <= changed <= 58


class TestStrong:
    def test_changes_more_than_standard_and_is_sometimes_grey(self) -> None:
        image = np.full((60, 60, 3), (200, 120, 60), np.uint8)
        empty = np.zeros((60, 60), np.uint8)

        def colours(preset: str) -> np.ndarray:
            found = []
            for seed in range(120):
                tensor, label = EpisodeTransform(preset, 32)(image, empty, seed=seed)
                found.append(tensor[:, label == 0].mean(dim=1).numpy())
            return np.array(found)

        strong, standard = colours("strong"), colours("standard")
        assert (strong.std(axis=0) > 1.3 * standard.std(axis=0)).all()
        grey = np.ptp(strong, axis=1) < 0.01
        assert 6 <= grey.sum() <= 35
        assert not (np.ptp(standard, axis=1) < 0.01).any()

    def test_shows_smaller_parts_and_turns_them(self) -> None:
        y, x = np.mgrid[0:100, 0:100].astype(np.uint8)
        image = np.stack([x, y, np.zeros_like(x)], axis=2)
        turned, widths = {True: 0, False: 0}, []
        for seed in range(60):
            tensor, label = EpisodeTransform("strong", 48)(image, np.zeros((100, 100), np.uint8), seed=seed)
            turned[bool((label == 255).any())] += 1
            red = tensor[0][label == 0]  # grows from left to right, so that its spread tells how much is shown
            widths.append(float(red.max() - red.min()) * 255 / 99)
        assert min(turned.values()) > 10
        assert min(widths) < 0.5
