"""Labelled photos by themselves, and the contract of every layout that they are opened from."""

from __future__ import annotations

import os
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from episodes.labelled import LabelledImages, find_root, photo_names, split_labels
from episodes.reidentification import ReidentificationData, open_reidentification
from episodes.retrieval import RetrievalData, open_retrieval
from episodes.sources import SourceError
from episodes.types import DataError

# Each layout's small data set is written by the tests of its module.
RETRIEVAL, REIDENTIFICATION = (
    runpy.run_path(str(Path(__file__).with_name(name)))["WRITERS"]
    for name in ("test_retrieval.py", "test_reidentification.py")
)
LAYOUTS: dict[str, Callable[[Path], None]] = {**RETRIEVAL, **REIDENTIFICATION}


def collection(
    labels: list[str], cameras: tuple[int, ...] | None = None, root: Path = Path("photos")
) -> LabelledImages:
    files = tuple(f"{n}.jpg" for n in range(len(labels)))
    return LabelledImages(name="birds", root=root, files=files, labels=tuple(labels), cameras=cameras)


def open_layout(layout: str, root: Path) -> tuple[LabelledImages, ...]:
    """Train first, then what is tested on."""
    data: RetrievalData | ReidentificationData
    if layout in RETRIEVAL:
        data = open_retrieval(layout, root)  # type: ignore[arg-type]
        return data.train, data.test
    data = open_reidentification(layout, root)  # type: ignore[arg-type]
    return data.train, data.query, data.gallery


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    LAYOUTS[request.param](tmp_path / "data")
    return str(request.param)


class TestLayoutContract:
    def test_there_are_seven(self) -> None:
        assert sorted(LAYOUTS) == ["cars", "cub", "cuhk03-np", "dukemtmc", "folders", "market1501", "sop"]

    def test_fields_agree(self, layout: str, tmp_path: Path) -> None:
        for images in open_layout(layout, tmp_path / "data"):
            assert len(images) == len(images.files) == len(images.labels) == len(images.codes) > 0
            assert images.cameras is None or len(images.cameras) == len(images)
            assert (images.cameras is None) == (layout in RETRIEVAL)
            assert [images.class_names[code] for code in images.codes] == list(images.labels)
            assert images.name

    def test_every_listed_photo_decodes(self, layout: str, tmp_path: Path) -> None:
        for images in open_layout(layout, tmp_path / "data"):
            for file in images.files:
                photo = images.image(file)
                assert photo.dtype == np.uint8
                assert photo.shape == (12, 8, 3)
                np.testing.assert_array_equal(photo, np.asarray(Image.open(images.root / file).convert("RGB")))

    def test_tested_labels_are_not_trained_on(self, layout: str, tmp_path: Path) -> None:
        train, *tested = open_layout(layout, tmp_path / "data")
        for images in tested:
            assert set(train.labels).isdisjoint(images.labels)
            assert set(train.files).isdisjoint(images.files)
            assert train.root == images.root

    def test_opens_the_same_each_time(self, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = open_layout(layout, tmp_path / "data")
        monkeypatch.chdir(tmp_path)
        assert open_layout(layout, Path("data")) == opened
        assert open_layout(layout, "data") == opened  # type: ignore[arg-type]
        assert all(images.root.is_absolute() for images in opened)

    def test_fingerprint_follows_the_files(self, layout: str, tmp_path: Path) -> None:
        for images in open_layout(layout, tmp_path / "data"):
            before = images.fingerprint(images.files)
            assert images.fingerprint(images.files) == before
            path = images.root / images.files[-1]
            path.write_bytes(path.read_bytes() + b"more")
            assert images.fingerprint(images.files) != before

    def test_travels_into_workers(self, layout: str, tmp_path: Path) -> None:
        for images in open_layout(layout, tmp_path / "data"):
            copy = pickle.loads(pickle.dumps(images))
            assert copy == images
            np.testing.assert_array_equal(copy.image(images.files[0]), images.image(images.files[0]))

    def test_unknown_id_is_named(self, layout: str, tmp_path: Path) -> None:
        for images in open_layout(layout, tmp_path / "data"):
            for read in (images.image, lambda file, images=images: images.fingerprint([file])):
                with pytest.raises(SourceError, match=r"nowhere\.jpg: no such file"):
                    read("nowhere.jpg")

    def test_missing_root_is_named_with_the_layout(self, layout: str, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=rf"elsewhere/\S+: no such file or folder; the layout {layout} .*has "):
            open_layout(layout, tmp_path / "elsewhere")


class TestFields:
    def test_codes_are_positions_in_the_sorted_names(self) -> None:
        images = collection(["wren", "auk", "wren", "kite"])
        assert images.class_names == ("auk", "kite", "wren")
        assert images.codes.dtype == np.int64
        assert images.codes.tolist() == [2, 0, 2, 1]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": ("auk",)}, "birds: expected one of labels per file, got 1 for 2"),
            ({"cameras": (1, 2, 3)}, "expected one of cameras per file, got 3 for 2"),
            ({"files": (), "labels": ()}, "at least one photo, got none"),
            ({"files": ("a.jpg", "a.jpg")}, r"a\.jpg is listed twice"),
            ({"files": ("a.jpg", "/a.jpg")}, r"expected files below photos, got '/a\.jpg'"),
            ({"files": ("a.jpg", "b/../../a.jpg")}, r"got 'b/\.\./\.\./a\.jpg'"),
            ({"files": ("a.jpg", "")}, "got ''"),
            ({"labels": ("auk", "")}, r"b\.jpg has an empty label"),
        ],
    )
    def test_bad_fields(self, changes: dict[str, tuple[str, ...]], message: str) -> None:
        good = {"name": "birds", "root": Path("photos"), "files": ("a.jpg", "b.jpg"), "labels": ("auk", "kite")}
        LabelledImages(**good)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message):
            LabelledImages(**(good | changes))  # type: ignore[arg-type]


class TestImage:
    def save(self, picture: Image.Image, folder: Path, name: str, **options: object) -> LabelledImages:
        picture.save(folder / name, **options)  # type: ignore[arg-type]
        return LabelledImages(name="one", root=folder, files=(name,), labels=("x",))

    def test_orientation_of_the_camera(self, tmp_path: Path) -> None:
        stored = np.zeros((16, 32, 3), np.uint8)
        stored[:, :16, 0] = 255  # left half red
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        images = self.save(Image.fromarray(stored), tmp_path, "turned.png", exif=exif)
        np.testing.assert_array_equal(images.image("turned.png"), np.rot90(stored, -1))

    @pytest.mark.parametrize(
        ("mode", "colour", "expected"),
        [
            ("L", 90, (90, 90, 90)),
            ("1", 1, (255, 255, 255)),
            ("LA", (90, 255), (90, 90, 90)),
            ("RGBA", (10, 200, 30, 255), (10, 200, 30)),
            ("RGBA", (10, 200, 30, 0), (255, 255, 255)),
            ("I;16", 257 * 90, (90, 90, 90)),
        ],
    )
    def test_colour_modes(
        self, mode: str, colour: float | tuple[int, ...], expected: tuple[int, int, int], tmp_path: Path
    ) -> None:
        images = self.save(Image.new(mode, (3, 2), colour), tmp_path, "photo.png")
        np.testing.assert_array_equal(images.image("photo.png"), np.full((2, 3, 3), expected))

    def test_palette_with_a_transparent_entry(self, tmp_path: Path) -> None:
        picture = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        picture.putpalette([200, 10, 10, 10, 10, 200])
        images = self.save(picture, tmp_path, "photo.png", transparency=1)
        assert images.image("photo.png").tolist() == [[[200, 10, 10], [255, 255, 255]]]

    def test_cmyk(self, tmp_path: Path) -> None:
        images = self.save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path, "photo.jpg", quality=100)
        np.testing.assert_allclose(images.image("photo.jpg"), np.full((16, 16, 3), (255, 0, 0)), atol=3)

    def test_damaged_photo_is_named(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        images = self.save(Image.fromarray(noise), tmp_path, "photo.jpg")
        path = tmp_path / "photo.jpg"
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(SourceError, match=r"photo\.jpg: photo cannot be decoded \(.*truncated") as caught:
            images.image("photo.jpg")
        assert caught.value.kind == "undecodable"
        path.write_text("<html>not found</html>")
        with pytest.raises(SourceError, match=r"photo\.jpg: photo cannot be decoded"):
            images.image("photo.jpg")


class TestFingerprint:
    @pytest.fixture
    def images(self, tmp_path: Path) -> LabelledImages:
        for name in ("0.jpg", "1.jpg"):
            (tmp_path / name).write_bytes(b"same")
            os.utime(tmp_path / name, ns=(10**18, 10**18))
        return collection(["auk", "kite"], root=tmp_path)

    def test_depends_on_names_order_and_content(self, images: LabelledImages) -> None:
        both = images.fingerprint(["0.jpg", "1.jpg"])
        assert len({both, images.fingerprint(["1.jpg", "0.jpg"]), images.fingerprint(["0.jpg"])}) == 3
        assert images.fingerprint(["0.jpg"]) != images.fingerprint(["1.jpg"])
        os.utime(images.root / "1.jpg", ns=(10**18, 10**18 + 1000))
        assert images.fingerprint(["0.jpg", "1.jpg"]) == both
        (images.root / "1.jpg").write_bytes((images.root / "0.jpg").read_bytes() + b" ")
        assert images.fingerprint(["0.jpg", "1.jpg"]) != both

    def test_does_not_depend_on_the_place(self, images: LabelledImages, tmp_path: Path) -> None:
        before = images.fingerprint(images.files)
        (tmp_path / "moved").mkdir()
        for file in images.files:
            (tmp_path / file).rename(tmp_path / "moved" / file)
        assert collection(["auk", "kite"], root=tmp_path / "moved").fingerprint(images.files) == before


class TestSelect:
    def test_keeps_order_and_cameras(self) -> None:
        images = collection(["wren", "auk", "wren", "kite"], cameras=(1, 2, 3, 4))
        chosen = images.select({"kite", "wren"})
        assert chosen.files == ("0.jpg", "2.jpg", "3.jpg")
        assert chosen.labels == ("wren", "wren", "kite")
        assert chosen.cameras == (1, 3, 4)
        assert (chosen.name, chosen.root) == (images.name, images.root)
        assert collection(["wren"]).select(["wren"]).cameras is None

    def test_unknown_or_no_label(self) -> None:
        images = collection(["wren", "auk"])
        with pytest.raises(DataError, match="birds: expected labels such as auk, wren; got emu, owl"):
            images.select(["owl", "wren", "emu"])
        with pytest.raises(DataError, match="expected labels such as auk, wren; got none"):
            images.select([])


LABELS = st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=40).filter(lambda labels: len(set(labels)) > 1)


class TestSplitLabels:
    @given(LABELS, st.floats(0.01, 0.99), st.integers(0, 2**40))
    def test_disjoint_exhaustive_and_deterministic(self, labels: list[str], fraction: float, seed: int) -> None:
        images = collection(labels, cameras=tuple(range(len(labels))))
        kept, held_out = split_labels(images, fraction=fraction, seed=seed)
        assert set(kept.labels).isdisjoint(held_out.labels)
        together = sorted(
            row for part in (kept, held_out) for row in zip(part.files, part.labels, part.cameras or (), strict=True)
        )
        assert together == sorted(zip(images.files, images.labels, images.cameras or (), strict=True))
        assert (kept, held_out) == split_labels(images, fraction=fraction, seed=seed)
        classes, held = len(images.class_names), len(held_out.class_names)
        assert 1 <= held <= classes - 1
        assert held in (1, classes - 1) or abs(held - fraction * classes) <= 0.5

    def test_a_third_by_default_and_names(self) -> None:
        kept, held_out = split_labels(collection([f"{n:02d}" for n in range(30)]))
        assert (len(kept.class_names), len(held_out.class_names)) == (20, 10)
        assert (kept.name, held_out.name) == ("birds (kept)", "birds (held out)")

    def test_depends_on_the_seed_and_on_names_alone(self) -> None:
        names = [f"{n:02d}" for n in range(30)]
        drawn = {split_labels(collection(names), seed=seed)[1].class_names for seed in range(5)}
        assert len(drawn) == 5
        backwards = split_labels(collection(names[::-1] * 2), seed=3)[1]
        assert backwards.class_names == split_labels(collection(names), seed=3)[1].class_names

    def test_bad_requests(self) -> None:
        with pytest.raises(DataError, match="birds: a split by class needs at least 2 classes, got only 'auk'"):
            split_labels(collection(["auk", "auk"]))
        for fraction in (0.0, 1.0, float("nan")):
            with pytest.raises(DataError, match=f"fraction must be between 0 and 1, got {fraction}"):
                split_labels(collection(["auk", "kite"]), fraction=fraction)
        with pytest.raises(DataError, match="seed must not be negative, got -1"):
            split_labels(collection(["auk", "kite"]), seed=-1)


class TestFolders:
    def test_photo_names(self, tmp_path: Path) -> None:
        for name in ("b.JPG", "a.jpeg", "c.png", "d.BMP", "e.webp", "f.tif", "g.TIFF"):
            (tmp_path / name).touch()
        expected = photo_names(tmp_path)
        for name in ("._b.JPG", "Thumbs.db", "notes.txt", "jpg"):
            (tmp_path / name).touch()
        (tmp_path / "folder.jpg").mkdir()
        assert photo_names(tmp_path) == expected == ["a.jpeg", "b.JPG", "c.png", "d.BMP", "e.webp", "f.tif", "g.TIFF"]

    def test_find_root_names_what_is_missing_where_most_is(self, tmp_path: Path) -> None:
        (tmp_path / "inner" / "photos").mkdir(parents=True)
        (tmp_path / "inner" / "list.txt").mkdir()  # a folder of that name is not the file
        with pytest.raises(SourceError, match=r"inner/list\.txt: no such file .*layout some has list\.txt, photos"):
            find_root(tmp_path, ("inner",), ("list.txt", "photos"), "some")
        (tmp_path / "inner" / "list.txt").rmdir()
        (tmp_path / "inner" / "list.txt").touch()
        assert find_root(tmp_path, ("inner",), ("list.txt", "photos"), "some") == (tmp_path / "inner").resolve()
