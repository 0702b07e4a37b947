"""LabelMe files, against masks drawn by hand and plain loops over pixels."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from episodes.sources.errors import SourceError
from episodes.sources.labelme import LabelmeSource
from episodes.types import DataError, MaskSource, UInt8Array, WeaklyAnnotated

HEIGHT, WIDTH = 40, 60
Build = Callable[..., LabelmeSource]


def shape(label: str, kind: str, points: list[list[float]], **fields: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, "flags": {}, **fields}


def encoded(picture: Image.Image, file_format: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def block(rows: slice, columns: slice) -> UInt8Array:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[rows, columns] = 1
    return mask


CAT = shape("cat", "rectangle", [[10, 5], [20, 15]])
DOG = shape("dog", "polygon", [[30, 10], [40, 10], [40, 30], [30, 30]])


def content(*shapes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    sides = {"imagePath": "a.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imageData": None, **sides, **fields}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A source with the image ``a`` as given, and the image ``b`` with a cat and a dog."""

    def make(*shapes: dict[str, Any], **fields: Any) -> LabelmeSource:
        for name, sheet in (("a", content(*shapes, **fields)), ("b", content(CAT, DOG, imagePath="b.jpg"))):
            (tmp_path / f"{name}.json").write_text(json.dumps(sheet))
            noise = np.random.default_rng(ord(name)).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / f"{name}.jpg")
        return LabelmeSource(tmp_path)

    return make


class TestLabelme:
    def test_layout(self, build: Build) -> None:
        source = build(CAT)
        assert isinstance(source, MaskSource)
        assert isinstance(source, WeaklyAnnotated)
        (source.root / "._b.json").write_bytes(b"macOS")
        assert source.class_names == {1: "cat", 2: "dog"}
        assert source.ids("all") == ("a", "b")
        assert source.default_splits == ("all", "all")
        assert source.folds is None
        assert source.image("a").shape == (HEIGHT, WIDTH, 3)
        assert source.class_areas("a") == {1: 11 * 11}
        assert source.class_areas("b") == {1: 11 * 11, 2: 11 * 21}

    def test_splits_from_lists(self, build: Build) -> None:
        source = build(CAT)
        (source.root / "splits").mkdir()
        for split, image_id in (("train", "a"), ("test", "b")):
            (source.root / "splits" / f"{split}.txt").write_text(f"{image_id}\n")
        assert source.default_splits == ("train", "test")
        assert source.ids("test") == ("b",)
        with pytest.raises(DataError, match="no split 'nowhere'"):
            source.ids("nowhere")

    def test_classes_from_a_list(self, build: Build) -> None:
        source = build(CAT)
        (source.root / "classes.txt").write_text("__ignore__\n_background_\ndog\nfox\ncat\n")
        assert source.class_names == {1: "dog", 2: "fox", 3: "cat"}
        assert source.class_areas("b") == {1: 11 * 21, 3: 11 * 11}
        other = LabelmeSource(source.root)
        (source.root / "classes.txt").write_text("dog\n")
        with pytest.raises(
            SourceError, match=r"a\.json: label 'cat' is not among the 1 classes; add it to classes\.txt"
        ):
            other.class_areas("a")
        (source.root / "classes.txt").write_text("dog\ndog\n")
        with pytest.raises(SourceError, match=r"classes\.txt: expected a class per line, but it names 'dog' twice"):
            LabelmeSource(source.root).class_names  # noqa: B018

    def test_rectangle_in_any_order_of_corners(self, build: Build) -> None:
        for corners in ([[10, 5], [20, 15]], [[20, 15], [10, 5]], [[20, 5], [10, 15]]):
            source = build(shape("cat", "rectangle", corners))
            np.testing.assert_array_equal(source.mask("a", 1), block(slice(5, 16), slice(10, 21)))

    def test_polygon_is_a_triangle(self, build: Build) -> None:
        mask = build(shape("cat", "polygon", [[10, 10], [30, 10], [10, 30]])).mask("a", 1)
        expected = np.zeros_like(mask)
        for row in range(10, 31):
            expected[row, 10 : 10 + (30 - row) + 1] = 1
        np.testing.assert_array_equal(mask, expected)

    def test_circle_is_centre_and_rim(self, build: Build) -> None:
        mask = build(shape("cat", "circle", [[30, 20], [30 + 6, 20 + 8]])).mask("a", 1)
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        distance = np.hypot(rows - 20, columns - 30)
        assert (mask[distance < 9.5] == 1).all()
        assert (mask[distance > 10.8] == 0).all()

    def test_mask_in_its_box(self, build: Build) -> None:
        part = np.zeros((4, 5), dtype=np.uint8)
        part[1:3, ::2] = 255
        for values in (part, part // 255):  # LabelMe writes 0 and 255, others 0 and 1
            drawn = shape("cat", "mask", [[7, 3], [11, 6]], mask=encoded(Image.fromarray(values)))
            expected = block(slice(0), slice(0))
            expected[3:7, 7:12] = part > 0
            np.testing.assert_array_equal(build(drawn).mask("a", 1), expected)

    def test_mask_over_the_edge_is_cut(self, build: Build) -> None:
        drawn = shape("cat", "mask", [[50, 30], [69, 49]], mask=encoded(Image.new("1", (20, 20), 1)))
        np.testing.assert_array_equal(build(drawn).mask("a", 1), block(slice(30, 40), slice(50, 60)))

    def test_shapes_unite_and_do_not_cut_other_classes(self, build: Build) -> None:
        other = shape("dog", "rectangle", [[0, 0], [15, 39]])
        source = build(CAT, shape("cat", "rectangle", [[18, 5], [25, 8]]), other)
        expected = block(slice(5, 16), slice(10, 21)) | block(slice(5, 9), slice(18, 26))
        np.testing.assert_array_equal(source.mask("a", 1), expected)
        np.testing.assert_array_equal(source.mask("a", 2), block(slice(0, 40), slice(0, 16)))
        for class_id, mask in source.class_masks("a").items():
            np.testing.assert_array_equal(mask, source.mask("a", class_id))

    def test_ignore_is_for_all_classes(self, build: Build) -> None:
        source = build(
            shape("__ignore__", "rectangle", [[15, 0], [60, 40]]), CAT, shape("_background_", "point", [[1, 1]])
        )
        assert source.class_names == {1: "cat", 2: "dog"}
        for class_id in (1, 2):
            mask = source.mask("a", class_id)
            assert (mask[:, 15:] == 255).all()
            assert not (mask[:, :15] == 255).any()
        assert source.class_areas("a") == {1: 11 * 5}

    def test_untyped_shapes_of_old_files_are_polygons(self, build: Build) -> None:
        old = {"label": "cat", "points": [[0, 0], [9, 0], [9, 9], [0, 9]]}
        source = build(old, imageHeight=None, imageWidth=None)
        assert source.class_areas("a") == {1: 100}

    def test_travels_light(self, build: Build) -> None:
        source = build(CAT, imageData=encoded(Image.effect_noise((WIDTH, HEIGHT), 90)))
        source.mask("a", 1)
        data = pickle.dumps(source)
        assert len(data) < 1000
        np.testing.assert_array_equal(pickle.loads(data).mask("a", 1), source.mask("a", 1))

    def test_fingerprint(self, build: Build) -> None:
        source = build(CAT)
        seen = {source.fingerprint(["a"]), source.fingerprint(["a", "b"]), source.fingerprint(["a", "b"])}
        assert len(seen) == 2
        for name in ("b.jpg", "b.json"):
            path = source.root / name
            path.write_bytes(path.read_bytes() + b" ")
            seen.add(source.fingerprint(["a", "b"]))
        (source.root / "classes.txt").write_text("dog\ncat\n")
        seen.add(LabelmeSource(source.root).fingerprint(["a", "b"]))  # other class ids
        assert len(seen) == 5


class TestPhotos:
    def test_photo_of_the_same_name_when_image_path_leads_out(self, build: Build) -> None:
        source = build(CAT, imagePath="..\\elsewhere\\a.jpg")
        with Image.open(source.root / "a.jpg") as picture:
            np.testing.assert_array_equal(source.image("a"), np.asarray(picture))

    def test_photo_in_a_subfolder(self, build: Build) -> None:
        source = build(CAT, imagePath="photos\\one.png")
        (source.root / "photos").mkdir()
        Image.new("RGB", (WIDTH, HEIGHT), "red").save(source.root / "photos" / "one.png")
        assert (source.image("a") == (255, 0, 0)).all()

    def test_embedded_photo(self, build: Build) -> None:
        source = build(CAT, imageData=encoded(Image.new("RGB", (WIDTH, HEIGHT), "blue")))
        (source.root / "a.jpg").unlink()
        assert (source.image("a") == (0, 0, 255)).all()
        assert source.mask("a", 1).shape == (HEIGHT, WIDTH)
        assert source.fingerprint(["a"])

    def test_photos_are_upright(self, build: Build) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        sideways = Image.new("RGB", (HEIGHT, WIDTH), "red")
        source = build(CAT, imageData=encoded(sideways, "JPEG", exif=exif))
        sideways.save(source.root / "a.jpg", exif=exif)
        for _ in range(2):
            assert source.image("a").shape == (HEIGHT, WIDTH, 3)
            assert source.mask("a", 1).shape == (HEIGHT, WIDTH)
            (source.root / "a.jpg").unlink(missing_ok=True)  # the second time, the embedded one

    def test_no_photo(self, build: Build) -> None:
        source = build(CAT)
        (source.root / "a.jpg").unlink()
        for read in (source.image, lambda name: source.mask(name, 1), lambda name: source.fingerprint([name])):
            with pytest.raises(SourceError, match=r"a\.jpg: no such file") as caught:
                read("a")
            assert caught.value.kind == "missing"

    @pytest.mark.parametrize("path", ["../secret.jpg", "/etc/x.jpg", None, 3, ""])
    def test_no_safe_photo(self, build: Build, path: object) -> None:
        source = build(CAT, imagePath=path)
        (source.root / "a.jpg").unlink()
        with pytest.raises(
            SourceError, match=r"a\.json: imagePath names no photo inside the folder.*as a\.jpg"
        ) as caught:
            source.image("a")
        assert caught.value.kind == "unsafe-name"

    def test_photo_of_another_size(self, build: Build) -> None:
        source = build(CAT, imageHeight=41)
        with pytest.raises(SourceError, match=r"a\.json: it says 60x41, its photo is 60x40 pixels") as caught:
            source.mask("a", 1)
        assert caught.value.kind == "size-mismatch"


class TestAnnotations:
    def test_point(self, build: Build) -> None:
        source = build(shape("cat", "point", [[30, 20]]), shape("dog", "point", [[5, 5]]))
        drawn = source.annotation("a", 1, "point")
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        distance = np.hypot(rows - 20, columns - 30)
        assert set(np.unique(drawn)) == {1, 255}
        assert (drawn[distance <= 2] == 1).all()
        assert (drawn[distance > 2.9] == 255).all()
        assert source.class_areas("a") == {}
        assert not source.mask("a", 1).any()

    def test_point_grows_with_the_photo(self, build: Build) -> None:
        source = build(shape("cat", "point", [[500, 300]]), imageHeight=600, imageWidth=900)
        Image.new("RGB", (900, 600)).save(source.root / "a.jpg")
        drawn = source.annotation("a", 1, "point")
        assert int((drawn == 1).sum()) == pytest.approx(np.pi * 6**2, rel=0.2)

    @pytest.mark.parametrize("kind", ["line", "linestrip"])
    def test_scribble(self, build: Build, kind: str) -> None:
        drawn = build(shape("cat", kind, [[10, 20], [40, 20]])).annotation("a", 1, "scribble")
        expected = np.full((HEIGHT, WIDTH), 255)
        expected[19:22, 10:41] = 1
        np.testing.assert_array_equal(drawn, expected)

    def test_box(self, build: Build) -> None:
        source = build(CAT, shape("cat", "rectangle", [[40, 30], [50, 35]]), shape("cat", "point", [[0, 0]]))
        expected = 255 * (block(slice(5, 16), slice(10, 21)) | block(slice(30, 36), slice(40, 51)))
        np.testing.assert_array_equal(source.annotation("a", 1, "box"), expected)

    def test_label_from_any_shape_or_flag(self, build: Build) -> None:
        source = build(shape("cat", "point", [[3, 3]]), flags={"dog": True, "blurred": True, "fox": False})
        for class_id in (1, 2):
            drawn = source.annotation("a", class_id, "label")
            assert drawn.shape == (HEIGHT, WIDTH)
            assert (drawn == 255).all()
        assert build(CAT, flags={"dog": False}).annotation("a", 2, "label") is None

    def test_ignored_pixels_are_not_known(self, build: Build) -> None:
        ignore = shape("__ignore__", "rectangle", [[0, 0], [59, 10]])
        source = build(CAT, ignore, shape("cat", "line", [[30, 0], [30, 39]]))
        assert (source.annotation("a", 1, "box")[:11] == 255).all()
        assert (source.annotation("a", 1, "scribble")[:11] == 255).all()
        assert (source.annotation("a", 1, "scribble")[11:, 30] == 1).all()

    def test_none_when_nothing_is_drawn(self, build: Build) -> None:
        source = build(shape("cat", "polygon", [[0, 0], [5, 0], [5, 5]]))
        assert [source.annotation("a", 1, kind) for kind in ("mask", "box", "scribble", "point")] == [None] * 4
        assert source.annotation("a", 2, "label") is None
        with pytest.raises(DataError, match="class id 3"):
            source.annotation("a", 3, "label")


class TestBadFiles:
    def test_wrong_root_and_names(self, build: Build, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nothing: expected a folder of LabelMe's JSON files, but there is none"):
            LabelmeSource(tmp_path / "nothing")
        with pytest.raises(DataError, match=r"it holds no \*\.json; name the folder that has them"):
            LabelmeSource(tmp_path)
        source = build(CAT)
        for name in ("zzz", "../a", "x/a", "a\0"):
            with pytest.raises(DataError, match="no image "):
                source.image(name)
        with pytest.raises(DataError, match=r"class id 9 is none of this data set's 1\.\.2"):
            source.mask("a", 9)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"not readable as JSON"),
            ("3", "expected a JSON object at the top, found a number"),
            ('{"images": []}', "expected a list 'shapes', found no such key; keep only JSON files of LabelMe"),
            ('{"shapes": [7]}', "shape 1 is a number, expected an object"),
        ],
    )
    def test_no_labelme_at_all(self, build: Build, text: str, message: str) -> None:
        source = build(CAT)
        (source.root / "a.json").write_text(text)
        with pytest.raises(SourceError, match=rf"a\.json: {message}") as caught:
            source.class_areas("a")
        assert caught.value.kind == "bad-annotation"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": None}, "shape 1: expected a label, found None"),
            ({"shape_type": "spline"}, r"shape 1 \('cat'\) is of type 'spline', expected polygon, rectangle"),
            ({"shape_type": ["polygon"]}, r"is of type \['polygon'\]"),
            ({"points": [[1, 2]]}, r"shape 1 \('cat'\): rectangle needs exactly 2 points \[x, y\], found \[\[1, 2\]\]"),
            ({"shape_type": "polygon"}, "polygon needs 3 points or more"),
            ({"shape_type": "circle", "points": [[1, 2, 3], [1, 2, 3]]}, "circle needs exactly 2 points"),
            ({"points": None}, "expected numbers, found None"),
            ({"points": [[1, 2], [3]]}, "expected numbers, found"),
            ({"points": [[1, 2], [3, float("inf")]]}, "expected numbers, found"),
            ({"points": [[1, 2], [3, 1e9]]}, r"coordinate 1e\+09 is far outside the photo of 60x40 pixels"),
            ({"shape_type": "mask"}, r"shape 1 \('cat'\): mask is no picture in base64"),
            ({"shape_type": "mask", "mask": "????"}, "mask is no picture in base64"),
            (
                {"shape_type": "mask", "mask": encoded(Image.new("1", (4, 4), 1))},
                "mask is 4x4 pixels, its corners 10, 5 and 20, 15 span 11x11",
            ),
        ],
    )
    def test_shapes_that_cannot_be_drawn(self, build: Build, change: dict[str, Any], message: str) -> None:
        source = build({**CAT, **change})
        for read in (lambda name: source.mask(name, 1), source.class_masks):
            with pytest.raises(SourceError, match=message) as caught:
                read("a")
            assert (caught.value.kind, Path(caught.value.file).name) == ("bad-annotation", "a.json")

    @pytest.mark.parametrize("sides", [{"imageHeight": "x"}, {"imageWidth": -1}, {"imageWidth": None}])
    def test_bad_size(self, build: Build, sides: dict[str, object]) -> None:
        with pytest.raises(SourceError, match="imageWidth and imageHeight: expected width and height in pixels"):
            build(CAT, **sides).class_areas("a")

    def test_broken_embedded_photo(self, build: Build) -> None:
        source = build(CAT, imageData="no base64")
        (source.root / "a.jpg").unlink()
        with pytest.raises(SourceError, match=r"a\.json: imageData is no picture in base64"):
            source.image("a")

    def test_no_class_anywhere(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps(content()))
        with pytest.raises(DataError, match="no shape in any JSON file has a label of a class; draw some"):
            LabelmeSource(tmp_path).class_names  # noqa: B018
