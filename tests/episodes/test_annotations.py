"""Weak supports against small masks worked out by hand, scipy's exact distances, and what must hold for every mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from episodes.annotations import annotation_of, derive_annotation
from episodes.sources import SyntheticSource
from episodes.types import SUPPORT_KINDS, DataError, SupportKind, UInt8Array

DRAWN: tuple[SupportKind, ...] = ("box", "scribble", "point")


def picture(*rows: str) -> UInt8Array:
    """``#`` = 1, ``?`` = 255, ``.`` = 0."""
    values = {"#": 1, "?": 255, ".": 0}
    return np.array([[values[letter] for letter in row] for row in rows], dtype=np.uint8)


def kept_regions(mask: UInt8Array) -> list[npt.NDArray[np.bool_]]:
    """Pixels (H, W) of every region with at least 5% of the largest, in row order; plain."""
    labels, count = ndimage.label(mask == 1, structure=np.ones((3, 3)))
    regions = [labels == n for n in range(1, count + 1)]
    largest = max((int(region.sum()) for region in regions), default=0)
    return [region for region in regions if int(region.sum()) * 100 >= largest * 5]


def block(shape: tuple[int, int], *windows: tuple[slice, slice]) -> UInt8Array:
    mask = np.zeros(shape, dtype=np.uint8)
    for window in windows:
        mask[window] = 1
    return mask


small_masks = arrays(
    np.uint8,
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    elements=st.sampled_from([0, 0, 1, 1, 255]),
    fill=st.nothing(),
)


@st.composite
def scenes(draw: st.DrawFn) -> UInt8Array:
    """Masks of a few rectangles, larger than the grid on which scribbles are planned."""
    mask = np.zeros((draw(st.integers(1, 130)), draw(st.integers(1, 260))), dtype=np.uint8)
    for value in draw(st.lists(st.sampled_from([1, 1, 255, 0]), min_size=1, max_size=5)):
        y, x = draw(st.integers(0, mask.shape[0] - 1)), draw(st.integers(0, mask.shape[1] - 1))
        mask[y : y + draw(st.integers(1, 90)), x : x + draw(st.integers(1, 200))] = value
    return mask


masks = small_masks | scenes()
objects = masks.filter(lambda mask: bool((mask == 1).any()))


def test_a_mask_knows_all_but_the_ignored_pixels() -> None:
    mask = picture("..##", ".?#.")
    known = derive_annotation(mask, "mask")
    np.testing.assert_array_equal(known, mask)
    assert not np.shares_memory(known, mask)


def test_a_label_knows_nothing() -> None:
    np.testing.assert_array_equal(derive_annotation(picture("..##", ".?#."), "label"), np.full((2, 4), 255))


def test_boxes_are_tight_and_one_per_region() -> None:
    mask = picture(
        ".......",
        ".##....",
        "..##...",
        ".....#.",
        "?....##",
    )
    expected = picture(
        ".......",
        ".???...",
        ".???...",
        ".....??",
        "?....??",
    )
    np.testing.assert_array_equal(derive_annotation(mask, "box"), expected)


def test_pixels_that_meet_at_a_corner_are_one_region() -> None:
    np.testing.assert_array_equal(
        derive_annotation(picture("#...", ".##.", "...."), "box"), picture("???.", "???.", "....")
    )


@pytest.mark.parametrize(("crumb", "kept"), [(5, True), (4, False)])
def test_regions_below_five_percent_of_the_largest_are_left_out(crumb: int, kept: bool) -> None:
    mask = block((20, 20), (slice(0, 10), slice(0, 10)), (slice(15, 16), slice(0, crumb)))
    box, scribble = derive_annotation(mask, "box"), derive_annotation(mask, "scribble")
    assert set(box[15, :crumb].tolist()) == ({255} if kept else {0})
    assert bool((scribble[15] == 1).any()) is kept


def test_a_scribble_runs_along_the_middle() -> None:
    mask = block((40, 80), (slice(10, 21), slice(5, 75)))
    rows, columns = np.nonzero(derive_annotation(mask, "scribble") == 1)
    along = (columns >= 20) & (columns < 60)
    assert set(rows[along].tolist()) == {14, 15, 16}  # three wide, about row 15
    assert set(columns.tolist()) >= set(range(16, 64))  # most of the length in one piece
    assert columns.min() > 5  # but not to the edge
    assert columns.max() < 74


def test_a_scribble_follows_a_bend_inside_the_object() -> None:
    upright, foot = (slice(0, 90), slice(0, 11)), (slice(79, 90), slice(0, 90))
    known = derive_annotation(block((90, 90), upright, foot), "scribble") == 1
    assert ndimage.label(known, structure=np.ones((3, 3)))[1] == 1
    assert known[20:70, 5].all()
    assert known[84, 20:70].all()


@pytest.mark.parametrize(("short_side", "width"), [(150, 3), (200, 3), (334, 5), (600, 9)])  # 1.5%: 2.25, 3, 5.01, 9
def test_the_line_is_three_pixels_wide_or_part_of_the_short_side(short_side: int, width: int) -> None:
    mask = block((short_side, short_side + 100), (slice(50, short_side - 50), slice(10, short_side + 90)))
    middle = derive_annotation(mask, "scribble")[:, (short_side + 100) // 2]
    assert int((middle == 1).sum()) == width


def test_the_thinnest_objects_get_a_scribble() -> None:
    thread = np.eye(300, 400, dtype=np.uint8)
    drawn = derive_annotation(thread, "scribble") == 1
    assert drawn.any()
    assert (thread[drawn] == 1).all()
    pixel = block((300, 400), (slice(299, 300), slice(399, 400)))
    np.testing.assert_array_equal(derive_annotation(pixel, "scribble") == 1, pixel == 1)


def test_every_object_of_a_scene_gets_a_scribble() -> None:
    mask = block((60, 60), (slice(2, 20), slice(2, 20)), (slice(40, 58), slice(30, 50)))
    drawn = derive_annotation(mask, "scribble") == 1
    assert drawn[2:20, 2:20].any()
    assert drawn[40:58, 30:50].any()


def test_a_point_is_a_disc_where_the_object_is_widest() -> None:
    mask = block((30, 40), (slice(5, 14), slice(5, 14)), (slice(9, 10), slice(14, 40)))
    expected = np.full((30, 40), 255)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            if dy * dy + dx * dx <= 4:
                expected[9 + dy, 9 + dx] = 1
    np.testing.assert_array_equal(derive_annotation(mask, "point"), expected)


def test_a_point_is_clipped_to_the_object() -> None:
    np.testing.assert_array_equal(
        derive_annotation(picture("....", "####", "...."), "point"),
        np.array([[255] * 4, [1, 1, 1, 255], [255] * 4]),  # the first of the four that are equally wide
    )


def test_the_edge_of_the_photo_is_a_border() -> None:
    known = derive_annotation(np.ones((11, 21), dtype=np.uint8), "point")
    assert np.argwhere(known == 1).mean(axis=0).tolist() == [5, 5]  # first of the pixels (5, 5) to (5, 15)


def test_a_point_grows_with_the_photo() -> None:
    known = derive_annotation(np.ones((501, 501), dtype=np.uint8), "point")
    rows, columns = np.nonzero(known == 1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (245, 255, 245, 255)  # a radius of 5.01


@given(masks, st.sampled_from(SUPPORT_KINDS))
def test_form_and_purity(mask: UInt8Array, kind: SupportKind) -> None:
    if kind in DRAWN and not (mask == 1).any():
        with pytest.raises(DataError, match="needs an object"):
            derive_annotation(mask, kind)
        return
    before = mask.copy()
    mask.flags.writeable = False
    known = derive_annotation(mask, kind)
    np.testing.assert_array_equal(mask, before)
    assert known.dtype == np.uint8
    assert known.shape == mask.shape
    assert set(np.unique(known).tolist()) <= {0, 1, 255}
    assert not np.shares_memory(known, mask)
    np.testing.assert_array_equal(known, derive_annotation(np.asfortranarray(before), kind))


@given(objects)
def test_boxes_hold_the_kept_regions_and_all_else_but_the_ignored_is_background(mask: UInt8Array) -> None:
    expected = np.where(mask == 255, 255, 0)
    for region in kept_regions(mask):
        rows, columns = np.nonzero(region)
        expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 255
    np.testing.assert_array_equal(derive_annotation(mask, "box"), expected)


@pytest.mark.parametrize("flip", [np.flipud, np.fliplr, np.transpose])
@given(mask=objects)
def test_boxes_flip_with_the_mask(flip: Callable[[UInt8Array], UInt8Array], mask: UInt8Array) -> None:
    np.testing.assert_array_equal(derive_annotation(flip(mask), "box"), flip(derive_annotation(mask, "box")))


@given(objects)
def test_scribbles_mark_object_pixels_of_every_kept_region_and_nothing_else(mask: UInt8Array) -> None:
    known = derive_annotation(mask, "scribble")
    assert not (known == 0).any()
    marked = np.zeros(mask.shape, dtype=bool)
    for region in kept_regions(mask):
        assert (known[region] == 1).any()
        marked |= region
    assert marked[known == 1].all()


@given(objects)
@settings(max_examples=50)
def test_the_point_is_at_the_pole_of_inaccessibility(mask: UInt8Array) -> None:
    known = derive_annotation(mask, "point")
    assert not (known == 0).any()
    assert (mask[known == 1] == 1).all()
    largest = max(kept_regions(mask), key=lambda region: int(region.sum()))  # max keeps the first of equals
    room = ndimage.distance_transform_edt(np.pad(largest, 1))[1:-1, 1:-1]
    pole = np.array(np.unravel_index(np.argmax(np.round(room, 4)), room.shape))
    assert known[tuple(pole)] == 1
    assert (np.hypot(*(np.argwhere(known == 1) - pole).T) <= max(2, 0.01 * min(mask.shape))).all()


@pytest.mark.parametrize("kind", DRAWN)
def test_a_mask_without_object_cannot_be_marked(kind: SupportKind) -> None:
    with pytest.raises(DataError, match=rf"by a {kind} needs an object; got a mask of 2 x 3 pixels of which none"):
        derive_annotation(picture("...", ".?."), kind)


def test_a_mask_without_object_is_all_background_and_a_label_says_nothing_about_it() -> None:
    empty = picture("...", ".?.")
    np.testing.assert_array_equal(derive_annotation(empty, "mask"), empty)
    assert (derive_annotation(empty, "label") == 255).all()


def test_bad_masks_and_kinds() -> None:
    with pytest.raises(DataError, match="marked by mask, box, scribble, point, label; got 'circle': name one of these"):
        derive_annotation(picture("#"), "circle")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"uint8 \(H, W\); got int64 of shape \(2, 2\)"):
        derive_annotation(np.ones((2, 2), dtype=np.int64), "box")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"uint8 \(H, W\); got uint8 of shape \(1, 2, 2\)"):
        derive_annotation(np.ones((1, 2, 2), dtype=np.uint8), "box")
    with pytest.raises(DataError, match="values 0, 1 and 255; got 7: take the mask of one class"):
        derive_annotation(np.full((2, 2), 7, dtype=np.uint8), "box")


class Drawn(SyntheticSource):
    """A source in which somebody clicked on the corner of every photo."""

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:  # noqa: ARG002
        if kind != "point":
            return None
        known = np.full((48, 48), 255, dtype=np.uint8)
        known[0, class_id] = 1
        return known


PLAIN = SyntheticSource(base_classes=2, novel_classes=2, images_per_class=2, size=48)
WITH_POINTS = Drawn(base_classes=2, novel_classes=2, images_per_class=2, size=48)


@pytest.mark.parametrize("kind", SUPPORT_KINDS)
def test_what_nobody_drew_is_derived(kind: SupportKind) -> None:
    expected = derive_annotation(PLAIN.mask("train-001-0000", 1), kind)
    np.testing.assert_array_equal(annotation_of(PLAIN, "train-001-0000", 1, kind), expected)
    if kind != "point":
        np.testing.assert_array_equal(annotation_of(WITH_POINTS, "train-001-0000", 1, kind), expected)


def test_what_somebody_drew_comes_first_and_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawn, "mask", lambda *_: pytest.fail("no mask is needed"))
    known = annotation_of(WITH_POINTS, "train-001-0000", 1, "point")
    assert np.argwhere(known == 1).tolist() == [[0, 1]]


def test_a_mask_is_always_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawn, "annotation", lambda *_: pytest.fail("masks are not drawn marks"))
    mask = annotation_of(WITH_POINTS, "train-001-0000", 1, "mask")
    np.testing.assert_array_equal(mask, WITH_POINTS.mask("train-001-0000", 1))


def test_errors_name_the_image() -> None:
    with pytest.raises(DataError, match=r"synthetic: image 'train-001-0001', class 2: a support marked by a box needs"):
        annotation_of(PLAIN, "train-001-0001", 2, "box")
    with pytest.raises(DataError, match="got 'circle'"):
        annotation_of(WITH_POINTS, "train-001-0000", 1, "circle")  # type: ignore[arg-type]
