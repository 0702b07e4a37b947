"""FSS-1000's layout: classes as folders, lists of classes as splits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.sources import FssSource, SourceError
from episodes.types import DataError
from episodes.verify import verify

CLASSES = ("ab_wheel", "abacus", "zebra", "zucchini")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "fss"
    for position, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in (1, 2, 10):
            Image.new("RGB", (20, 16), (10 * position, 9 * number, 40)).save(root / name / f"{number}.jpg")
            mask = np.zeros((16, 20, 3), dtype=np.uint8)
            mask[2 : 3 + number, 4:9] = 255
            mask[15] = 127
            Image.fromarray(mask).save(root / name / f"{number}.png")
    return root


def _list(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def test_classes_in_alphabetical_order_and_numbers_by_value(root: Path) -> None:
    source = FssSource(root)
    assert source.class_names == dict(enumerate(CLASSES, start=1))
    assert source.ids("all")[:4] == ("ab_wheel/1", "ab_wheel/2", "ab_wheel/10", "abacus/1")
    assert len(source.ids("all")) == 12
    assert source.default_splits == ("all", "all")


def test_white_is_the_object_of_the_own_class(root: Path) -> None:
    source = FssSource(root)
    assert source.class_areas("zebra/2") == {3: 3 * 5}
    mask = source.mask("zebra/2", 3)
    assert mask[2:5, 4:9].all()
    assert int(mask.sum()) == 15
    assert not source.mask("zebra/2", 1).any()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA"])
def test_other_colour_modes_of_masks(root: Path, mode: str) -> None:
    source = FssSource(root)
    expected = source.mask("zebra/10", 3)
    path = source.mask_file("zebra/10")
    Image.fromarray(255 * expected).convert(mode).save(path)
    np.testing.assert_array_equal(source.mask("zebra/10", 3), expected)


def test_black_mask_has_no_class(root: Path) -> None:
    source = FssSource(root)
    Image.new("RGB", (20, 16)).save(source.mask_file("abacus/1"))
    assert source.class_areas("abacus/1") == {}


@pytest.mark.parametrize("place", [".", "splits", "splits/fss"])
def test_lists_of_classes(root: Path, place: str) -> None:
    for split, names in (("trn", ("zebra", "ab_wheel")), ("val", ("zucchini",)), ("test", ("abacus",))):
        _list(root / place / f"{split}.txt", *names)
    source = FssSource(root)
    assert source.split_classes("trn") == (1, 3)
    assert source.ids("test") == ("abacus/1", "abacus/2", "abacus/10")
    assert source.ids("trn")[2:4] == ("ab_wheel/10", "zebra/1")
    assert source.default_splits == ("trn", "test")
    assert source.split_file("val") == root / place / "val.txt"
    assert verify(source, "trn") == []
    with pytest.raises(SourceError, match=r"no split 'nowhere'; this data set has: all, test, trn, val"):
        source.ids("nowhere")


def test_nested_folder_with_lists_outside(root: Path, tmp_path: Path) -> None:
    outer = tmp_path / "downloads"
    (outer / "fewshot_data").mkdir(parents=True)
    shutil.move(root, outer / "fewshot_data" / "fewshot_data")
    _list(outer / "test.txt", "abacus")
    _list(outer / "readme.txt", "anything")
    source = FssSource(outer)
    assert source.root == outer / "fewshot_data" / "fewshot_data"
    assert source.split_classes("test") == (2,)
    with pytest.raises(SourceError, match=r"this data set has: all, test$"):
        source.ids("readme")


def test_listed_class_without_folder(root: Path) -> None:
    _list(root / "test.txt", "abacus", "unicorn")
    with pytest.raises(SourceError, match=r"test\.txt: line 2 names class 'unicorn', which has no folder"):
        FssSource(root).ids("test")


def test_more_classes_than_a_byte_can_hold(root: Path) -> None:
    for number in range(300):
        (root / f"class_{number:03d}").mkdir()
    shutil.copytree(root / "zebra", root / "zz_last")
    source = FssSource(root)
    assert max(source.class_names) == 305
    assert source.class_areas("zz_last/2") == {305: 15}
    assert int(source.mask("zz_last/2", 305).sum()) == 15


def test_wrong_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: expected a folder per class with 1\.jpg .* does not exist"):
        FssSource(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"but it has none; name the folder that holds the class folders"):
        FssSource(tmp_path)


@pytest.mark.parametrize("image_id", ["zebra", "../fss/zebra/1", "unicorn/1", ""])
def test_ids_that_are_none(root: Path, image_id: str) -> None:
    for read in (FssSource(root).image, FssSource(root).class_areas):
        with pytest.raises(SourceError, match=r"no image '.*'; ids are CLASS/NUMBER, for example ab_wheel/1"):
            read(image_id)


def test_verify_names_every_file(root: Path) -> None:
    source = FssSource(root)
    source.mask_file("abacus/1").unlink()
    source.mask_file("abacus/2").write_bytes(b"damaged")
    Image.new("L", (3, 4)).save(source.mask_file("abacus/10"))
    source.image_file("zebra/1").write_bytes(b"")
    found = {(Path(p.file).relative_to(root).as_posix(), p.kind) for p in verify(source, "all") if p.file != str(root)}
    assert found == {
        ("abacus/1.png", "missing"),
        ("abacus/2.png", "undecodable"),
        ("abacus/10.png", "size-mismatch"),
        ("zebra/1.jpg", "undecodable"),
    }
