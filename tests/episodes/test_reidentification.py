"""Re-identification layouts, on small data sets with names as in the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.labelled import LabelledImages
from episodes.reidentification import ReidentificationData, open_reidentification
from episodes.sources import SourceError
from episodes.types import DataError

MARKET = (
    *("bounding_box_train/0002_c1s1_000451_03.jpg", "bounding_box_train/0002_c2s1_000301_01.jpg"),
    *("bounding_box_train/0007_c3s3_077419_03.jpg", "query/0001_c1s1_001051_00.jpg", "query/0003_c6s4_002202_00.jpg"),
    *("bounding_box_test/0001_c1s1_002301_02.jpg", "bounding_box_test/0001_c2s1_000976_01.jpg"),
    *("bounding_box_test/0003_c1s6_015971_02.jpg", "bounding_box_test/0000_c4s1_000151_01.jpg"),
    *("bounding_box_test/-1_c1s1_000401_03.jpg", "bounding_box_test/-1_c6s4_003927_02.jpg"),
)
DUKE = (
    *("bounding_box_train/0001_c2_f0046182.jpg", "bounding_box_train/0001_c8_f0046302.jpg"),
    *("query/0005_c2_f0046985.jpg", "bounding_box_test/0005_c5_f0051341.jpg", "bounding_box_test/0027_c1_f0056000.jpg"),
)
CUHK = (
    *("bounding_box_train/0003_c1_11.png", "bounding_box_train/0003_c2_16.png"),
    *("query/0001_c1_301.png", "bounding_box_test/0001_c2_306.png", "bounding_box_test/0002_c1_1.png"),
)


def write_photos(root: Path, photos: tuple[str, ...]) -> None:
    for photo in photos:
        path = root / photo
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([*path.name.encode()]).integers(0, 256, (12, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path)


def write_market(root: Path) -> None:
    write_photos(root, MARKET)
    (root / "bounding_box_test" / "Thumbs.db").write_bytes(b"no photo")
    (root / "query" / "._0001_c1s1_001051_00.jpg").write_bytes(b"no photo")


def write_duke(root: Path) -> None:
    write_photos(root, DUKE)


def write_cuhk(root: Path) -> None:
    write_photos(root, CUHK)


WRITERS: dict[str, Callable[[Path], None]] = {
    "market1501": write_market,
    "dukemtmc": write_duke,
    "cuhk03-np": write_cuhk,
}


def rows(images: LabelledImages) -> list[tuple[str, str, int]]:
    assert images.cameras is not None
    return list(zip(images.files, images.labels, images.cameras, strict=True))


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="re-identification layouts are market1501, dukemtmc, cuhk03-np; got 'msmt17'"):
        open_reidentification("msmt17", tmp_path)  # type: ignore[arg-type]


class TestNames:
    def test_market_without_junk_and_with_distractors(self, tmp_path: Path) -> None:
        write_market(tmp_path)
        data = open_reidentification("market1501", tmp_path)
        assert rows(data.train) == [(MARKET[0], "0002", 1), (MARKET[1], "0002", 2), (MARKET[2], "0007", 3)]
        assert rows(data.query) == [(MARKET[3], "0001", 1), (MARKET[4], "0003", 6)]
        assert rows(data.gallery) == [
            (MARKET[8], "0000", 4),
            (MARKET[5], "0001", 1),
            (MARKET[6], "0001", 2),
            (MARKET[7], "0003", 1),
        ]
        names = [images.name for images in (data.train, data.query, data.gallery)]
        assert names == ["market1501 train", "market1501 query", "market1501 gallery"]

    def test_duke(self, tmp_path: Path) -> None:
        write_duke(tmp_path)
        data = open_reidentification("dukemtmc", tmp_path)
        assert rows(data.train) == [(DUKE[0], "0001", 2), (DUKE[1], "0001", 8)]
        assert rows(data.query) == [(DUKE[2], "0005", 2)]
        assert rows(data.gallery) == [(DUKE[3], "0005", 5), (DUKE[4], "0027", 1)]

    def test_cuhk(self, tmp_path: Path) -> None:
        write_cuhk(tmp_path / "labeled")
        data = open_reidentification("cuhk03-np", tmp_path / "labeled")
        assert rows(data.train) == [(CUHK[0], "0003", 1), (CUHK[1], "0003", 2)]
        assert rows(data.query) == [(CUHK[2], "0001", 1)]
        assert rows(data.gallery) == [(CUHK[3], "0001", 2), (CUHK[4], "0002", 1)]
        assert data.query.name == "cuhk03-np labeled query"

    def test_doubled_suffix_of_some_copies(self, tmp_path: Path) -> None:
        write_market(tmp_path)
        write_photos(tmp_path, ("bounding_box_train/1500_c6s3_086567_01.jpg.jpg",))
        assert rows(open_reidentification("market1501", tmp_path).train)[-1][1:] == ("1500", 6)

    @pytest.mark.parametrize(
        ("layout", "name", "expected"),
        [
            ("market1501", "portrait.jpg", "PERSON_cCAMERAsSEQUENCE_FRAME_BOX.jpg, such as 0002_c1s1_000451_03.jpg"),
            ("market1501", "0005_c2_f0046985.jpg", "such as 0002_c1s1_000451_03.jpg"),
            ("market1501", "-2_c1s1_000401_03.jpg", "such as 0002_c1s1_000451_03.jpg"),
            ("market1501", "x0002_c1s1_000451_03.jpg", "such as 0002_c1s1_000451_03.jpg"),
            ("dukemtmc", "0002_c1s1_000451_03.jpg", "PERSON_cCAMERA_fFRAME.jpg, such as 0005_c2_f0046985.jpg"),
            ("dukemtmc", "-1_c2_f0046985.jpg", "such as 0005_c2_f0046985.jpg"),
            ("cuhk03-np", "0005_c2_f0046985.png", "PERSON_cCAMERA_NUMBER.png, such as 0001_c1_301.png"),
        ],
    )
    def test_a_name_that_does_not_parse(self, layout: str, name: str, expected: str, tmp_path: Path) -> None:
        WRITERS[layout](tmp_path)
        write_photos(tmp_path, (f"query/{name}",))
        with pytest.raises(SourceError, match=rf"query/{name}: the name tells no .*{expected}; rename") as caught:
            open_reidentification(layout, tmp_path)  # type: ignore[arg-type]
        assert caught.value.kind == "unknown-label"


class TestFolders:
    @pytest.mark.parametrize(
        ("layout", "inner"),
        [
            ("market1501", "Market-1501-v15.09.15"),
            ("dukemtmc", "DukeMTMC-reID"),
            ("cuhk03-np", "labeled"),
            ("cuhk03-np", "detected"),
        ],
    )
    def test_finds_the_folder_from_above(self, layout: str, inner: str, tmp_path: Path) -> None:
        WRITERS[layout](tmp_path / inner)
        data = open_reidentification(layout, tmp_path)  # type: ignore[arg-type]
        assert data == open_reidentification(layout, tmp_path / inner)  # type: ignore[arg-type]
        assert data.train.root == (tmp_path / inner).resolve()

    def test_two_kinds_of_boxes_need_a_choice(self, tmp_path: Path) -> None:
        for boxes in ("labeled", "detected"):
            write_cuhk(tmp_path / boxes)
        with pytest.raises(DataError, match=r"has labeled/ and detected/, .*name one: \S+/labeled or \S+/detected"):
            open_reidentification("cuhk03-np", tmp_path)
        assert open_reidentification("cuhk03-np", tmp_path / "detected").train.name == "cuhk03-np detected train"

    def test_missing_folder(self, tmp_path: Path) -> None:
        write_duke(tmp_path)
        (tmp_path / "query").rename(tmp_path / "queries")
        with pytest.raises(
            SourceError, match=r"/query: no such .*layout dukemtmc has bounding_box_train, query, bound"
        ):
            open_reidentification("dukemtmc", tmp_path)

    def test_nothing_but_junk(self, tmp_path: Path) -> None:
        write_market(tmp_path)
        for photo in MARKET[5:9]:
            (tmp_path / photo).unlink()
        with pytest.raises(SourceError, match=r"bounding_box_test: expected photos of persons .*found none") as caught:
            open_reidentification("market1501", tmp_path)
        assert caught.value.kind == "empty-split"


class TestPersons:
    @pytest.mark.parametrize("folder", ["bounding_box_train", "query"])
    def test_distractors_belong_in_the_gallery(self, folder: str, tmp_path: Path) -> None:
        write_market(tmp_path)
        write_photos(tmp_path, (f"{folder}/0000_c1s1_000151_01.jpg",))
        with pytest.raises(
            SourceError, match=rf"{folder}/0000_\S+: person 0000 marks distractors, expected in bounding"
        ):
            open_reidentification("market1501", tmp_path)

    def test_a_person_in_train_and_in_query(self, tmp_path: Path) -> None:
        write_duke(tmp_path)
        write_photos(tmp_path, ("query/0001_c1_f0000001.jpg",))
        with pytest.raises(DataError, match=r"1 persons are in train and in query \(0001\); .*keep each person on one"):
            open_reidentification("dukemtmc", tmp_path)

    def test_cameras_are_needed(self) -> None:
        def images(label: str, cameras: tuple[int, ...] | None) -> LabelledImages:
            return LabelledImages(name=label, root=Path(), files=("a.jpg",), labels=(label,), cameras=cameras)

        with pytest.raises(DataError, match="gallery: re-identification needs the camera of every photo; got none"):
            ReidentificationData(
                train=images("train", (1,)), query=images("query", (1,)), gallery=images("gallery", None)
            )
