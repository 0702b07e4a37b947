"""Composed photos: pixels and masks move together, exactly, and follow from the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.sources import CompositeSource, FolderSource
from episodes.sources.composites import largest_part
from episodes.types import DataError

OBJECT, BACKGROUND, OWN = (250, 10, 10), (20, 20, 200), (10, 240, 10)


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    """``red``: class 1 in red, with a speck beside it; ``blue``: blue with class 2 in green; rows 36 on are ignored."""
    root = tmp_path / "own"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    photo, labels = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8)
    labels[5:25, 8:24], labels[2, 38] = 1, 1
    photo[labels == 1] = OBJECT
    Image.fromarray(photo).save(root / "images" / "red.png")
    Image.fromarray(labels).save(root / "masks" / "red.png")
    photo, labels = np.full((40, 60, 3), BACKGROUND, np.uint8), np.zeros((40, 60), np.uint8)
    labels[4:20, 30:50] = 2
    photo[labels == 2] = OWN
    labels[36:] = 255
    Image.fromarray(photo).save(root / "images" / "blue.png")
    Image.fromarray(labels).save(root / "masks" / "blue.png")
    (root / "classes.txt").write_text("1 red\n2 green\n")
    return FolderSource(root)


@pytest.fixture
def composites(source: FolderSource) -> CompositeSource:
    return CompositeSource(source, (("red", 1),), ("blue",), count=20, seed=3)


def test_pixels_follow_the_masks(composites: CompositeSource, source: FolderSource) -> None:
    before = source.image("blue").astype(int)
    for image_id in composites.ids("train"):
        photo, mask = composites.image(image_id).astype(int), composites.mask(image_id, 1)
        change = np.abs(photo - before).sum(axis=2)
        to_red = np.abs(photo - OBJECT).sum(axis=2)
        assert mask.any()
        # the edge is soft: inside it is more object than background, outside the other way round
        assert (to_red[mask == 1] <= np.abs(before - OBJECT).sum(axis=2)[mask == 1] / 2 + 3).all()
        assert (change[mask != 1] <= np.abs(before - OBJECT).sum(axis=2)[mask != 1] / 2 + 3).all()


def test_own_classes_stay_where_they_are_seen(composites: CompositeSource, source: FolderSource) -> None:
    own, ignored = source.mask("blue", 2) == 1, source.mask("blue", 2) == 255
    hidden = False
    for image_id in composites.ids("train"):
        pasted = composites.mask(image_id, 1) == 1
        green = composites.mask(image_id, 2)
        np.testing.assert_array_equal(green == 1, own & ~pasted)
        np.testing.assert_array_equal(green == 255, ignored & ~pasted)
        np.testing.assert_array_equal(composites.mask(image_id, 1) == 255, ignored & ~pasted)
        hidden |= bool((own & pasted).any())
    assert hidden


def test_only_the_largest_part_is_cut_out_and_it_has_the_size_asked_for(composites: CompositeSource) -> None:
    for image_id in composites.ids("train"):
        _, pasted = composites.composition(image_id)
        if len(pasted) > 1:
            continue
        mask = composites.mask(image_id, 1) == 1
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert mask.sum() >= 0.9 * height * width  # one block: the speck far beside it is not there
        scale = min(np.sqrt(pasted[0].share * 40 * 60 / (20 * 16)), 0.9 * 40 / 20)
        assert abs(height - scale * 20) <= 1.5
        assert abs(width - scale * 16) <= 1.5


def test_everything_follows_from_the_seed(composites: CompositeSource, source: FolderSource) -> None:
    same = CompositeSource(source, (("red", 1),), ("blue",), count=20, seed=3)
    other = CompositeSource(source, (("red", 1),), ("blue",), count=20, seed=4)
    ids = composites.ids("train")
    assert all((composites.image(i) == same.image(i)).all() for i in ids[:4])
    assert any((composites.image(i) != other.image(i)).any() for i in ids)
    assert composites.fingerprint(ids) == same.fingerprint(ids) != other.fingerprint(ids)
    longer = CompositeSource(source, (("red", 1),), ("blue",), count=30, seed=3)
    np.testing.assert_array_equal(longer.image(ids[7]), composites.image(ids[7]))


def test_fingerprint_sees_the_cut_out_photo(composites: CompositeSource, source: FolderSource) -> None:
    before = composites.fingerprint(["000000"])
    path = source.root / "images" / "red.png"
    path.write_bytes(path.read_bytes() + b" ")
    assert composites.fingerprint(["000000"]) != before


def test_largest_part() -> None:
    region = np.zeros((6, 6), bool)
    region[0, 0], region[2:4, 2:4], region[4, 4] = True, True, True  # the last touches by a corner
    assert largest_part(region).sum() == 5
    with pytest.raises(DataError, match="nothing to cut out"):
        largest_part(np.zeros((3, 3), bool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutouts": ()}, "at least one of cutouts"),
        ({"backgrounds": ()}, "at least one of backgrounds"),
        ({"count": 0}, "a count from 1 and a seed from 0, got 0 and 0"),
        ({"seed": -1}, "a count from 1 and a seed from 0"),
    ],
)
def test_bad_arguments(source: FolderSource, arguments: dict[str, object], message: str) -> None:
    sound = {"cutouts": (("red", 1),), "backgrounds": ("blue",), "count": 2}
    with pytest.raises(DataError, match=message):
        CompositeSource(source, **sound | arguments)


def test_no_such_split_or_image(composites: CompositeSource) -> None:
    with pytest.raises(DataError, match="no split 'val'; there is train alone"):
        composites.ids("val")
    with pytest.raises(DataError, match="no image '000020'; ids are 000000 to 000019"):
        composites.image("000020")
