"""Colours, overlays, panels and picture files."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from fewshot_seg.pictures import (
    OBJECT,
    Panel,
    colour_map,
    overlay_map,
    overlay_mask,
    panel_sheet,
    write_mask,
    write_picture,
)


def test_colour_map_is_viridis() -> None:
    values = np.linspace(0, 1, 256)[None]
    expected = np.round(255 * mpl.colormaps["viridis"](values)[..., :3])
    assert np.abs(colour_map(values).astype(int) - expected).max() <= 1


def test_colour_map_clips() -> None:
    assert np.array_equal(colour_map(np.array([[-3.0, 7.0]])), colour_map(np.array([[0.0, 1.0]])))


class TestOverlayMask:
    image = np.full((60, 60, 3), 100, np.uint8)

    def test_tints_the_object_outlines_it_and_greys_the_ignored(self) -> None:
        mask = np.zeros((60, 60), np.uint8)
        mask[20:40, 20:40] = 1
        mask[50:, 50:] = 255
        painted = overlay_mask(self.image, mask, alpha=0.5)
        assert painted[30, 30].tolist() == [165, 130, 50]  # half way to (230, 159, 0)
        assert painted[19, 30].tolist() == list(OBJECT)
        assert painted[5, 5].tolist() == [100, 100, 100]
        assert painted[55, 55].tolist() == [114, 114, 114]

    @pytest.mark.parametrize("alpha", [0.0, 0.45, 1.0])
    def test_every_pixel_equals_the_formula(self, alpha: float) -> None:
        random = np.random.default_rng(0)
        image = random.integers(0, 256, (70, 90, 3)).astype(np.uint8)
        mask = random.choice(np.array([0, 1, 255], np.uint8), (70, 90))
        blurred = np.zeros((72, 92), bool)
        for row in range(3):
            for column in range(3):
                blurred[row : row + 70, column : column + 90] |= mask == 1
        outline = blurred[1:-1, 1:-1] & (mask != 1)
        expected = image.astype(np.float64)
        for value, tint in ((1, OBJECT), (255, (128, 128, 128))):
            expected[mask == value] = (1 - alpha) * expected[mask == value] + alpha * np.array(tint)
        expected[outline] = OBJECT
        painted = overlay_mask(image, mask, alpha=alpha)
        assert np.abs(painted - expected).max() <= 0.5 + 1e-4
        assert painted.dtype == np.uint8

    def test_leaves_the_photo_alone(self) -> None:
        before = self.image.copy()
        assert np.array_equal(overlay_mask(self.image, np.zeros((60, 60), np.uint8)), self.image)
        overlay_mask(self.image, np.ones((60, 60), np.uint8))
        assert np.array_equal(self.image, before)


def test_overlay_map_blends_grey_and_viridis() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    blended = overlay_map(image, np.ones((2, 2)), alpha=0.5)
    assert np.abs(blended[0, 0].astype(float) - (np.array([253, 231, 37]) + 100) / 2).max() <= 1


def test_panel_sheet_keeps_proportions() -> None:
    red = np.zeros((40, 80, 3), np.uint8)
    red[..., 0] = 255
    sheet = panel_sheet([[Panel(picture=red, label="x" * 200, scale=True), Panel(picture=red, label="b")]], "title")
    row, column = np.nonzero((sheet == [255, 0, 0]).all(axis=2)[:, : sheet.shape[1] // 2])
    assert column.max() - column.min() + 1 == 256
    assert row.max() - row.min() + 1 == 128
    assert (sheet != 255).any(axis=2).sum() > 2 * 256 * 128  # labels are there too


def test_mask_file_is_an_index_png(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (13, 17)).astype(np.uint8)
    write_mask(tmp_path / "a" / "m.png", mask)
    with Image.open(tmp_path / "a" / "m.png") as stored:
        assert stored.mode == "P"
        assert np.array_equal(np.asarray(stored), mask)
        assert stored.convert("RGB").getpixel((int(np.argmax(mask[0])), 0)) == OBJECT


@pytest.mark.parametrize(("suffix", "tolerance"), [(".png", 0), (".jpg", 6)])
def test_picture_file(tmp_path: Path, suffix: str, tolerance: int) -> None:
    picture = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    write_picture(tmp_path / f"p{suffix}", picture)
    with Image.open(tmp_path / f"p{suffix}") as stored:
        assert np.abs(np.asarray(stored).astype(int) - picture).max() <= tolerance
    assert [file.name for file in tmp_path.iterdir()] == [f"p{suffix}"]
