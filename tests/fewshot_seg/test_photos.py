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
        photo, read = read_support(self.pair(tmp_path, mask))
        assert np.array_equal(photo, flat())
        assert np.array_equal(read, mask // 255)

    def test_colons_in_names(self, tmp_path: Path) -> None:
        photo, _ = read_support(self.pair(tmp_path, np.ones((12, 20), np.uint8), "12:30:59.png"))
        assert photo.shape == (12, 20, 3)

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


@given(st.lists(st.tuples(st.sampled_from(["a", "A", "a_jpg", "b"]), st.sampled_from([".jpg", ".JPG", ".png"]))))
def test_output_names_never_collide(parts: list[tuple[str, str]]) -> None:
    names = output_names([Path(f"{number}/{stem}{suffix}") for number, (stem, suffix) in enumerate(parts)])
    assert len({name.lower() for name in names}) == len(parts)
