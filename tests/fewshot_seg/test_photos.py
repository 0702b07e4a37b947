"""Photos and masks as people have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from episodes.types import DataError, UInt8Array
from fewshot_seg.photos import find_queries, output_names, read_object_mask, read_photo, read_support

COLOUR = (200, 40, 90)


def save(path: Path, values: UInt8Array, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    (picture if mode is None else picture.convert(mode)).save(path)
    return path


def flat(height: int = 12, width: int = 20) -> UInt8Array:
    return np.full((height, width, 3), COLOUR, np.uint8)


class TestReadPhoto:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_modes_with_colour(self, tmp_path: Path, mode: str) -> None:
        assert np.array_equal(read_photo(save(tmp_path / "a.png", flat(), mode)), flat())

    def test_palette(self, tmp_path: Path) -> None:
        picture = Image.fromarray(np.full((5, 7), 3, np.uint8))
        picture.putpalette([0, 0, 0] * 3 + list(COLOUR))
        picture.save(tmp_path / "a.png")
        assert np.array_equal(read_photo(tmp_path / "a.png"), flat(5, 7))

    def test_cmyk(self, tmp_path: Path) -> None:
        assert np.abs(read_photo(save(tmp_path / "a.tif", flat(), "CMYK")).astype(int) - flat()).max() <= 2

    def test_grey(self, tmp_path: Path) -> None:
        photo = read_photo(save(tmp_path / "a.png", np.full((5, 7), 77, np.uint8)))
        assert photo.shape == (5, 7, 3)
        assert (photo == 77).all()

    def test_sixteen_bits_are_scaled(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((5, 7), 257 * 77, np.uint16)).save(tmp_path / "a.png")
        assert (read_photo(tmp_path / "a.png") == 77).all()

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparency_goes_on_white(self, tmp_path: Path, mode: str) -> None:
        picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
        picture.save(tmp_path / "a.png")
        assert (read_photo(tmp_path / "a.png") == 255).all()

    def test_exif_orientation(self, tmp_path: Path) -> None:
        values = flat()
        values[0, 0] = 0
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter, clockwise
        Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
        photo = read_photo(tmp_path / "a.png")
        assert photo.shape == (20, 12, 3)
        assert np.array_equal(photo, np.rot90(values, -1))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"a.jpg: no such file; expected a photo"):
            read_photo(tmp_path / "a.jpg")

    def test_damaged(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(b"no photo")
        with pytest.raises(DataError, match=r"a.jpg: photo cannot be decoded"):
            read_photo(tmp_path / "a.jpg")


class TestReadObjectMask:
    def read(self, tmp_path: Path, values: UInt8Array, mode: str | None = None) -> UInt8Array:
        return read_object_mask(save(tmp_path / "m.png", values, mode))

    def test_black_and_white(self, tmp_path: Path) -> None:
        values = np.array([[0, 255, 255, 0]], np.uint8)
        for mode in ("L", "1", "RGB"):
            assert self.read(tmp_path, values, mode).tolist() == [[0, 1, 1, 0]]

    def test_index_mask_with_ignore(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, np.array([[0, 1, 255, 255]], np.uint8)).tolist() == [[0, 1, 255, 255]]

    def test_class_labels(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, np.array([[0, 12, 12, 255]], np.uint8)).tolist() == [[0, 1, 1, 255]]
        assert self.read(tmp_path, np.array([[0, 3, 5, 0]], np.uint8)).tolist() == [[0, 1, 1, 0]]

    def test_palette(self, tmp_path: Path) -> None:
        picture = Image.fromarray(np.array([[0, 7, 255, 255, 255]], np.uint8))
        picture.putpalette(list(range(256)) * 3)
        picture.save(tmp_path / "m.png")
        assert read_object_mask(tmp_path / "m.png").tolist() == [[0, 1, 255, 255, 255]]

    @pytest.mark.parametrize("name", ["m.png", "m.jpg"])
    def test_soft_edges_and_jpeg(self, tmp_path: Path, name: str) -> None:
        picture = Image.new("L", (64, 64))
        ImageDraw.Draw(picture).ellipse((10, 10, 50, 50), fill=255)
        picture.filter(ImageFilter.GaussianBlur(1.5)).save(tmp_path / name)
        mask = read_object_mask(tmp_path / name)
        assert set(np.unique(mask)) == {0, 1}
        assert abs(int(mask.sum()) - np.pi * 20.5**2) < 60

    def test_colour(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"m.png: mask is coloured \(mode RGB\), expected black and white"):
            self.read(tmp_path, flat())


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

    def test_more_marks_than_a_file_name_may_have_letters(self, tmp_path: Path) -> None:
        photo = save(tmp_path / "dog.png", flat(60, 80))
        boxes = [(2 * k, k, 2 * k + 3, k + 4) for k in range(30)]
        joined = "+".join(",".join(map(str, box)) for box in boxes)
        assert len(joined) > 255
        expected = np.zeros((60, 80), np.uint8)
        for left, top, right, bottom in boxes:
            expected[top:bottom, left:right] = 255
        assert np.array_equal(read_support(f"{photo}:box={joined}").marks, expected)
        for mistake in (f"{photo}:boxes={joined}", f"{photo}:scribble={joined}", f"{'dog' * 100}:mask.png"):
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


class TestFindQueries:
    def test_files_folders_and_globs_once_each(self, tmp_path: Path) -> None:
        for name in ("b.jpg", "a.PNG", "notes.txt", "deep/c.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        found = find_queries([str(tmp_path / "b.jpg"), str(tmp_path), str(tmp_path / "**" / "*.jpg")])
        assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b.jpg", "a.PNG", "deep/c.jpg"]

    @pytest.mark.parametrize(
        ("query", "message"),
        [("nothing.jpg", "no such file, folder or match"), ("*.webp", "no such file"), ("", "holds no photos")],
    )
    def test_nothing(self, tmp_path: Path, query: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            find_queries([str(tmp_path / query)])

    def test_no_file_system_has_such_a_name(self) -> None:
        with pytest.raises(DataError, match=r"no such file, folder or match"):
            find_queries(["dog" * 100 + ".jpg"])


@given(st.lists(st.tuples(st.sampled_from(["a", "A", "a_jpg", "b"]), st.sampled_from([".jpg", ".JPG", ".png"]))))
def test_output_names_never_collide(parts: list[tuple[str, str]]) -> None:
    names = output_names([Path(f"{number}/{stem}{suffix}") for number, (stem, suffix) in enumerate(parts)])
    assert len({name.lower() for name in names}) == len(parts)
