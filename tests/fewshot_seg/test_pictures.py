"""Colours, overlays, panels and picture files."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from fewshot_seg.pictures import (
    OBJECT,
    TRUTH,
    Panel,
    class_colour,
    colour_map,
    overlay_classes,
    overlay_map,
    overlay_mask,
    panel_sheet,
    write_grey,
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


class TestClasses:
    def test_colours_are_all_different_and_later_ones_those_of_voc(self) -> None:
        colours = [class_colour(number) for number in range(1, 256)]
        assert len(set(colours)) == 255
        assert (0, 0, 0) not in colours
        assert colours[:2] == [OBJECT, TRUTH]
        for number in range(8, 256):  # the loop of VOC's development kit, VOClabelcolormap.m
            red = green = blue = 0
            left = number
            for bit in range(8):
                red |= (left & 1) << (7 - bit)
                green |= (left >> 1 & 1) << (7 - bit)
                blue |= (left >> 2 & 1) << (7 - bit)
                left >>= 3
            assert class_colour(number) == (red, green, blue)

    def test_one_class_is_the_plain_overlay(self) -> None:
        random = np.random.default_rng(0)
        image, mask = random.integers(0, 256, (50, 70, 3)).astype(np.uint8), random.integers(0, 2, (50, 70))
        labels = mask.astype(np.uint8)
        assert np.array_equal(overlay_classes(image, labels, ["object"]), overlay_mask(image, labels))

    def test_each_class_has_its_colour_and_those_shown_are_named(self) -> None:
        image, labels = np.full((400, 600, 3), 100, np.uint8), np.zeros((400, 600), np.uint8)
        labels[200:300, 100:200], labels[200:300, 300:400] = 1, 3
        painted = overlay_classes(image, labels, ["cat", "dog", "cow"], alpha=0.5)
        for number, column in ((1, 150), (3, 350)):
            expected = (np.array(class_colour(number)) + 100) / 2
            assert np.abs(painted[250, column] - expected).max() <= 0.5
            assert painted[199, column].tolist() == list(class_colour(number))
        assert painted[350, 550].tolist() == [100, 100, 100]
        legend = painted[:80, :200].reshape(-1, 3).tolist()
        assert list(class_colour(1)) in legend
        assert list(class_colour(3)) in legend
        assert list(class_colour(2)) not in legend
        assert (painted[2, 2] == 245).all()
        assert (image == 100).all()

    def test_nothing_found_is_the_photo_without_legend(self) -> None:
        image = np.full((40, 60, 3), 100, np.uint8)
        assert np.array_equal(overlay_classes(image, np.zeros((40, 60), np.uint8), ["cat", "dog"]), image)

    @pytest.mark.parametrize("classes", [1, 3, 20, 254])
    def test_files(self, tmp_path: Path, classes: int) -> None:
        labels = (np.arange(600).reshape(20, 30) % (classes + 1)).astype(np.uint8)
        write_mask(tmp_path / "m.png", labels, classes)
        with Image.open(tmp_path / "m.png") as stored:
            assert stored.mode == "P"
            assert np.array_equal(np.asarray(stored), labels)
            assert stored.convert("RGB").getpixel((classes % 30, classes // 30)) == class_colour(classes)

    def test_grey_file(self, tmp_path: Path) -> None:
        values = np.arange(256, dtype=np.uint8).reshape(8, 32)
        write_grey(tmp_path / "a" / "g.png", values)
        with Image.open(tmp_path / "a" / "g.png") as stored:
            assert stored.mode == "L"
            assert np.array_equal(np.asarray(stored), values)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_legends_of_tiny_photos(size: tuple[int, int]) -> None:
    labels = np.ones(size, np.uint8)
    assert overlay_classes(np.zeros((*size, 3), np.uint8), labels, ["a" * 50, "b"]).shape == (*size, 3)


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
