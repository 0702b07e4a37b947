"""A folder of one's own: forms of masks, names of classes, marks, and whatever people get wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from episodes.sources import FolderSource, SourceError
from episodes.sources.folder_layout import read_class_names
from episodes.sources.marks import box_annotation
from episodes.types import DataError, SupportKind, WeaklyAnnotated
from episodes.verify import verify

SIZE = (20, 14)
EXIF_ORIENTATION = 0x0112


def draw(path: Path, *patches: tuple[int, int, int, int, int], mode: str = "L") -> Path:
    """Patches are (left, top, right, bottom, value)."""
    pixels = np.zeros(SIZE[::-1], dtype=np.uint8)
    for left, top, right, bottom, value in patches:
        pixels[top:bottom, left:right] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture.putpalette(bytes(range(256)) * 3)
    (picture if mode == "P" else picture.convert(mode)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    (root / "images").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b c.JPEG", "d.png", "e.bmp", "f.tif", "g.webp")):
        Image.new("RGB", SIZE, (30 * number, 99, 0)).save(root / "images" / name)
    (root / "images" / "notes.txt").write_text("no photo")
    (root / "images" / ".hidden.jpg").write_text("no photo")
    (root / "masks").mkdir()
    return root


@pytest.fixture
def index(photos: Path) -> Path:
    (photos / "classes.txt").write_text("cat\ndog\n")
    draw(photos / "masks" / "a.png", (2, 3, 7, 9, 1), (10, 3, 15, 9, 2), (0, 13, 20, 14, 255))
    draw(photos / "masks" / "b c.png", (2, 3, 7, 9, 2), mode="P")
    return photos


class TestForms:
    def test_index_masks_with_names(self, index: Path) -> None:
        source = FolderSource(index)
        assert source.class_names == {1: "cat", 2: "dog"}
        assert source.class_areas("a") == {1: 30, 2: 30}
        assert source.class_areas("b c") == {2: 30}
        mask = source.mask("a", 2)
        assert (mask == 1).sum() == 30
        assert (mask[13] == 255).all()

    def test_one_folder_per_class(self, photos: Path) -> None:
        draw(photos / "masks" / "dog" / "a.png", (2, 3, 7, 9, 1))
        draw(photos / "masks" / "cat" / "a.png", (5, 3, 10, 9, 255))
        draw(photos / "masks" / "cat" / "d.png")  # black: no cat
        source = FolderSource(photos)
        assert source.class_names == {1: "cat", 2: "dog"}
        assert source.class_areas("a") == {1: 30, 2: 30}
        assert (source.mask("a", 1) & source.mask("a", 2)).sum() == 12  # objects may overlap in this form
        assert source.class_areas("d") == {}

    def test_one_folder_per_class_numbered_by_a_names_file(self, photos: Path) -> None:
        draw(photos / "masks" / "dog" / "a.png", (2, 3, 7, 9, 1))
        (photos / "classes.txt").write_text("12 dog\n3 cat\n")
        source = FolderSource(photos)
        assert source.class_names == {3: "cat", 12: "dog"}
        assert source.class_areas("a") == {12: 30}

    def test_masks_alone(self, photos: Path) -> None:
        draw(photos / "masks" / "a.png", (2, 3, 7, 9, 255), mode="RGB")
        source = FolderSource(photos)
        assert source.class_names == {1: "object"}
        assert source.class_areas("a") == {1: 30}

    def test_soft_edges_count_from_128(self, photos: Path) -> None:
        ramp = np.tile(np.arange(20, dtype=np.uint8) * 13, (14, 1))
        ramp[:7] = np.arange(140, dtype=np.uint8).reshape(7, 20)
        Image.fromarray(ramp).save(photos / "masks" / "a.png")
        np.testing.assert_array_equal(FolderSource(photos).mask("a", 1), ramp >= 128)

    def test_black_and_white_with_the_name_of_one_class(self, photos: Path) -> None:
        (photos / "classes.txt").write_text("7 leaf\n")
        draw(photos / "masks" / "a.png", (2, 3, 7, 9, 255))
        draw(photos / "masks" / "d.png", (2, 3, 7, 9, 7))
        source = FolderSource(photos)
        assert source.class_areas("a") == source.class_areas("d") == {7: 30}

    def test_photo_without_mask(self, index: Path) -> None:
        source = FolderSource(index)
        assert source.class_areas("g") == source.class_masks("g") == {}
        np.testing.assert_array_equal(source.mask("g", 1), np.zeros((14, 20)))

    def test_every_kind_of_photo(self, index: Path) -> None:
        source = FolderSource(index)
        assert source.ids("all") == ("a", "b c", "d", "e", "f", "g")
        assert all(source.image(image_id).shape == (14, 20, 3) for image_id in source.ids("all"))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_photos_are_seen_upright(self, photos: Path, orientation: int) -> None:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        lying = orientation >= 5
        Image.new("RGB", SIZE[::-1] if lying else SIZE).save(photos / "images" / "a.jpg", exif=exif)
        draw(photos / "masks" / "a.png", (2, 3, 7, 9, 255))
        source = FolderSource(photos)
        assert source.image("a").shape[:2] == source.mask("a", 1).shape == (14, 20)

    def test_splits(self, index: Path) -> None:
        (index / "splits").mkdir()
        (index / "splits" / "train.txt").write_text("b c\na\n")
        assert FolderSource(index).default_splits == ("all", "all")
        (index / "splits" / "test.txt").write_text("d\n")
        source = FolderSource(index)
        assert source.default_splits == ("train", "test")
        assert source.ids("train") == ("b c", "a")


class TestNames:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("cat\nbig dog\n", {1: "cat", 2: "big dog"}),
            ("# mine\n\n7 cat\n2: big dog\n", {2: "big dog", 7: "cat"}),
            ("background\ncat\n", {1: "cat"}),
            ("_background_\ncat\n", {1: "cat"}),
            ("0 background\n1 cat\n", {1: "cat"}),
            ("3d printer\ncat\n", {1: "3d printer", 2: "cat"}),
        ],
    )
    def test_read(self, tmp_path: Path, text: str, expected: dict[int, str]) -> None:
        (tmp_path / "classes.txt").write_text(text)
        assert read_class_names(tmp_path / "classes.txt") == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "names no class"),
            ("background\n", "names no class"),
            ("1 cat\ndog\n", "line 2 has no number, others have; number every line or none"),
            ("1 cat\n1 dog\n", r"line 2: class 1 \(dog\) is out of 1\.\.253 or given before"),
            ("1 cat\n2 cat\n", r"line 2: class 2 \(cat\)"),
            ("0 cat\n", r"line 1: class 0 \(cat\)"),
            ("254 cat\n", r"line 1: class 254 \(cat\)"),
        ],
    )
    def test_refused(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(SourceError, match=rf"classes\.txt: {message}"):
            read_class_names(tmp_path / "classes.txt")


def _index_marks(root: Path, folder: str) -> None:
    draw(root / folder / "a.png", (3, 4, 5, 5, 1), (11, 4, 12, 6, 2), (18, 0, 19, 4, 254), (0, 0, 2, 2, 255))


def _class_marks(root: Path, folder: str) -> None:
    draw(root / folder / "cat" / "a.png", (3, 4, 5, 5, 255))
    draw(root / folder / "dog" / "a.png", (11, 4, 12, 6, 1))


class TestMarks:
    def test_is_weakly_annotated(self, index: Path) -> None:
        assert isinstance(FolderSource(index), WeaklyAnnotated)

    @pytest.mark.parametrize("kind", ["scribble", "point"])
    @pytest.mark.parametrize("marks", [_index_marks, _class_marks])
    def test_strokes(self, index: Path, marks: Callable[[Path, str], None], kind: SupportKind) -> None:
        marks(index, f"{kind}s")
        source = FolderSource(index)
        expected = np.full((14, 20), 255, dtype=np.uint8)
        expected[4:6, 11] = 1
        if marks is _index_marks:
            expected[:4, 18] = 0
        drawn = source.annotation("a", 2, kind)
        assert drawn is not None
        assert drawn.dtype == np.uint8
        np.testing.assert_array_equal(drawn, expected)
        assert source.annotation("d", 2, kind) is None

    def test_class_without_a_stroke_in_an_index_picture(self, index: Path) -> None:
        draw(index / "scribbles" / "a.png", (3, 4, 5, 5, 1))
        assert FolderSource(index).annotation("a", 2, "scribble") is None

    @pytest.mark.parametrize("marks", [_index_marks, _class_marks])
    def test_boxes(self, index: Path, marks: Callable[[Path, str], None]) -> None:
        marks(index, "boxes")
        expected = np.zeros((14, 20), dtype=np.uint8)
        expected[4, 3:5] = 255
        np.testing.assert_array_equal(FolderSource(index).annotation("a", 1, "box"), expected)

    def test_outlines_and_several_boxes(self, photos: Path) -> None:
        draw(photos / "masks" / "a.png", (2, 3, 7, 9, 255))
        draw(photos / "boxes" / "a.png", (2, 3, 8, 9, 255), (3, 4, 7, 8, 0), (12, 1, 15, 4, 255))
        expected = np.zeros((14, 20), dtype=np.uint8)
        expected[3:9, 2:8] = expected[1:4, 12:15] = 255
        np.testing.assert_array_equal(FolderSource(photos).annotation("a", 1, "box"), expected)

    @given(arrays(np.bool_, (7, 9), elements=st.booleans()))
    def test_boxes_cover_what_is_drawn_and_keep_apart_what_is_far(self, drawn: np.ndarray) -> None:
        known = box_annotation(drawn)
        assert set(np.unique(known)) <= {0, 255}
        assert (known[drawn] == 255).all()
        rows, columns = drawn.any(axis=1), drawn.any(axis=0)
        assert not known[~rows].any()
        assert not known[:, ~columns].any()

    def test_mask_as_annotation(self, index: Path) -> None:
        source = FolderSource(index)
        np.testing.assert_array_equal(source.annotation("a", 1, "mask"), source.mask("a", 1))
        assert source.annotation("b c", 1, "mask") is None
        assert source.annotation("g", 1, "mask") is None

    def test_labels_of_images(self, index: Path) -> None:
        (index / "classes.txt").write_text("cat\nbig dog\n")
        (index / "labels.txt").write_text('# ID classes\na "big dog"\n"b c" cat "big dog"\nd\n')
        source = FolderSource(index)
        for image_id, class_id, expected in (("a", 2, True), ("a", 1, False), ("b c", 1, True), ("d", 1, False)):
            drawn = source.annotation(image_id, class_id, "label")
            assert (drawn is not None) == expected
            if drawn is not None:
                np.testing.assert_array_equal(drawn, np.full((14, 20), 255))

    def test_marks_alone_do_not_make_a_class_present(self, index: Path) -> None:
        draw(index / "scribbles" / "g.png", (3, 4, 5, 5, 1))
        source = FolderSource(index)
        assert source.class_areas("g") == {}
        assert source.annotation("g", 1, "scribble") is not None

    def test_fingerprint_sees_marks_and_lists(self, index: Path) -> None:
        prints = [FolderSource(index).fingerprint(["a"])]
        for change in (
            lambda: draw(index / "scribbles" / "a.png", (3, 4, 5, 5, 1)),
            lambda: (index / "labels.txt").write_text("a cat\n"),
            lambda: (index / "classes.txt").write_text("dog\ncat\nbird\n"),
        ):
            change()
            prints.append(FolderSource(index).fingerprint(["a"]))
        assert len(set(prints)) == 4

    def test_unknown_class_and_kind(self, index: Path) -> None:
        source = FolderSource(index)
        with pytest.raises(DataError, match=r"class id 3 is not one of this data set's: 1 cat, 2 dog"):
            source.annotation("a", 3, "box")
        with pytest.raises(DataError, match=r"support kind 'boxes' is not one of mask, box"):
            source.annotation("a", 1, "boxes")  # type: ignore[arg-type]


class TestMistakes:
    def test_wrong_root(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nothing: expected a folder with images/ .* but it does not exist"):
            FolderSource(tmp_path / "nothing")
        (tmp_path / "images").mkdir()
        with pytest.raises(DataError, match=r"but it has no masks/; name the folder around them"):
            FolderSource(tmp_path)

    def test_two_photos_of_one_name(self, index: Path) -> None:
        Image.new("RGB", SIZE).save(index / "images" / "a.png")
        with pytest.raises(SourceError, match=r"a\.png: a\.jpg has the same name; give one of them another") as caught:
            FolderSource(index).ids("all")
        assert caught.value.kind == "duplicate"

    def test_pictures_beside_folders(self, index: Path) -> None:
        draw(index / "masks" / "cat" / "a.png", (2, 3, 7, 9, 1))
        with pytest.raises(SourceError, match=r"masks: holds pictures \(a\.png\) beside folders \(cat\); keep either"):
            FolderSource(index)

    def test_folder_that_is_no_class(self, index: Path) -> None:
        draw(index / "scribbles" / "cow" / "a.png", (2, 3, 7, 9, 1))
        with pytest.raises(SourceError, match=r"scribbles/cow: no class 'cow'; this data set has: cat, dog"):
            FolderSource(index)

    def test_marks_that_do_not_say_their_class(self, photos: Path) -> None:
        for name in ("cat", "dog"):
            draw(photos / "masks" / name / "a.png", (2, 3, 7, 9, 1))
        draw(photos / "points" / "a.png", (2, 3, 7, 9, 1))
        with pytest.raises(SourceError, match=r"points: pictures do not say which class they mark; sort them into"):
            FolderSource(photos)

    def test_label_without_a_name(self, index: Path) -> None:
        draw(index / "masks" / "d.png", (2, 3, 7, 9, 5))
        with pytest.raises(SourceError, match=r"d\.png: expected 0, 255 and the classes 1, 2, found 5; name the value"):
            FolderSource(index).class_areas("d")

    def test_mark_of_no_class(self, index: Path) -> None:
        draw(index / "scribbles" / "a.png", (2, 3, 7, 9, 5), (9, 3, 10, 9, 1), (12, 3, 13, 9, 254))
        with pytest.raises(SourceError, match=r"scribbles/a\.png: expected 0, 255 and the classes 1, 2, found 5"):
            FolderSource(index).annotation("a", 1, "scribble")

    def test_jpeg_of_class_ids(self, index: Path) -> None:
        draw(index / "masks" / "d.jpg", (2, 3, 7, 9, 1))
        with pytest.raises(SourceError, match=r"d\.jpg: JPEG changes class ids; save index pictures as PNG"):
            FolderSource(index).class_areas("d")

    def test_coloured_masks(self, index: Path) -> None:
        pixels = np.zeros((14, 20, 3), dtype=np.uint8)
        pixels[3:9, 2:7, 0] = 200
        Image.fromarray(pixels).save(index / "masks" / "d.png")
        with pytest.raises(SourceError, match=r"d\.png: mask is colour-coded \(RGB\)"):
            FolderSource(index).class_areas("d")
        (index / "classes.txt").unlink()
        with pytest.raises(SourceError, match=r"d\.png: mask is coloured \(mode RGB\), expected black and white"):
            FolderSource(index).class_areas("d")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("zzz cat", r"line 1: no photo 'zzz'; write a photo's name without its suffix"),
            ("a cow", r"line 1: no class 'cow'; this data set has: cat, dog"),
            ("a men's", r"line 1 cannot be read \(No closing quotation\); put names with spaces"),
        ],
    )
    def test_bad_labels_of_images(self, index: Path, line: str, message: str) -> None:
        (index / "labels.txt").write_text(line + "\n")
        with pytest.raises(SourceError, match=rf"labels\.txt: {message}"):
            FolderSource(index).annotation("a", 1, "label")

    def test_verify_names_everything(self, index: Path) -> None:
        draw(index / "masks" / "lonely.png", (2, 3, 7, 9, 1))
        draw(index / "points" / "stray.png", (2, 3, 7, 9, 1))
        Image.new("L", (5, 6), 1).save(index / "masks" / "d.png")
        Image.new("L", (5, 6), 1).save(index / "points" / "e.png")
        (index / "images" / "f.tif").write_bytes(b"damaged")
        (index / "labels.txt").write_text("zzz cat\n")
        source = FolderSource(index)
        found = {(Path(p.file).relative_to(index).as_posix(), p.kind) for p in verify(source, "all")}
        assert found == {
            ("masks/lonely.png", "missing"),
            ("points/stray.png", "missing"),
            ("masks/d.png", "size-mismatch"),
            ("points/e.png", "size-mismatch"),
            ("images/f.tif", "undecodable"),
            ("labels.txt", "missing"),
        }
        with pytest.raises(SourceError, match=r"lonely\.png: drawing without a photo images/lonely\.\*"):
            source.class_areas("lonely")

    def test_verify_of_a_sound_folder(self, index: Path) -> None:
        draw(index / "masks" / "d.png", (2, 3, 7, 9, 1))
        _index_marks(index, "scribbles")
        assert verify(FolderSource(index), "all") == []
