"""Supports as they are given on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.types import DataError, UInt8Array
from fewshot_seg import photos
from fewshot_seg.support_photos import read_support, read_supports, split_name

COLOUR = (200, 40, 90)


def save(path: Path, values: UInt8Array) -> Path:
    Image.fromarray(values).save(path)
    return path


def flat(height: int = 12, width: int = 20) -> UInt8Array:
    return np.full((height, width, 3), COLOUR, np.uint8)


class TestReadSupport:
    def pair(self, tmp_path: Path, mask: UInt8Array, name: str = "dog.png") -> str:
        photo = save(tmp_path / name, flat())
        return f"{photo}:{save(tmp_path / 'mask.png', mask)}"

    def test_pair(self, tmp_path: Path) -> None:
        mask = np.zeros((12, 20), np.uint8)
        mask[3:6, 4:9] = 255
        support = read_support(self.pair(tmp_path, mask))
        assert np.array_equal(support.photo, flat())
        assert np.array_equal(support.marks, mask // 255)
        assert support.kind == "mask"

    def test_colons_in_names(self, tmp_path: Path) -> None:
        support = read_support(self.pair(tmp_path, np.ones((12, 20), np.uint8), "12:30:59.png"))
        assert support.photo.shape == (12, 20, 3)
        photo = tmp_path / "12:30:59.png"
        assert read_support(str(photo)).kind == "label"
        assert read_support(f"{photo}:box=1,2,3,4").kind == "box"

    @pytest.mark.parametrize("pair", ["dog.jpg", "dog.jpg:", ":mask.png"])
    def test_no_pair(self, pair: str) -> None:
        with pytest.raises(DataError, match=r"expected PHOTO:MASK, for example dog.jpg:dog_mask.png"):
            read_support(pair)

    def test_sizes_differ(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"mask.png: mask is 20x13, photo dog.png is 20x12 pixels"):
            read_support(self.pair(tmp_path, np.ones((13, 20), np.uint8)))

    def test_empty_mask(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"mask.png: mask shows no object"):
            read_support(self.pair(tmp_path, np.zeros((12, 20), np.uint8)))

    def test_missing_mask(self, tmp_path: Path) -> None:
        photo = save(tmp_path / "dog.png", flat())
        with pytest.raises(DataError, match=r"none.png: no such file; expected a mask"):
            read_support(f"{photo}:{tmp_path / 'none.png'}")

    def test_photo_alone_says_nothing_about_any_pixel(self, tmp_path: Path) -> None:
        support = read_support(str(save(tmp_path / "dog.png", flat())))
        assert support.kind == "label"
        assert np.array_equal(support.marks, np.full((12, 20), 255, np.uint8))

    @pytest.mark.parametrize("text", ["2,3,9,7", "2.4,2.6,9.2,7.0", " 2, 3, 9, 7"])
    def test_box_is_background_outside_and_unknown_inside(self, tmp_path: Path, text: str) -> None:
        support = read_support(f"{save(tmp_path / 'dog.png', flat())}:box={text}")
        expected = np.zeros((12, 20), np.uint8)
        expected[3:7, 2:9] = 255  # columns 2..8, rows 3..6
        assert support.kind == "box"
        assert np.array_equal(support.marks, expected)

    def test_several_boxes(self, tmp_path: Path) -> None:
        support = read_support(f"{save(tmp_path / 'dog.png', flat())}:box=0,0,3,3+18,10,20,12")
        expected = np.zeros((12, 20), np.uint8)
        expected[:3, :3] = expected[10:, 18:] = 255
        assert np.array_equal(support.marks, expected)

    @pytest.mark.parametrize("colours", [[(255, 255, 255)], [(128, 0, 0), (224, 224, 192)]])
    def test_a_mask_is_no_photo(self, tmp_path: Path, colours: list[tuple[int, int, int]]) -> None:
        """A space in place of the colon: --support dog.jpg dog_mask.png."""
        picture = np.zeros((120, 160, 3), np.uint8)
        for number, colour in enumerate(colours):
            picture[80 + 10 * number : 90 + 10 * number, 20:90] = colour  # below the pixels looked at first
        with pytest.raises(DataError, match=r"so it is a mask and no photo; write PHOTO:MASK with a colon"):
            read_support(str(save(tmp_path / "dog_mask.png", picture)))
        picture[:, :, 1] += np.arange(160, dtype=np.uint8)
        assert read_support(str(save(tmp_path / "dog.png", picture))).kind == "label"

    def test_more_marks_than_a_file_name_may_have_letters(self, tmp_path: Path) -> None:
        photo = save(tmp_path / "dog.png", flat(60, 80))
        boxes = [(2 * k, k, 2 * k + 3, k + 4) for k in range(30)]
        joined = "+".join(",".join(map(str, box)) for box in boxes)
        assert len(joined) > 255
        expected = np.zeros((60, 80), np.uint8)
        for left, top, right, bottom in boxes:
            expected[top:bottom, left:right] = 255
        assert np.array_equal(read_support(f"{photo}:box={joined}").marks, expected)
        with pytest.raises(DataError, match=r"no mark 'boxes'; there are box, point and scribble$"):
            read_support(f"{photo}:boxes={joined}")
        for mistake in (f"{photo}:scribble={joined}", f"{'dog' * 100}:mask.png"):
            with pytest.raises(DataError, match=r"no such file; expected a (mask|photo)$"):
                read_support(mistake)

    def test_points_are_discs_of_two_pixels_in_small_photos(self, tmp_path: Path) -> None:
        support = read_support(f"{save(tmp_path / 'dog.png', flat())}:point=5,6+19,0")
        expected = np.full((12, 20), 255, np.uint8)
        for y in range(12):
            for x in range(20):
                if (x - 5) ** 2 + (y - 6) ** 2 <= 4 or (x - 19) ** 2 + y**2 <= 4:
                    expected[y, x] = 1
        assert support.kind == "point"
        assert np.array_equal(support.marks, expected)

    def test_points_grow_with_the_photo(self, tmp_path: Path) -> None:
        support = read_support(f"{save(tmp_path / 'dog.png', flat(500, 800))}:point=400,250")
        assert (support.marks[250] == 1).sum() == 11  # a radius of 1% of the short side: 5 pixels

    def test_scribble_knows_its_strokes_alone(self, tmp_path: Path) -> None:
        strokes = np.zeros((12, 20), np.uint8)
        strokes[4, 2:15] = 255
        photo = save(tmp_path / "dog.png", flat())
        support = read_support(f"{photo}:scribble={save(tmp_path / 'stroke.png', strokes)}")
        assert support.kind == "scribble"
        assert np.array_equal(support.marks, np.where(strokes > 0, 1, 255))

    def test_coordinates_are_of_the_upright_photo(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter: 12 wide and 20 high as people see it
        Image.fromarray(flat()).save(tmp_path / "dog.png", exif=exif)
        assert read_support(f"{tmp_path / 'dog.png'}:point=3,19").marks.shape == (20, 12)
        with pytest.raises(DataError, match=r"19,3 lies outside the photo, which is 12x20 pixels \(upright\)"):
            read_support(f"{tmp_path / 'dog.png'}:point=19,3")

    @pytest.mark.parametrize(
        ("marks", "message"),
        [
            ("box=1,2,3", r"expected box=X0,Y0,X1,Y1 in pixels, got '1,2,3'"),
            ("box=1,2,3,4+5", r"expected box=X0,Y0,X1,Y1 in pixels, got '5'"),
            ("box=5,2,5,4", r"box must be X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1"),
            ("box=1,5,3,4", r"box must be X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1"),
            ("box=1,2,21,4", r"1,2,21,4 lies outside the photo, which is 20x12 pixels"),
            ("box=-1,2,3,4", r"lies outside the photo"),
            ("point=20,3", r"20,3 lies outside the photo, which is 20x12 pixels"),
            ("point=1,12", r"lies outside the photo"),
            ("point=a,b", r"expected point=X,Y in pixels, got 'a,b'"),
            ("point=nan,1", r"expected point=X,Y in pixels"),
            ("point=1e999,1", r"expected point=X,Y in pixels"),
            ("point=1,2,3", r"expected point=X,Y in pixels"),
            ("point=1,2+", r"expected point=X,Y in pixels, got ''"),
            ("scribble=none.png", r"none.png: no such file; expected a mask"),
        ],
    )
    def test_bad_marks(self, tmp_path: Path, marks: str, message: str) -> None:
        photo = save(tmp_path / "dog.png", flat())
        with pytest.raises(DataError, match=message) as raised:
            read_support(f"{photo}:{marks}")
        assert "\n" not in str(raised.value)

    def test_bad_scribbles(self, tmp_path: Path) -> None:
        photo = save(tmp_path / "dog.png", flat())
        for name, size, message in (("s.png", (13, 20), "mask is 20x13"), ("e.png", (12, 20), "shows no object")):
            strokes = save(tmp_path / name, np.zeros(size, np.uint8))
            with pytest.raises(DataError, match=message):
                read_support(f"{photo}:scribble={strokes}")

    def test_marks_of_no_photo(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none.jpg: no such file; expected a photo"):
            read_support(f"{tmp_path / 'none.jpg'}:point=1,1")


class TestReducedSupports:
    @pytest.fixture
    def photo(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Of 400 x 600, worked on as 100 x 150."""
        monkeypatch.setattr(photos, "WORKING_PIXELS", 15_000)
        return save(tmp_path / "dog.png", flat(400, 600))

    def test_mask_of_the_photos_own_size(self, photo: Path, tmp_path: Path) -> None:
        mask = np.zeros((400, 600), np.uint8)
        mask[100:200, 300:500] = 255
        support = read_support(f"{photo}:{save(tmp_path / 'm.png', mask)}")
        expected = np.zeros((100, 150), np.uint8)
        expected[25:50, 75:125] = 1
        assert support.photo.shape == (100, 150, 3)
        assert np.array_equal(support.marks, expected)

    def test_mask_of_the_copys_size_is_refused(self, photo: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"mask is 150x100, photo dog.png is 600x400 pixels"):
            read_support(f"{photo}:{save(tmp_path / 'm.png', np.ones((100, 150), np.uint8))}")

    def test_coordinates_are_of_the_photo(self, photo: Path) -> None:
        box = read_support(f"{photo}:box=300,100,500,200").marks
        assert box.shape == (100, 150)
        assert (box[25:50, 75:125] == 255).all()
        assert box.sum() == 255 * 25 * 50
        point = read_support(f"{photo}:point=599,399").marks
        assert point[99, 149] == 1

    def test_thin_strokes_stay(self, photo: Path, tmp_path: Path) -> None:
        strokes = np.zeros((400, 600), np.uint8)
        strokes[101, 30:90] = 255
        marks = read_support(f"{photo}:scribble={save(tmp_path / 's.png', strokes)}").marks
        assert (marks == 1).sum() >= 15
        assert (marks[25, 8:22] == 1).all()
        assert set(np.unique(marks)) == {1, 255}


class TestNames:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("cat=a.jpg:a.png", ("cat", "a.jpg:a.png")),
            ("tabby cat=a.jpg", ("tabby cat", "a.jpg")),
            ("cat=a.jpg:point=3,4", ("cat", "a.jpg:point=3,4")),
            ("cat=C:/a.jpg:scribble=b.png", ("cat", "C:/a.jpg:scribble=b.png")),
            ("cat=a=b.jpg", ("cat", "a=b.jpg")),
            ("a.jpg:box=1,2,3,4", ("object", "a.jpg:box=1,2,3,4")),
            ("photos/a=b.jpg:a.png", ("object", "photos/a=b.jpg:a.png")),
            ("=a.jpg", ("object", "=a.jpg")),
            (" =a.jpg", ("object", " =a.jpg")),
            ("cat=", ("object", "cat=")),
            ("a.jpg", ("object", "a.jpg")),
        ],
    )
    def test_split(self, text: str, expected: tuple[str, str]) -> None:
        assert split_name(text) == expected

    def test_files_with_such_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        save(tmp_path / "a=b.png", flat())
        for text in ("a=b.png", "a=b.png:mask.png", "a=b.png:point=3,4"):
            assert split_name(text) == ("object", text)
        assert split_name("cat=a=b.png") == ("cat", "a=b.png")

    def test_classes_in_the_order_given(self, tmp_path: Path) -> None:
        photo = save(tmp_path / "p.png", flat())
        read = read_supports([f"dog={photo}", f"cat={photo}:box=1,2,3,4", str(photo), f"dog={photo}:point=1,1"])
        assert {name: [one.kind for one in shown] for name, shown in read.items()} == {
            "dog": ["label", "point"],
            "cat": ["box"],
            "object": ["label"],
        }
        assert list(read) == ["dog", "cat", "object"]
        with pytest.raises(DataError, match=r"--support 'x.jpg': no such photo; expected PHOTO:MASK.*NAME= of its"):
            read_supports(["dog=x.jpg"])
