"""Sources with ignored classes: pixel by pixel against the labels they come from."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from episodes.ignored_classes import IgnoredClasses
from episodes.sources import SyntheticSource
from episodes.types import MaskSource, SupportKind, UInt8Array, WeaklyAnnotated

SOURCE = SyntheticSource(base_classes=4, novel_classes=2, images_per_class=4, size=48)
IMAGES = SOURCE.ids("train")


class Labelled(SyntheticSource):
    """One photo: classes 1, 2 and 3 side by side, class 2 overlapping 1, and an ignored pixel; boxes of class 1."""

    def class_masks(self, image_id: str) -> dict[int, UInt8Array]:  # noqa: ARG002
        return {
            1: np.array([[1, 1, 0, 0, 0, 255]], dtype=np.uint8),
            2: np.array([[0, 1, 1, 0, 0, 255]], dtype=np.uint8),
            3: np.array([[0, 0, 0, 1, 0, 255]], dtype=np.uint8),
        }

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        absent = np.array([[0, 0, 0, 0, 0, 255]], dtype=np.uint8)
        return self.class_masks(image_id).get(class_id, absent)

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        known = np.array([[255, 255, 0, 0, 0, 0]], dtype=np.uint8)
        return known if (image_id, class_id, kind) == ("train-001-0000", 1, "box") else None


LABELLED = Labelled(base_classes=4, novel_classes=2, images_per_class=4, size=48)


@pytest.mark.parametrize(
    ("ignored", "class_id", "expected"),
    [
        (set(), 1, [1, 1, 0, 0, 0, 255]),
        ({2}, 1, [1, 1, 255, 0, 0, 255]),  # what is of both classes stays
        ({2, 3}, 1, [1, 1, 255, 255, 0, 255]),
        ({1, 2, 3}, 2, [255, 1, 1, 255, 0, 255]),  # itself is not ignored when asked for
        ({3}, 3, [0, 0, 0, 1, 0, 255]),
        ({1, 9}, 4, [255, 255, 0, 0, 0, 255]),  # absent classes change nothing and can be asked for
    ],
)
def test_masks_by_hand(ignored: set[int], class_id: int, expected: list[int]) -> None:
    mask = IgnoredClasses(LABELLED, frozenset(ignored)).mask("train-001-0000", class_id)
    assert mask.dtype == np.uint8
    assert mask.tolist() == [expected]


def test_masks_of_real_scenes_pixel_by_pixel() -> None:
    ignored = frozenset({2, 3})
    source = IgnoredClasses(SOURCE, ignored)
    changed = 0
    for image_id in IMAGES:
        originals = SOURCE.class_masks(image_id)
        for class_id, mask in source.class_masks(image_id).items():
            expected = originals[class_id].copy()
            for row, column in np.argwhere(expected == 0):
                others = (other for other in ignored & originals.keys() if other != class_id)
                if any(originals[other][row, column] == 1 for other in others):
                    expected[row, column] = 255
            np.testing.assert_array_equal(mask, expected)
            changed += int((expected != originals[class_id]).sum())
    assert changed > 0  # else nothing was tested


def test_all_masks_at_once_are_the_single_ones() -> None:
    source = IgnoredClasses(SOURCE, frozenset({1, 4}))
    for image_id in IMAGES:
        masks = source.class_masks(image_id)
        assert list(masks) == list(SOURCE.class_masks(image_id))
        for class_id, mask in masks.items():
            np.testing.assert_array_equal(mask, source.mask(image_id, class_id))


def test_foreground_is_that_of_the_data_set() -> None:
    source = IgnoredClasses(SOURCE, frozenset({1, 2, 3, 4}))
    for image_id in IMAGES:
        areas = {class_id: int((mask == 1).sum()) for class_id, mask in source.class_masks(image_id).items()}
        assert areas == dict(source.class_areas(image_id)) == dict(SOURCE.class_areas(image_id))


def test_masks_of_the_data_set_are_not_changed() -> None:
    kept = {1: np.array([[1, 0]], dtype=np.uint8), 2: np.array([[0, 1]], dtype=np.uint8)}

    class Kept(SyntheticSource):
        def class_masks(self, image_id: str) -> dict[int, UInt8Array]:  # noqa: ARG002
            return kept

        def mask(self, image_id: str, class_id: int) -> UInt8Array:  # noqa: ARG002
            return kept[class_id]

    source = IgnoredClasses(Kept(), frozenset({2}))
    assert source.mask("x", 1).tolist() == source.class_masks("x")[1].tolist() == [[1, 255]]
    assert kept[1].tolist() == [[1, 0]]


def test_all_else_is_that_of_the_data_set() -> None:
    source = IgnoredClasses(SOURCE, frozenset({1}))
    assert isinstance(source, MaskSource)
    assert source.name == SOURCE.name
    assert dict(source.class_names) == dict(SOURCE.class_names)
    assert source.default_splits == SOURCE.default_splits
    assert source.folds == SOURCE.folds
    assert list(source.ids("val")) == list(SOURCE.ids("val"))
    np.testing.assert_array_equal(source.image(IMAGES[0]), SOURCE.image(IMAGES[0]))
    assert source.fingerprint(IMAGES[:2]) == SOURCE.fingerprint(IMAGES[:2])


def test_drawn_marks_are_those_of_the_data_set_but_for_ignored_classes() -> None:
    drawn = IgnoredClasses(LABELLED, frozenset({2}))
    assert isinstance(drawn, WeaklyAnnotated)
    known = drawn.annotation("train-001-0000", 1, "box")
    assert known is not None
    assert known.tolist() == [[255, 255, 255, 0, 0, 0]]  # class 2 fills the second and the third pixel
    assert drawn.annotation("train-001-0000", 1, "point") is None
    assert IgnoredClasses(SOURCE, frozenset({2})).annotation(IMAGES[0], 1, "box") is None


def test_it_travels_to_workers() -> None:
    source = IgnoredClasses(SOURCE, frozenset({2}))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.mask(IMAGES[0], 1), source.mask(IMAGES[0], 1))
