"""Photos and masks as people have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from episodes.types import DataError, UInt8Array
from fewshot_seg import photos
from fewshot_seg.photos import find_queries, open_photo, output_names, read_object_mask, read_photo

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

    def test_floats_are_scaled_and_what_is_no_number_is_black(self, tmp_path: Path) -> None:
        values = np.array([[0.0, 0.25, 1.0, np.nan]], np.float32)
        for factor in (1, 255, 65535, 10**6):
            Image.fromarray(values * np.float32(factor)).save(tmp_path / "a.tif")
            assert read_photo(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 64, 255, 0]

    @pytest.mark.parametrize("order", ["<u2", ">u2"])
    def test_sixteen_bits_of_either_byte_order(self, tmp_path: Path, order: str) -> None:
        values = np.array([[0, 257 * 77, 65535]], order)
        Image.frombuffer("I;16B" if order[0] == ">" else "I;16", (3, 1), values.tobytes()).save(tmp_path / "a.tif")
        assert read_photo(tmp_path / "a.tif")[0, :, 2].tolist() == [0, 77, 255]

    def test_thirty_two_bits(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[0, 10**6, 2 * 10**6]], np.int32)).save(tmp_path / "a.tif")
        assert read_photo(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 128, 255]

    def test_cmyk_jpeg_is_stored_inverted(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.jpg", flat(16, 16), "CMYK")
        assert b"Adobe" in path.read_bytes()
        with Image.open(path) as picture:
            assert picture.mode == "CMYK"
        assert np.abs(read_photo(path).astype(int) - COLOUR).max() <= 6

    def test_palette_with_transparency(self, tmp_path: Path) -> None:
        picture = Image.fromarray(np.array([[0, 1, 1]], np.uint8))
        picture.putpalette([0, 0, 0, *COLOUR])
        picture.save(tmp_path / "a.png", transparency=0)
        assert read_photo(tmp_path / "a.png").tolist() == [[[255, 255, 255], list(COLOUR), list(COLOUR)]]

    def test_half_transparent_is_mixed_with_white(self, tmp_path: Path) -> None:
        Image.new("RGBA", (2, 2), (0, 100, 200, 51)).save(tmp_path / "a.png")
        assert read_photo(tmp_path / "a.png")[0, 0].tolist() == [204, 224, 244]

    @pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
    def test_first_picture_of_an_animation(self, tmp_path: Path, name: str) -> None:
        frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(read_photo(tmp_path / name), np.full((7, 9, 3), (255, 0, 0)))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_exif_orientation_of_a_jpeg(self, tmp_path: Path, orientation: int) -> None:
        upright = np.full((24, 40, 3), 20, np.uint8)
        upright[:12, :20] = 230  # bright in the top left quarter
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright),
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.jpg", exif=exif, quality=100)
        photo = open_photo(tmp_path / "a.jpg")
        assert photo.shape == (24, 40)
        assert np.abs(photo.pixels.astype(int) - upright).max() <= 8

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"a.jpg: no such file; expected a photo"):
            read_photo(tmp_path / "a.jpg")

    def test_damaged(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(b"no photo")
        with pytest.raises(DataError, match=r"a.jpg: photo cannot be decoded"):
            read_photo(tmp_path / "a.jpg")


class TestLargePhotos:
    @pytest.fixture
    def _small_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(photos, "MOST_PIXELS", 10_000_000)
        monkeypatch.setattr(photos, "WORKING_PIXELS", 40_000)
        monkeypatch.setattr(photos, "_WORKING_SIDE", 1000)

    def shaded(self, height: int, width: int) -> UInt8Array:
        rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
        return np.stack(np.broadcast_arrays(rows, columns, 128.0), axis=2).astype(np.uint8)

    @pytest.mark.usefixtures("_small_limits")
    @pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
    @pytest.mark.parametrize(("height", "width"), [(800, 1200), (210, 300), (2900, 50)])
    def test_reduced_to_the_limit_and_its_own_size_known(
        self, tmp_path: Path, name: str, height: int, width: int
    ) -> None:
        whole = self.shaded(height, width)
        photo = open_photo(save(tmp_path / name, whole))
        assert photo.shape == (height, width)
        assert photo.reduced
        factor = min((40_000 / (height * width)) ** 0.5, 1000 / height)
        assert photo.scale == pytest.approx(factor, abs=0.01)
        assert photo.pixels.shape == (round(height * factor), round(width * factor), 3)
        expected = self.shaded(*photo.pixels.shape[:2])
        assert np.abs(photo.pixels.astype(int) - expected)[2:-2, 2:-2].max() <= 12
        assert read_photo(tmp_path / name).shape == (height, width, 3)

    @pytest.mark.usefixtures("_small_limits")
    def test_turned_by_exif(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(self.shaded(400, 1600)).save(tmp_path / "a.jpg", exif=exif)
        photo = open_photo(tmp_path / "a.jpg")
        assert photo.shape == (1600, 400)
        assert photo.pixels.shape == (400, 100, 3)

    def test_a_large_jpeg_is_never_decoded_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(photos, "WORKING_PIXELS", 40_000)
        decoded: list[tuple[int, int]] = []

        def rgb(picture: Image.Image) -> UInt8Array:
            decoded.append(picture.size)
            return np.array(picture)

        monkeypatch.setattr(photos, "rgb", rgb)
        assert open_photo(save(tmp_path / "a.jpg", self.shaded(1600, 1600))).pixels.shape == (200, 200, 3)
        assert decoded == [(200, 200)]

    def test_photos_of_the_usual_size_are_not_touched(self, tmp_path: Path) -> None:
        photo = open_photo(save(tmp_path / "a.png", self.shaded(300, 400)))
        assert not photo.reduced
        assert photo.scale == 1
        assert np.array_equal(photo.pixels, self.shaded(300, 400))

    @pytest.mark.usefixtures("_small_limits")
    def test_refused_from_its_head_alone(self, tmp_path: Path) -> None:
        Image.new("1", (5000, 2001)).save(tmp_path / "a.png")
        for read in (open_photo, read_photo, read_object_mask):
            with pytest.raises(DataError, match=r"a.png: .* has 5000x2001 pixels, and at most 10 megapixels are read"):
                read(tmp_path / "a.png")

    @pytest.mark.filterwarnings("error")
    def test_beyond_pillows_limit_which_stays_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        monkeypatch.setattr(photos, "WORKING_PIXELS", 1000)
        for name in ("a.png", "a.gif", "a.tif", "a.webp"):  # Pillow warns above 1000 and refuses above 2000
            for height, width in ((30, 60), (60, 80)):
                assert open_photo(save(tmp_path / name, self.shaded(height, width))).shape == (height, width)
        assert Image.MAX_IMAGE_PIXELS == 1000


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
