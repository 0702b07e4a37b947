"""Retrieval layouts, on small data sets written in their formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from episodes.retrieval import RetrievalData, open_retrieval
from episodes.sources import SourceError
from episodes.types import DataError

CUB_CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Groove_billed_Ani")
CAR_CLASSES = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012", "Acura TL Type-S 2008")


def write_photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([*path.name.encode()]).integers(0, 256, (12, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_folders(root: Path) -> None:
    for photo in ("train/Wren/b.JPG", "train/Wren/a.png", "train/Auk/0.jpeg", "test/Kite/1.webp", "test/Emu/1.bmp"):
        write_photo(root / photo)


def write_cub(root: Path) -> None:
    photos = [f"{name}/{name[4:]}_{k}.jpg" for name in CUB_CLASSES for k in range(2)]
    for photo in photos:
        write_photo(root / "images" / photo)
    lines = {
        "classes.txt": [f"{n} {name}" for n, name in enumerate(CUB_CLASSES, start=1)],
        "images.txt": [f"{n} {photo}" for n, photo in enumerate(photos, start=1)],
        "image_class_labels.txt": [f"{n} {(n + 1) // 2}" for n in range(1, 9)],
    }
    for name, content in lines.items():
        (root / name).write_text("\n".join(content) + "\n")


def write_cars(root: Path, classes: tuple[int, ...] = (4, 1, 2, 3, 1)) -> None:
    """As published: a 1 x N struct array with these seven fields, and a 1 x C cell array of names."""
    fields = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
    annotations = np.empty((1, len(classes)), [(field, object) for field in fields])
    for n, number in enumerate(classes):
        photo = f"car_ims/{n + 1:06d}.jpg"
        write_photo(root / photo)
        annotations[0, n] = (photo, 1, 1, 7, 11, np.uint8(number), np.uint8(0))
    names = np.array([CAR_CLASSES], dtype=object)
    savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": names})


def write_sop(root: Path) -> None:
    photos = {"train": ("bicycle_final/1_0.JPG", "bicycle_final/1_1.JPG", "chair_final/2_0.JPG")}
    photos["test"] = ("bicycle_final/3_0.JPG", "chair_final/4_0.JPG", "chair_final/4_1.JPG")
    for split, paths in photos.items():
        rows = ["image_id class_id super_class_id path"]
        for n, path in enumerate(paths, start=1):
            write_photo(root / path)
            rows.append(f"{n} {Path(path).name[0]} {1 + path.startswith('chair')} {path}")
        (root / f"Ebay_{split}.txt").write_text("\n".join(rows) + "\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "folders": write_folders,
    "cub": write_cub,
    "cars": write_cars,
    "sop": write_sop,
}


def pairs(data: RetrievalData) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    train, test = (list(zip(images.files, images.labels, strict=True)) for images in (data.train, data.test))
    return train, test


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="retrieval layouts are folders, cub, cars, sop; got 'birds'"):
        open_retrieval("birds", tmp_path)  # type: ignore[arg-type]


class TestFolders:
    def test_files_labels_and_order(self, tmp_path: Path) -> None:
        write_folders(tmp_path / "birds")
        data = open_retrieval("folders", tmp_path / "birds")
        assert pairs(data) == (
            [("train/Auk/0.jpeg", "Auk"), ("train/Wren/a.png", "Wren"), ("train/Wren/b.JPG", "Wren")],
            [("test/Emu/1.bmp", "Emu"), ("test/Kite/1.webp", "Kite")],
        )
        assert (data.train.name, data.test.name) == ("birds train", "birds test")

    def test_hidden_and_other_files_are_ignored(self, tmp_path: Path) -> None:
        write_folders(tmp_path)
        expected = open_retrieval("folders", tmp_path)
        for stray in ("train/.cache/a.jpg", "train/Wren/.a.jpg", "train/Wren/notes.txt", "test/readme.jpg"):
            (tmp_path / stray).parent.mkdir(exist_ok=True)
            (tmp_path / stray).write_text("no photo")
        assert open_retrieval("folders", tmp_path) == expected

    def test_class_on_both_sides(self, tmp_path: Path) -> None:
        write_folders(tmp_path)
        write_photo(tmp_path / "test" / "Wren" / "c.jpg")
        with pytest.raises(DataError, match=r"1 classes are in train and in test \(Wren\); .*keep each class on one"):
            open_retrieval("folders", tmp_path)

    def test_empty_class_and_split(self, tmp_path: Path) -> None:
        write_folders(tmp_path)
        (tmp_path / "test" / "Owl").mkdir()
        with pytest.raises(SourceError, match=r"test/Owl: expected photos \(\.jpg .*found none") as caught:
            open_retrieval("folders", tmp_path)
        assert caught.value.kind == "empty-class"
        (tmp_path / "test").rename(tmp_path / "elsewhere")
        with pytest.raises(SourceError, match=r"/test: no such file or folder; the layout folders has train, test"):
            open_retrieval("folders", tmp_path)
        (tmp_path / "test").mkdir()
        with pytest.raises(SourceError, match=r"/test: expected a folder of photos per class, found none"):
            open_retrieval("folders", tmp_path)


class TestCub:
    def test_first_half_of_the_classes_trains(self, tmp_path: Path) -> None:
        write_cub(tmp_path / "CUB_200_2011")
        for root in (tmp_path, tmp_path / "CUB_200_2011"):
            data = open_retrieval("cub", root)
            assert data.train.class_names == CUB_CLASSES[:2]
            assert data.test.class_names == CUB_CLASSES[2:]
            assert data.train.files[1] == "images/001.Black_footed_Albatross/Black_footed_Albatross_1.jpg"
            assert data.test.labels == tuple(name for name in CUB_CLASSES[2:] for _ in range(2))
            assert data.test.name == "cub test"

    def test_an_odd_class_tests_and_lists_may_be_in_any_order(self, tmp_path: Path) -> None:
        write_cub(tmp_path)
        for name in ("classes.txt", "images.txt", "image_class_labels.txt"):
            lines = (tmp_path / name).read_text().splitlines()
            (tmp_path / name).write_text("\n".join(reversed(lines[:3] if name == "classes.txt" else lines[:6])))
        data = open_retrieval("cub", tmp_path)
        assert data.train.labels == CUB_CLASSES[:1] * 2
        assert data.test.labels == CUB_CLASSES[2:3] * 2 + CUB_CLASSES[1:2] * 2

    @pytest.mark.parametrize(
        ("file", "old", "new", "message"),
        [
            ("image_class_labels.txt", "3 2\n", "", r"labels\.txt: image 3 of images\.txt has no class"),
            ("image_class_labels.txt", "3 2\n", "3 9\n", r"images\.txt: class 9 of images/002\S+ has no name"),
            ("image_class_labels.txt", "3 2\n", "3 2\n3 1\n", r"labels\.txt: number 3 comes twice"),
            ("image_class_labels.txt", "3 2\n", "3 two\n", r"labels\.txt: expected a whole number, found 'two'"),
            ("images.txt", "1 001", "x 001", r"images\.txt: expected a whole number, found 'x'"),
            ("classes.txt", "2 002", "002", r"classes\.txt: expected 2 columns in line 2, found '002\.Lay"),
            (
                "images.txt",
                "Sooty_Albatross_1",
                "Sooty_9",
                r"Sooty_9\.jpg: listed in images\.txt, but .*\(1 of 4 photos",
            ),
        ],
    )
    def test_damaged_lists(self, file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
        write_cub(tmp_path)
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new))
        with pytest.raises(SourceError, match=message):
            open_retrieval("cub", tmp_path)

    def test_a_list_that_is_no_text(self, tmp_path: Path) -> None:
        write_cub(tmp_path)
        (tmp_path / "classes.txt").write_bytes(b"1 \xff\xfe\n")
        with pytest.raises(SourceError, match=r"classes\.txt: not a readable text file"):
            open_retrieval("cub", tmp_path)

    def test_missing_list_and_paths_that_lead_out(self, tmp_path: Path) -> None:
        write_cub(tmp_path)
        (tmp_path / "images.txt").write_text("1 ../../secret.jpg\n3 002.jpg\n5 003.jpg\n")
        with pytest.raises(DataError, match=r"cub train: expected files below .* got 'images/\.\./\.\./secret\.jpg'"):
            open_retrieval("cub", tmp_path)
        (tmp_path / "images.txt").unlink()
        with pytest.raises(SourceError, match=r"/images\.txt: no such .*layout cub has images\.txt, .*name the folder"):
            open_retrieval("cub", tmp_path)

    def test_one_class_cannot_be_halved(self, tmp_path: Path) -> None:
        write_cub(tmp_path)
        for name, count in (("classes.txt", 1), ("images.txt", 2)):
            (tmp_path / name).write_text("\n".join((tmp_path / name).read_text().splitlines()[:count]))
        with pytest.raises(SourceError, match=r"no photo to train: of 1 classes the first 0 train"):
            open_retrieval("cub", tmp_path)


class TestCars:
    def test_first_half_of_the_classes_trains(self, tmp_path: Path) -> None:
        write_cars(tmp_path)
        data = open_retrieval("cars", tmp_path)
        hummer, sedan, tl, type_s = (f"{n:03d}.{name}" for n, name in enumerate(CAR_CLASSES, start=1))
        assert pairs(data) == (
            [("car_ims/000002.jpg", hummer), ("car_ims/000003.jpg", sedan), ("car_ims/000005.jpg", hummer)],
            [("car_ims/000001.jpg", type_s), ("car_ims/000004.jpg", tl)],
        )

    def test_the_devkit_is_another_layout(self, tmp_path: Path) -> None:
        (tmp_path / "devkit").mkdir()
        (tmp_path / "devkit" / "cars_train_annos.mat").touch()
        with pytest.raises(SourceError, match=r"cars_annos\.mat: no such .*not that of the devkit.*car_ims"):
            open_retrieval("cars", tmp_path)

    def test_damaged_annotations(self, tmp_path: Path) -> None:
        write_cars(tmp_path)
        path = tmp_path / "cars_annos.mat"
        whole = path.read_bytes()
        for damaged in (b"", b"<html>", whole[:300], whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(SourceError, match=r"cars_annos\.mat: not a readable MATLAB file") as caught:
                open_retrieval("cars", tmp_path)
            assert caught.value.kind == "undecodable"

    def test_other_content(self, tmp_path: Path) -> None:
        write_cars(tmp_path)
        fname = np.array([[("000001.jpg", 1)]], [("fname", object), ("class", object)])
        names = np.array([CAR_CLASSES], dtype=object)
        for content in ({"class_names": names}, {"annotations": fname, "class_names": names}, {"annotations": 3.0}):
            savemat(tmp_path / "cars_annos.mat", content)
            with pytest.raises(SourceError, match=r"expected class_names and annotations with relative_im_path"):
                open_retrieval("cars", tmp_path)

    def test_class_without_a_name(self, tmp_path: Path) -> None:
        write_cars(tmp_path, classes=(1, 4, 5))
        with pytest.raises(SourceError, match=r"class 5 of car_ims/000003\.jpg has no name"):
            open_retrieval("cars", tmp_path)

    def test_missing_photos_are_counted(self, tmp_path: Path) -> None:
        write_cars(tmp_path)
        for name in ("000003.jpg", "000005.jpg"):
            (tmp_path / "car_ims" / name).unlink()
        with pytest.raises(SourceError, match=r"000003\.jpg: listed in cars_annos\.mat, .*2 of 3 photos of cars train"):
            open_retrieval("cars", tmp_path)


class TestStanfordOnlineProducts:
    def test_has_its_own_split(self, tmp_path: Path) -> None:
        write_sop(tmp_path / "Stanford_Online_Products")
        for root in (tmp_path, tmp_path / "Stanford_Online_Products"):
            data = open_retrieval("sop", root)
            assert pairs(data) == (
                [("bicycle_final/1_0.JPG", "1"), ("bicycle_final/1_1.JPG", "1"), ("chair_final/2_0.JPG", "2")],
                [("bicycle_final/3_0.JPG", "3"), ("chair_final/4_0.JPG", "4"), ("chair_final/4_1.JPG", "4")],
            )

    def test_damaged_lists(self, tmp_path: Path) -> None:
        write_sop(tmp_path)
        path = tmp_path / "Ebay_train.txt"
        header, first, *_ = path.read_text().splitlines()
        for content in ("", first):
            path.write_text(content)
            with pytest.raises(SourceError, match=r"Ebay_train\.txt: expected the header 'image_id class_id super_cla"):
                open_retrieval("sop", tmp_path)
        path.write_text(header)
        with pytest.raises(SourceError, match=r"Ebay_train\.txt: lists no photo"):
            open_retrieval("sop", tmp_path)
        path.write_text(f"{header}\n1 1 bicycle_final/1_0.JPG\n")
        with pytest.raises(SourceError, match=r"Ebay_train\.txt: expected 4 columns in line 2, found '1 1 bicycle"):
            open_retrieval("sop", tmp_path)


@pytest.mark.cub
def test_the_real_subset(cub_root: Path) -> None:
    data = open_retrieval("folders", cub_root)
    for images in (data.train, data.test):
        assert Counter(Counter(images.labels).values()) == {30: 30}
        assert {images.image(file).shape for file in images.files[::100]} == {(227, 227, 3)}
    assert "Anna_Hummingbird" in data.train.labels
