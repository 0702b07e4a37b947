from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from episodes.annotations import annotation_of, derive_annotation
from episodes.sources import SyntheticSource
from episodes.types import IGNORE, SUPPORT_KINDS, DataError, SupportKind, UInt8Array

kinds = st.sampled_from(SUPPORT_KINDS)
weak_kinds = st.sampled_from([kind for kind in SUPPORT_KINDS if kind != "mask"])


@st.composite
def masks(draw: st.DrawFn) -> UInt8Array:
    """Blobs of any form and number, or noise, with some ignored pixels and at least one object pixel."""
    height, width = draw(st.integers(1, 100)), draw(st.integers(1, 100))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    noise = random.standard_normal((height, width))
    smooth = ndimage.gaussian_filter(noise, draw(st.sampled_from([0, 1, 4])))
    mask = (smooth > np.quantile(smooth, draw(st.sampled_from([0.3, 0.7, 0.95])))).astype(np.uint8)
    mask[random.random(mask.shape) < 0.02] = IGNORE
    mask[random.integers(height), random.integers(width)] = 1
    return mask


def rows_of(*rows: str) -> UInt8Array:
    """``.`` is background, ``#`` object, ``?`` ignored or not known."""
    return np.array([[{".": 0, "#": 1, "?": IGNORE}[letter] for letter in row] for row in rows], dtype=np.uint8)


class TestByHand:
    def test_mask_is_itself_but_another_array(self) -> None:
        mask = rows_of(".#?", "..#")
        annotation = derive_annotation(mask, "mask")
        np.testing.assert_array_equal(annotation, mask)
        assert not np.shares_memory(annotation, mask)

    def test_box_is_tight_round_every_part_and_never_knows_ignored_pixels(self) -> None:
        mask = rows_of(
            "?........",
            ".#...?...",
            "..#....##",
            ".......##",
        )
        expected = rows_of(
            "?........",
            ".??..?...",
            ".??....??",
            ".......??",
        )
        np.testing.assert_array_equal(derive_annotation(mask, "box"), expected)

    def test_small_parts_are_left_out(self) -> None:
        mask = np.zeros((40, 60), np.uint8)
        mask[5:25, 5:25] = 1  # 400 pixels
        mask[30:34, 5:10] = 1  # 20: just enough
        mask[30:34, 50:54] = 1  # 16: left out
        mask[33, 53] = 0
        for kind in ("box", "scribble"):
            annotation = derive_annotation(mask, kind)
            touched = (annotation != 0) if kind == "box" else (annotation == 1)
            assert touched[5:25, 5:25].any(), kind
            assert touched[30:34, 5:10].any(), kind
            assert not touched[28:36, 48:56].any(), kind

    def test_point_is_a_disc_in_the_deepest_place_of_the_largest_part(self) -> None:
        mask = np.zeros((21, 41), np.uint8)
        mask[1:4, 1:4] = 1
        mask[5:16, 20:31] = 1  # 11 x 11, deepest at (10, 25)
        rows, columns = np.mgrid[:21, :41]
        disc = (rows - 10) ** 2 + (columns - 25) ** 2 <= 2**2
        np.testing.assert_array_equal(derive_annotation(mask, "point"), np.where(disc, 1, IGNORE))

    def test_point_grows_with_the_picture(self) -> None:
        mask = np.ones((501, 501), np.uint8)
        rows, columns = np.mgrid[:501, :501]
        disc = (rows - 250) ** 2 + (columns - 250) ** 2 <= 5.01**2
        np.testing.assert_array_equal(derive_annotation(mask, "point"), np.where(disc, 1, IGNORE))

    def test_point_of_two_equal_parts_is_in_the_first_in_row_order(self) -> None:
        mask = rows_of(".......###", "###....###", "###.......", "..........")
        expected = rows_of("???????###", "???????##?", "??????????", "??????????")  # radius 2 about the corner
        np.testing.assert_array_equal(derive_annotation(mask, "point"), expected)

    def test_scribble_of_a_bar_is_its_middle_line(self) -> None:
        mask = np.zeros((60, 200), np.uint8)
        mask[20:41, 10:190] = 1
        drawn = derive_annotation(mask, "scribble") == 1
        rows, columns = np.nonzero(drawn)
        middle = (columns > 50) & (columns < 150)  # the ends lead to corners
        assert np.abs(rows[middle] - 30).max() <= 3
        assert set(range(45, 155)) <= set(columns.tolist())  # no gap
        assert drawn.sum(axis=0)[60:140].max() <= 4  # three pixels wide

    def test_scribble_follows_a_bend(self) -> None:
        # An L: a straight line between its ends would leave the object.
        mask = np.zeros((120, 120), np.uint8)
        mask[10:110, 10:30] = 1
        mask[90:110, 10:110] = 1
        drawn = derive_annotation(mask, "scribble") == 1
        assert drawn[40:80, 13:27].any(axis=1).all()
        assert drawn[93:107, 40:80].any(axis=0).all()
        assert ndimage.label(drawn, np.ones((3, 3)))[1] == 1

    def test_scribble_keeps_to_the_middle_and_stops_before_the_tips(self) -> None:
        rows, columns = np.mgrid[:300, :300]
        mask = (((rows - 150) / 60) ** 2 + ((columns - 150) / 130) ** 2 <= 1).astype(np.uint8)
        drawn = derive_annotation(mask, "scribble") == 1
        depth = ndimage.distance_transform_edt(mask)
        assert depth[drawn].mean() > 1.5 * depth[mask == 1].mean()
        touched = np.nonzero(drawn)[1]
        assert 130 < np.ptp(touched) < 250  # of 260

    def test_label_knows_nothing(self) -> None:
        assert (derive_annotation(rows_of(".#?"), "label") == IGNORE).all()


class TestInvariants:
    @settings(max_examples=60, deadline=None)
    @given(masks(), kinds)
    def test_form_values_and_determinism(self, mask: UInt8Array, kind: SupportKind) -> None:
        before = mask.copy()
        annotation = derive_annotation(mask, kind)
        assert (annotation.dtype, annotation.shape) == (np.uint8, mask.shape)
        assert set(np.unique(annotation)) <= {0, 1, IGNORE}
        assert (annotation[mask == IGNORE] == IGNORE).all()
        np.testing.assert_array_equal(derive_annotation(np.asfortranarray(mask), kind), annotation)
        np.testing.assert_array_equal(mask, before)

    @settings(max_examples=60, deadline=None)
    @given(masks(), weak_kinds)
    def test_what_is_known_as_object_is_object(self, mask: UInt8Array, kind: SupportKind) -> None:
        annotation = derive_annotation(mask, kind)
        assert (mask[annotation == 1] == 1).all()
        assert (annotation == 1).any() == (kind in ("scribble", "point"))
        assert (annotation == 0).any() <= (kind == "box")

    @settings(max_examples=60, deadline=None)
    @given(masks())
    def test_box_is_the_union_of_the_boxes_of_kept_parts(self, mask: UInt8Array) -> None:
        annotation = derive_annotation(mask, "box")
        regions, count = ndimage.label(mask == 1, np.ones((3, 3)))
        sizes = [int((regions == n).sum()) for n in range(1, count + 1)]
        expected = np.where(mask == IGNORE, IGNORE, 0)
        for n, size in enumerate(sizes, 1):
            if size >= 0.05 * max(sizes):
                rows, columns = np.nonzero(regions == n)
                expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = IGNORE
        np.testing.assert_array_equal(annotation, expected)

    @settings(max_examples=30, deadline=None)
    @given(masks(), st.sampled_from([0, 1, (0, 1)]))
    def test_box_of_a_mirrored_mask_is_the_mirrored_box(self, mask: UInt8Array, axis: int | tuple[int, int]) -> None:
        mirrored = derive_annotation(np.flip(mask, axis), "box")
        np.testing.assert_array_equal(mirrored, np.flip(derive_annotation(mask, "box"), axis))

    @settings(max_examples=30, deadline=None)
    @given(masks())
    def test_every_kept_part_has_a_scribble(self, mask: UInt8Array) -> None:
        drawn = derive_annotation(mask, "scribble") == 1
        regions, _ = ndimage.label(mask == 1, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel())
        sizes[0] = 0
        kept = set(np.nonzero(sizes >= 0.05 * sizes.max())[0].tolist())
        assert set(np.unique(regions[drawn]).tolist()) == kept

    @settings(max_examples=40, deadline=None)
    @given(masks())
    def test_point_is_about_the_pole_of_inaccessibility(self, mask: UInt8Array) -> None:
        regions, _ = ndimage.label(mask == 1, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel())
        sizes[0] = 0
        depth = ndimage.distance_transform_edt(np.pad(regions == sizes.argmax(), 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
        radius = max(2, 0.01 * min(mask.shape))
        disc = ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2) & (mask == 1)
        np.testing.assert_array_equal(derive_annotation(mask, "point"), np.where(disc, 1, IGNORE))


@dataclass(frozen=True)
class _PartlyDrawn(SyntheticSource):
    """Has a drawn point for class 1 and nothing else."""

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        if class_id != 1 or kind != "point":
            return None
        drawn = np.full(self.mask(image_id, class_id).shape, IGNORE, np.uint8)
        drawn[3, 4] = 1
        return drawn


class TestOfASource:
    @pytest.mark.parametrize("kind", SUPPORT_KINDS)
    def test_a_source_without_drawn_supports_has_them_derived(self, kind: SupportKind) -> None:
        source = SyntheticSource(size=48)
        image_id = source.ids("train")[0]
        class_id = next(iter(source.class_areas(image_id)))
        expected = derive_annotation(source.mask(image_id, class_id), kind)
        np.testing.assert_array_equal(annotation_of(source, image_id, class_id, kind), expected)

    def test_what_is_drawn_comes_first(self) -> None:
        source = _PartlyDrawn(size=48)
        image_id = next(i for i in source.ids("train") if 1 in source.class_areas(i))
        drawn = annotation_of(source, image_id, 1, "point")
        assert np.argwhere(drawn == 1).tolist() == [[3, 4]]
        mask = source.mask(image_id, 1)
        for kind in ("box", "mask"):
            np.testing.assert_array_equal(annotation_of(source, image_id, 1, kind), derive_annotation(mask, kind))

    def test_an_image_without_the_class_is_named(self) -> None:
        source = SyntheticSource(size=48)
        image_id = next(i for i in source.ids("train") if 1 not in source.class_areas(i))
        with pytest.raises(DataError, match=f"image '{image_id}', class 1: expected a mask with object pixels"):
            annotation_of(source, image_id, 1, "box")
        assert not annotation_of(source, image_id, 1, "mask").any()  # a mask says so itself


class TestBadInput:
    @pytest.mark.parametrize("kind", [kind for kind in SUPPORT_KINDS if kind != "mask"])
    def test_no_object(self, kind: SupportKind) -> None:
        with pytest.raises(DataError, match=rf"object pixels \(value 1\) to derive a {kind} from, got none"):
            derive_annotation(np.full((4, 5), IGNORE, np.uint8), kind)

    def test_unknown_kind(self) -> None:
        with pytest.raises(DataError, match="no kind of support 'circle'; known are: mask, box, scribble"):
            derive_annotation(np.ones((4, 5), np.uint8), "circle")  # type: ignore[arg-type]

    def test_wrong_type_or_form(self) -> None:
        with pytest.raises(DataError, match=r"expected a uint8 mask \(H, W\) to derive a box from, got int64 \(4, 5\)"):
            derive_annotation(np.ones((4, 5), np.int64), "box")  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"got uint8 \(1, 4, 5\)"):
            derive_annotation(np.ones((1, 4, 5), np.uint8), "box")
