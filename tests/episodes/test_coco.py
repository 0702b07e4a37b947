"""COCO's own layout and COCO JSON of one's own, against pycocotools' annToMask, masks drawn by hand and plain loops."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as run_length
from pycocotools.coco import COCO

from episodes.sources.coco import CocoJsonSource, CocoSource
from episodes.sources.coco_annotations import CocoObject, CocoPhoto
from episodes.sources.coco_outlines import class_mask, decompress
from episodes.sources.errors import SourceError
from episodes.types import DataError, MaskSource, UInt8Array, WeaklyAnnotated

HEIGHT, WIDTH = 20, 30
SQUARE = [4, 3, 14, 3, 14, 9, 4, 9]  # columns 4..13, rows 3..8


def plain_counts(mask: UInt8Array) -> list[int]:
    """Run lengths by a plain loop over the columns."""
    flat = mask.T.ravel().tolist()
    runs = [(value, len(list(group))) for value, group in itertools.groupby(flat)]
    return ([0] if runs and runs[0][0] else []) + [length for _, length in runs]


def block(rows: slice, columns: slice) -> UInt8Array:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[rows, columns] = 1
    return mask


def annotation(number: int, image: object, category: object, **fields: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "iscrowd": 0, **fields}


def tiny_content() -> dict[str, Any]:
    """Two photos, three categories: polygons, both kinds of run lengths, a crowd and a box alone."""
    ring = block(slice(0, 6), slice(0, 6))
    compressed = run_length.encode(np.asfortranarray(block(slice(10, 20), slice(20, 30))))["counts"].decode()
    size = [HEIGHT, WIDTH]
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT},
            {"id": 9, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}],
        "annotations": [
            annotation(1, 7, 1, segmentation=[SQUARE], bbox=[4, 3, 10, 6]),
            annotation(
                2, 7, 1, segmentation={"size": size, "counts": plain_counts(ring)}, iscrowd=1, bbox=[0, 0, 6, 6]
            ),
            annotation(3, 7, 17, segmentation={"size": size, "counts": compressed}, bbox=[20, 10, 10, 10]),
            annotation(4, 9, 18, segmentation=[], bbox=[2.5, 1.5, 3, 4]),
            annotation(
                5, 9, 1, segmentation={"size": size, "counts": plain_counts(ring)}, iscrowd=1, bbox=[0, 0, 6, 6]
            ),
            annotation(6, 9, 17, segmentation=[[20, 0, 30, 0, 30, 5, 20, 5], [20, 4, 30, 4, 30, 9, 20, 9]]),
        ],
    }


def write_photo(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO's layout with the tiny content as train2017 and val2017."""
    for split in ("train2017", "val2017"):
        write_json(tmp_path / "annotations" / f"instances_{split}.json", tiny_content())
        for name in ("a.jpg", "b.jpg"):
            write_photo(tmp_path / split / name)
    return tmp_path


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., CocoJsonSource]:
    """A JSON of one's own, with photos, from a change of the tiny content."""

    def build(change: Callable[[dict[str, Any]], object] = len) -> CocoJsonSource:
        content = tiny_content()
        change(content)
        path = write_json(tmp_path / "own" / "annotations.json", content)
        for name in ("a.jpg", "b.jpg"):
            write_photo(path.parent / name)
        return CocoJsonSource(path)

    return build


def _append_space(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


class TestCoco:
    def test_layout(self, coco: Path, capfd: pytest.CaptureFixture[str]) -> None:
        source = CocoSource(coco)
        assert isinstance(source, MaskSource)
        assert not isinstance(source, WeaklyAnnotated)
        assert source.splits == source.default_splits == ("train2017", "val2017")
        assert source.folds is None
        assert source.class_names == {1: "person", 17: "cat", 18: "dog"}
        assert list(source.class_names) == [1, 17, 18]
        assert source.ids("val2017") == ("val2017/a", "val2017/b")
        assert source.class_areas("val2017/a") == {1: 60, 17: 100}
        assert source.image("val2017/a").shape == (HEIGHT, WIDTH, 3)
        assert source.split_file("val2017") == coco.resolve() / "annotations" / "instances_val2017.json"
        assert capfd.readouterr() == ("", "")

    def test_eighty_categories_have_folds(self, coco: Path) -> None:
        content = tiny_content()
        content["categories"] += [{"id": number, "name": f"class {number}"} for number in range(100, 177)]
        for split in ("train2017", "val2017"):
            write_json(coco / "annotations" / f"instances_{split}.json", content)
        assert CocoSource(coco).folds == "coco"

    def test_default_splits(self, coco: Path) -> None:
        (coco / "annotations" / "instances_train2017.json").unlink()
        assert CocoSource(coco).default_splits == ("val2017", "val2017")
        for year in ("train2014", "val2014"):
            write_json(coco / "annotations" / f"instances_{year}.json", tiny_content())
            (coco / "images" / year).mkdir(parents=True)
        assert CocoSource(coco).default_splits == ("train2014", "val2014")

    def test_photos_below_images_and_root_from_above(self, coco: Path, tmp_path: Path) -> None:
        (coco / "images").mkdir()
        (coco / "val2017").rename(coco / "images" / "val2017")
        assert CocoSource(coco).image_file("val2017/a") == coco.resolve() / "images" / "val2017" / "a.jpg"
        outer = tmp_path / "outer"
        outer.mkdir()
        for entry in ("annotations", "images"):
            (outer / "coco").mkdir(exist_ok=True)
            (coco / entry).rename(outer / "coco" / entry)
        assert CocoSource(outer).root == (outer / "coco").resolve()

    def test_masks_by_hand(self, coco: Path) -> None:
        source = CocoSource(coco)
        person = source.mask("val2017/a", 1)
        expected = 255 * block(slice(0, 6), slice(0, 6))  # the crowd
        expected[3:9, 4:14] = 1  # the object lies over it
        np.testing.assert_array_equal(person, expected)
        np.testing.assert_array_equal(source.mask("val2017/a", 17), block(slice(10, 20), slice(20, 30)))
        np.testing.assert_array_equal(source.mask("val2017/b", 17), block(slice(0, 9), slice(20, 30)))  # two parts
        assert not source.mask("val2017/a", 18).any()  # also under the crowd of persons

    def test_crowds_and_boxes_alone_are_not_present(self, coco: Path) -> None:
        source = CocoSource(coco)
        assert set(source.class_masks("val2017/b")) == set(source.class_areas("val2017/b")) == {17}
        np.testing.assert_array_equal(source.mask("val2017/b", 1), 255 * block(slice(0, 6), slice(0, 6)))
        np.testing.assert_array_equal(source.mask("val2017/b", 18), 255 * block(slice(1, 6), slice(2, 6)))

    def test_masks_in_one_reading_are_the_masks(self, coco: Path) -> None:
        source = CocoSource(coco)
        for image_id in source.ids("train2017"):
            for class_id, mask in source.class_masks(image_id).items():
                np.testing.assert_array_equal(mask, source.mask(image_id, class_id))

    def test_travels_light(self, coco: Path) -> None:
        content = tiny_content()
        content["annotations"] *= 200
        write_json(coco / "annotations" / "instances_val2017.json", content)
        source = CocoSource(coco)
        source.mask("val2017/a", 1)
        data = pickle.dumps(source)
        assert len(data) < 1000
        np.testing.assert_array_equal(pickle.loads(data).mask("val2017/a", 1), source.mask("val2017/a", 1))

    def test_fingerprint(self, coco: Path) -> None:
        source = CocoSource(coco)
        ids = source.ids("val2017")
        before = source.fingerprint(ids)
        assert source.fingerprint(ids) == before != source.fingerprint(ids[:1])
        _append_space(coco / "train2017" / "a.jpg")
        _append_space(source.split_file("train2017"))
        assert source.fingerprint(ids) == before
        _append_space(coco / "val2017" / "b.jpg")
        second = source.fingerprint(ids)
        _append_space(source.split_file("val2017"))
        assert len({before, second, source.fingerprint(ids)}) == 3

    def test_a_changed_file_is_read_again(self, coco: Path) -> None:
        source = CocoSource(coco)
        assert len(source.ids("val2017")) == 2
        content = tiny_content()
        content["images"].append({"id": 11, "file_name": "c.jpg", "width": 5, "height": 5})
        write_json(source.split_file("val2017"), content)
        assert source.ids("val2017")[2] == "val2017/c"

    def test_wrong_root_and_names(self, coco: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nothing: expected annotations/instances_SPLIT\.json .* does not exist"):
            CocoSource(tmp_path / "nothing")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="has no such files; name the folder that holds annotations"):
            CocoSource(tmp_path / "empty")
        source = CocoSource(coco)
        with pytest.raises(SourceError, match=r"no split 'nowhere' .*this data set has: train2017, val2017"):
            source.ids("nowhere")
        with pytest.raises(DataError, match="no image 'test/a'; ids are SPLIT/NAME"):
            source.image("test/a")
        with pytest.raises(DataError, match="no image 'val2017/zzz'; its images are named like 'a'"):
            source.class_areas("val2017/zzz")
        with pytest.raises(DataError, match=r"class id 2 is none of this data set's 3 classes, 1\.\.18"):
            source.mask("val2017/a", 2)

    def test_categories_differ_between_splits(self, coco: Path) -> None:
        content = tiny_content()
        content["categories"].append({"id": 90, "name": "toothbrush"})
        write_json(coco / "annotations" / "instances_val2017.json", content)
        with pytest.raises(
            SourceError, match=r"val2017\.json: its categories differ from those of instances_train2017"
        ):
            CocoSource(coco).ids("val2017")

    def test_missing_and_resized_photo(self, coco: Path) -> None:
        source = CocoSource(coco)
        write_photo(coco / "val2017" / "a.jpg", (WIDTH, HEIGHT + 1))
        with pytest.raises(SourceError, match=r"a\.jpg: photo is 30x21, instances_val2017\.json says 30x20") as caught:
            source.mask("val2017/a", 1)
        assert caught.value.kind == "size-mismatch"
        (coco / "val2017" / "a.jpg").unlink()
        for read in (source.image, lambda name: source.mask(name, 1), lambda name: source.fingerprint([name])):
            with pytest.raises(SourceError, match=r"val2017/a\.jpg: no such file"):
                read("val2017/a")


class TestOwnJson:
    def test_classes_ids_and_masks(self, own: Callable[..., CocoJsonSource]) -> None:
        source = own()
        assert isinstance(source, MaskSource)
        assert isinstance(source, WeaklyAnnotated)
        assert source.class_names == {1: "person", 17: "cat", 18: "dog"}
        assert source.ids("all") == ("a", "b")
        assert source.default_splits == ("all", "all")
        assert source.class_areas("a") == {1: 60, 17: 100}
        assert source.split_file("all") == source.annotations
        assert len(pickle.dumps(source)) < 1000

    def test_splits_from_lists(self, own: Callable[..., CocoJsonSource]) -> None:
        source = own()
        folder = source.annotations.parent / "splits"
        folder.mkdir()
        (folder / "train.txt").write_text("b\n")
        (folder / "val.txt").write_text("a\n")
        assert source.default_splits == ("train", "val")
        assert source.ids("train") == ("b",)
        assert source.split_file("train") == folder / "train.txt"
        with pytest.raises(DataError, match="no split 'nowhere'"):
            source.ids("nowhere")

    def test_boxes_and_labels(self, own: Callable[..., CocoJsonSource]) -> None:
        source = own()
        expected = 255 * block(slice(1, 6), slice(2, 6))  # every pixel that 2.5..5.5 x 1.5..5.5 touches
        np.testing.assert_array_equal(source.annotation("b", 18, "box"), expected)
        assert (source.annotation("b", 18, "label") == 255).all()
        np.testing.assert_array_equal(
            source.annotation("a", 1, "box"), 255 * (block(slice(3, 9), slice(4, 14)) | block(slice(6), slice(6)))
        )
        assert source.annotation("b", 17, "box") is None  # outline without bbox
        assert source.annotation("b", 1, "label") is None  # a crowd alone
        assert source.annotation("a", 18, "label") is None
        assert source.annotation("a", 1, "scribble") is None
        with pytest.raises(DataError, match="class id 3"):
            source.annotation("a", 3, "box")

    def test_roboflow_parent_category_is_left_out(self, own: Callable[..., CocoJsonSource]) -> None:
        def roboflow(content: dict[str, Any]) -> None:
            for category in content["categories"]:
                category["supercategory"] = "animals"
            content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})

        assert own(roboflow).class_names == {1: "person", 17: "cat", 18: "dog"}

    def test_category_zero_shifts_all(self, own: Callable[..., CocoJsonSource]) -> None:
        def from_zero(content: dict[str, Any]) -> None:
            for entry in content["categories"] + content["annotations"]:
                key = "category_id" if "category_id" in entry else "id"
                entry[key] -= 17 if entry[key] > 1 else -1  # 17 -> 0, 18 -> 1, 1 -> 2
            assert {entry["id"] for entry in content["categories"]} == {0, 1, 2}

        source = own(from_zero)
        assert source.class_names == {1: "cat", 2: "dog", 3: "person"}
        assert source.class_areas("a") == {1: 100, 3: 60}

    def test_ids_keep_suffixes_when_stems_repeat(self, own: Callable[..., CocoJsonSource]) -> None:
        source = own(lambda content: content["images"][1].update(file_name="a.png"))
        assert source.ids("all") == ("a.jpg", "a.png")

    @pytest.mark.parametrize("name", ["sub/a.jpg", "sub\\a.jpg"])
    def test_photos_in_subfolders(self, own: Callable[..., CocoJsonSource], name: str) -> None:
        source = own(lambda content: content["images"][0].update(file_name=name))
        write_photo(source.annotations.parent / "images" / "sub" / "a.jpg")
        assert source.ids("all")[0] == "sub/a"
        assert source.image("sub/a").shape == (HEIGHT, WIDTH, 3)

    def test_photos_elsewhere(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "x" / "labels.json", tiny_content())
        write_photo(tmp_path / "photos" / "a.jpg")
        assert CocoJsonSource(path, tmp_path / "photos").mask("a", 17).any()
        with pytest.raises(DataError, match=r"nowhere: expected the folder of the photos"):
            CocoJsonSource(path, tmp_path / "nowhere")

    def test_export_of_cvat(self, tmp_path: Path) -> None:
        write_json(tmp_path / "annotations" / "instances_default.json", tiny_content())
        write_photo(tmp_path / "images" / "a.jpg")
        assert CocoJsonSource(tmp_path).image("a").shape == (HEIGHT, WIDTH, 3)

    def test_finds_the_json_of_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="the folder holds none; name the file"):
            CocoJsonSource(tmp_path)
        one = write_json(tmp_path / "one.json", tiny_content())
        assert CocoJsonSource(tmp_path).annotations == one.resolve()
        write_json(tmp_path / "two.json", tiny_content())
        with pytest.raises(
            DataError, match=r"expected one JSON file .*found one\.json, two\.json; name the file itself"
        ):
            CocoJsonSource(tmp_path)
        named = write_json(tmp_path / "_annotations.coco.json", tiny_content())
        assert CocoJsonSource(tmp_path).annotations == named.resolve()
        with pytest.raises(DataError, match=r"none\.json: expected a JSON file .* there is none"):
            CocoJsonSource(tmp_path / "none.json")

    @pytest.mark.parametrize("upright", [True, False])
    def test_photo_is_turned_when_the_json_is_for_the_upright_one(
        self, own: Callable[..., CocoJsonSource], upright: bool
    ) -> None:
        source = own()
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = (HEIGHT, WIDTH) if upright else (WIDTH, HEIGHT)
        Image.new("RGB", stored, "red").save(source.annotations.parent / "a.jpg", exif=exif)
        assert source.image("a").shape == (HEIGHT, WIDTH, 3)
        assert source.mask("a", 1).shape == (HEIGHT, WIDTH)


class TestBadJson:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not readable as JSON"),
            ("{", "not readable as JSON"),
            ("[" * 100_000, "not readable as JSON"),
            ("\x00\xff", "not readable as JSON"),
            ("[]", "expected a JSON object at the top, found a list"),
            ('{"shapes": []}', r"expected a list 'categories', found only shapes; name a JSON file in COCO's format"),
            ('{"categories": {}}', "expected a list 'categories', found an object"),
            ('{"categories": [3]}', "entry 1 of 'categories' is a number"),
        ],
    )
    def test_no_coco_at_all(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "broken.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(SourceError, match=message) as caught:
            CocoJsonSource(path).ids("all")
        assert (caught.value.kind, caught.value.file) == ("bad-annotation", str(path.resolve()))

    @pytest.mark.parametrize(
        ("key", "change", "kind", "message"),
        [
            ("images", {"id": [1]}, "bad-annotation", r"image 1 needs an id, found \[1\]"),
            ("images", {"id": 9}, "bad-annotation", "two images have the id 9"),
            ("images", {"file_name": "b.jpg"}, "bad-annotation", "two images have the file_name 'b.jpg'"),
            (
                "images",
                {"file_name": None},
                "bad-annotation",
                "image 7: expected the name of a photo's file, found None",
            ),
            ("images", {"file_name": "../a.jpg"}, "unsafe-name", r"image 7: '\.\./a\.jpg' leads out of the folder"),
            ("images", {"file_name": "/etc/passwd"}, "unsafe-name", "'/etc/passwd' leads out"),
            ("images", {"file_name": "C:\\a.jpg"}, "unsafe-name", "leads out"),
            ("images", {"file_name": "x\\..\\..\\a.jpg"}, "unsafe-name", "leads out"),
            ("images", {"file_name": "a\0.jpg"}, "unsafe-name", "leads out"),
            ("images", {"file_name": "\ud800.jpg"}, "unsafe-name", "leads out"),
            (
                "images",
                {"width": "wide"},
                "bad-annotation",
                "image 7: expected width and height in pixels, found 'wide', 20",
            ),
            ("images", {"width": 0}, "bad-annotation", "expected width and height"),
            ("images", {"width": True}, "bad-annotation", "expected width and height"),
            ("images", {"height": 10**9}, "bad-annotation", "30x1000000000 pixels are more than a photo has"),
            ("categories", {"id": -1}, "bad-annotation", "category 1 needs an id from 0 up and a name, found -1"),
            ("categories", {"name": ""}, "bad-annotation", "category 1 needs an id from 0 up and a name"),
            ("categories", {"id": 1}, "bad-annotation", "two categories have the id 1"),
            (
                "annotations",
                {"image_id": 8},
                "bad-annotation",
                "annotation 1 belongs to image 8, which is not in images",
            ),
            ("annotations", {"image_id": {}}, "bad-annotation", "annotation 1 belongs to image {}"),
            (
                "annotations",
                {"category_id": 5},
                "unknown-label",
                "annotation 1 has category 5, which is not in categories",
            ),
            ("annotations", {"category_id": "cat"}, "unknown-label", "annotation 1 has category 'cat'"),
        ],
    )
    def test_lists_that_do_not_fit(
        self, own: Callable[..., CocoJsonSource], key: str, change: dict[str, Any], kind: str, message: str
    ) -> None:
        with pytest.raises(SourceError, match=message) as caught:
            own(lambda content: content[key][0].update(change)).ids("all")
        assert caught.value.kind == kind
        assert caught.value.mend

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"segmentation": [[]]}, r"annotation 1: polygon has 0 numbers, expected x and y of three points or more"),
            ({"segmentation": [[1, 2, 3, 4]]}, "polygon has 4 numbers"),
            ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon has 7 numbers"),
            ({"segmentation": [[[1, 2], [3, 4], [5, 6]]]}, "polygon has 6 numbers"),
            ({"segmentation": SQUARE}, "annotation 1: expected numbers, found 4"),
            ({"segmentation": [["a"] * 6]}, "expected numbers, found"),
            ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "expected numbers, found"),
            ({"segmentation": [[1, 2, 3, 4, 5, 10**400]]}, "expected numbers, found"),
            ({"segmentation": [[1, 2, 3, 4, 5, 1e12]]}, r"coordinate 1e\+12 is far outside the photo of 30x20 pixels"),
            ({"segmentation": "abc"}, "expected polygons or run lengths, found a text"),
            ({"segmentation": None, "bbox": None}, "annotation 1 has neither an outline .* nor a box"),
            ({"segmentation": [], "bbox": [1, 2, 3]}, "expected bbox as x, y, width, height; found"),
            ({"segmentation": [], "bbox": [1, 2, -3, 4]}, "expected bbox as x, y, width, height"),
            ({"segmentation": [], "bbox": {"x": 1}}, "expected numbers, found {'x': 1}"),
            ({"segmentation": {}}, r"run lengths are for size None, the image has \[20, 30\]"),
            ({"segmentation": {"size": [30, 20], "counts": [600]}}, r"run lengths are for size \[30, 20\]"),
            ({"segmentation": {"size": [20, 30], "counts": [1, 2]}}, "cover 3 pixels, the image of 30x20 has 600"),
            ({"segmentation": {"size": [20, 30], "counts": ""}}, "are no run lengths|cover 0"),
            ({"segmentation": {"size": [20, 30], "counts": [601, -1]}}, "counts are no run lengths"),
            ({"segmentation": {"size": [20, 30], "counts": [[600]]}}, "counts are no run lengths"),
            ({"segmentation": {"size": [20, 30], "counts": [600.0]}}, "counts are no run lengths"),
            ({"segmentation": {"size": [20, 30], "counts": [10**30]}}, "counts are no run lengths"),
            ({"segmentation": {"size": [20, 30], "counts": [1, [2]]}}, "counts are no run lengths"),
            ({"segmentation": {"size": [20, 30]}}, "counts are no run lengths: None"),
            ({"segmentation": {"size": [20, 30], "counts": "é!"}}, "counts are no run lengths"),
            ({"segmentation": {"size": [20, 30], "counts": "o" * 50}}, "counts are no run lengths"),
        ],
    )
    def test_outlines_that_cannot_be_drawn(
        self, own: Callable[..., CocoJsonSource], change: dict[str, Any], message: str
    ) -> None:
        source = own(lambda content: content["annotations"][0].update(change))
        assert source.class_areas("b") == {17: 90}  # other images are not touched
        for read in (source.class_masks, lambda name: source.mask(name, 1)):
            with pytest.raises(SourceError, match=message) as caught:
                read("a")
            assert caught.value.kind == "bad-annotation"
            assert caught.value.file.endswith("annotations.json")

    @given(
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts"]), inner),
            max_leaves=12,
        )
    )
    def test_any_value_is_drawn_or_refused(self, value: Any) -> None:
        photo = CocoPhoto("a.jpg", (5, 6), [CocoObject(1, 1, False, value, value)])
        try:
            mask = class_mask(Path("x.json"), photo, 1)
        except SourceError as error:  # anything else fails the test
            refused = error.kind
        else:
            refused = None
            assert mask.shape == (5, 6)
        assert refused in (None, "bad-annotation")


masks = arrays.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 40)), elements=st.integers(0, 1))


class TestRunLengths:
    @given(mask=masks)
    def test_compressed_and_plain_give_the_mask(self, mask: UInt8Array) -> None:
        compressed = run_length.encode(np.asfortranarray(mask))["counts"].decode()
        for counts in (compressed, plain_counts(mask)):
            thing = CocoObject(1, 3, False, {"size": list(mask.shape), "counts": counts}, None)
            photo = CocoPhoto("a.jpg", mask.shape, [thing])
            np.testing.assert_array_equal(class_mask(Path("x.json"), photo, 3), mask)

    @given(mask=masks)
    def test_decompressed_numbers(self, mask: UInt8Array) -> None:
        assert decompress(run_length.encode(np.asfortranarray(mask))["counts"].decode()) == plain_counts(mask)

    def test_long_runs(self) -> None:
        mask = np.zeros((3000, 2000), dtype=np.uint8)
        mask[10:2990, 700:1400] = 1
        assert decompress(run_length.encode(np.asfortranarray(mask))["counts"].decode()) == plain_counts(mask)


@pytest.mark.coco
class TestRealCoco:
    @pytest.fixture(scope="class")
    def source(self, coco_root: Path) -> CocoSource:
        return CocoSource(coco_root)

    def test_layout(self, source: CocoSource) -> None:
        assert source.default_splits == ("train2017", "val2017")
        assert source.folds == "coco"
        assert (min(source.class_names), max(source.class_names)) == (1, 90)

    def test_masks_are_those_of_annotation_to_mask(self, source: CocoSource) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            api = COCO(str(source.split_file("val2017")))
        photos = sorted(api.imgs.values(), key=lambda photo: photo["id"])[::4]
        crowds = 0
        for photo in photos:
            image_id = f"val2017/{Path(photo['file_name']).stem}"
            expected: dict[int, UInt8Array] = {}
            entries = api.imgToAnns[photo["id"]]
            for entry in sorted(entries, key=lambda entry: -entry["iscrowd"]):  # objects on top of crowds
                shape = (photo["height"], photo["width"])
                mask = expected.setdefault(entry["category_id"], np.zeros(shape, dtype=np.uint8))
                mask[api.annToMask(entry) == 1] = 255 if entry["iscrowd"] else 1
                crowds += entry["iscrowd"]
            for class_id, mask in expected.items():
                np.testing.assert_array_equal(source.mask(image_id, class_id), mask)
            assert set(source.class_masks(image_id)) == {key for key, mask in expected.items() if (mask == 1).any()}
        assert crowds > 0

    def test_areas_are_near_those_of_the_file(self, source: CocoSource) -> None:
        content = json.loads(source.split_file("val2017").read_text())
        names = {photo["id"]: Path(photo["file_name"]).stem for photo in content["images"]}
        entries: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for entry in content["annotations"]:
            entries.setdefault((entry["image_id"], entry["category_id"]), []).append(entry)
        alone = [(key, group[0]) for key, group in entries.items() if len(group) == 1 and group[0]["area"] > 2000]
        for (image, class_id), entry in alone[:60]:
            if not entry["iscrowd"]:
                area = source.class_areas(f"val2017/{names[image]}")[class_id]
                assert area == pytest.approx(entry["area"], rel=0.06)
