"""SBD's MATLAB files as masks of VOC. Files are written in SBD's struct layout: the real ones are not at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.sparse import csc_matrix

from episodes.sources import SourceError, VocSource
from episodes.sources.sbd import find_sbd, read_sbd_labels
from episodes.types import DataError, UInt8Array
from episodes.verify import verify


def write_mat(path: Path, labels: UInt8Array) -> Path:
    """``cls/ID.mat`` as SBD has them: boundaries per class as sparse matrices, labels, classes present."""
    boundaries = np.empty((20, 1), dtype=object)
    for class_id in range(20):
        boundaries[class_id, 0] = csc_matrix(labels == class_id + 1)
    present = np.setdiff1d(labels, [0])[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"Boundaries": boundaries, "Segmentation": labels, "CategoriesPresent": present}
    savemat(path, {"GTcls": content}, do_compression=True)
    return path


@pytest.fixture
def labels() -> UInt8Array:
    labels = np.zeros((12, 17), dtype=np.uint8)
    labels[1:4, 2:9], labels[5:9, 3:12] = 15, 20
    return labels


@pytest.fixture
def both(tmp_path: Path, labels: UInt8Array) -> VocSource:
    """VOC train a b, val v w; SBD train a s v, val w t u, of which s t u have no photo in VOC."""
    voc, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE" / "dataset"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    (sbd / "img").mkdir(parents=True)
    for name in "abvw":
        Image.new("RGB", (17, 12), "red").save(voc / "JPEGImages" / f"{name}.jpg")
        Image.new("L", (17, 12), 3).save(voc / "SegmentationClass" / f"{name}.png")
    for name in "asvwtu":
        Image.new("RGB", (17, 12), "blue").save(sbd / "img" / f"{name}.jpg")
        write_mat(sbd / "cls" / f"{name}.mat", labels)
    for path, ids in (
        (voc / "ImageSets" / "Segmentation" / "train.txt", "ab"),
        (voc / "ImageSets" / "Segmentation" / "val.txt", "vw"),
        (sbd / "train.txt", "vas"),
        (sbd / "val.txt", "wtu"),
    ):
        path.write_text("\n".join(ids) + "\n")
    return VocSource(voc, sbd=tmp_path / "benchmark_RELEASE")


class TestMat:
    def test_labels_come_back_as_torchvision_reads_them(self, tmp_path: Path, labels: UInt8Array) -> None:
        path = write_mat(tmp_path / "a.mat", labels)
        read = read_sbd_labels(path)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, labels)
        np.testing.assert_array_equal(read, loadmat(path)["GTcls"][0]["Segmentation"][0])  # torchvision's SBDataset

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"a\.mat: no such file") as caught:
            read_sbd_labels(tmp_path / "a.mat")
        assert caught.value.kind == "missing"

    @pytest.mark.parametrize("content", [b"", b"x", b"not a MATLAB file" * 40, b"\x89HDF\r\n\x1a\n" + bytes(200)])
    def test_no_mat_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.mat"
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"a\.mat: ") as caught:
            read_sbd_labels(path)
        assert caught.value.kind == "undecodable"

    def test_every_truncation_is_an_error_or_harmless(self, tmp_path: Path, labels: UInt8Array) -> None:
        path = write_mat(tmp_path / "a.mat", labels)
        whole = path.read_bytes()
        for length in range(0, len(whole) - 1, 7):
            path.write_bytes(whole[:length])
            with pytest.raises(SourceError, match=r"a\.mat: "):
                read_sbd_labels(path)

    def test_any_flipped_byte_is_read_or_named(self, tmp_path: Path, labels: UInt8Array) -> None:
        path = write_mat(tmp_path / "a.mat", labels)
        whole = path.read_bytes()
        random = np.random.default_rng(0)
        failures = 0
        for place in random.integers(0, len(whole), 60).tolist():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
            try:
                assert read_sbd_labels(path).dtype == np.uint8
            except SourceError:
                failures += 1
        assert failures > 0

    @pytest.mark.parametrize(
        "content",
        [
            {"GTinst": {"Segmentation": np.ones((3, 4))}},
            {"GTcls": {"Boundaries": 1}},
            {"GTcls": np.ones((3, 4))},
            {"GTcls": {"Segmentation": np.full((3, 4), 0.5)}},
            {"GTcls": {"Segmentation": np.full((3, 4), 300)}},
            {"GTcls": {"Segmentation": np.ones((3, 4, 2))}},
            {"GTcls": {"Segmentation": "labels"}},
            {"GTcls": np.zeros((0, 0))},
        ],
    )
    def test_foreign_mat_file(self, tmp_path: Path, content: dict[str, object]) -> None:
        savemat(tmp_path / "a.mat", content)
        with pytest.raises(SourceError, match=r"expected a struct GTcls with a label matrix .*cls/ holds") as caught:
            read_sbd_labels(tmp_path / "a.mat")
        assert caught.value.kind == "undecodable"


class TestFolder:
    def test_found_from_three_places(self, both: VocSource, tmp_path: Path) -> None:
        expected = tmp_path / "benchmark_RELEASE" / "dataset"
        for root in (tmp_path, expected.parent, expected):
            assert find_sbd(root) == expected
            assert VocSource(both.root, sbd=root) == both

    def test_wrong_folder(self, both: VocSource, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nothing: expected SBD's folder dataset with cls/.*does not exist"):
            VocSource(both.root, sbd=tmp_path / "nothing")
        with pytest.raises(DataError, match=r"exists but has no such folder; name the folder benchmark_RELEASE"):
            VocSource(both.root, sbd=both.root)


class TestVocWithSbd:
    def test_trainaug_is_put_together_without_val(self, both: VocSource) -> None:
        assert both.ids("trainaug") == ("a", "b", "s", "t", "u")
        assert both.split_file("trainaug").name == "train.txt"

    def test_a_list_of_the_name_wins(self, both: VocSource) -> None:
        path = both.root / "ImageSets" / "Segmentation" / "trainaug.txt"
        path.write_text("t\na\n")
        assert both.ids("trainaug") == ("t", "a")
        assert both.split_file("trainaug") == path

    def test_list_of_pfenet(self, both: VocSource) -> None:
        with pytest.raises(SourceError, match=r"train_noval\.txt: no such list; fetch it from http://home\.bharathh"):
            both.ids("train_sbd_noval")
        assert both.sbd is not None
        (both.sbd / "train_noval.txt").write_text("s\na\nt\n")
        assert both.ids("train_sbd_noval") == ("a", "b", "s", "t")

    def test_missing_list(self, both: VocSource) -> None:
        assert both.sbd is not None
        (both.sbd / "val.txt").unlink()
        with pytest.raises(SourceError, match=r"dataset/val\.txt: no such list; unpack it"):
            both.ids("trainaug")

    def test_unknown_split_names_those_put_together(self, both: VocSource) -> None:
        with pytest.raises(SourceError, match=r"this data set has: train, train_sbd_noval, trainaug, val$"):
            both.ids("nowhere")

    def test_own_mask_and_photo_win(self, both: VocSource, labels: UInt8Array) -> None:
        assert both.class_areas("a") == {3: 12 * 17}
        assert both.image("a")[0, 0].argmax() == 0
        assert both.image("s")[0, 0].argmax() == 2
        assert both.class_areas("s") == {15: 21, 20: 36}
        np.testing.assert_array_equal(both.mask("s", 20), labels == 20)
        np.testing.assert_array_equal(both.class_masks("s")[15], labels == 15)

    def test_photo_of_voc_with_mask_of_sbd(self, both: VocSource) -> None:
        (both.root / "SegmentationClass" / "a.png").unlink()
        assert list(both.class_areas("a")) == [15, 20]
        assert both.image("a")[0, 0].argmax() == 0

    def test_size_and_label_errors_name_the_mat_file(self, both: VocSource) -> None:
        write_mat(both.mask_file("s"), np.full((5, 6), 7, dtype=np.uint8))
        write_mat(both.mask_file("t"), np.full((12, 17), 21, dtype=np.uint8))
        both.mask_file("u").write_bytes(b"damaged")
        found = {(Path(p.file).name, p.kind) for p in verify(both, "trainaug") if p.file.endswith(".mat")}
        assert found == {("s.mat", "size-mismatch"), ("t.mat", "unknown-label"), ("u.mat", "undecodable")}

    def test_missing_everywhere_names_the_usual_place(self, both: VocSource) -> None:
        for read in (both.image, both.class_areas, lambda name: both.fingerprint([name])):
            with pytest.raises(SourceError, match=r"VOC2012/.*/zzz\.(jpg|png): no such file"):
                read("zzz")

    def test_fingerprint_tells_the_two_masks_apart(self, both: VocSource) -> None:
        before = both.fingerprint(["a"])
        (both.root / "SegmentationClass" / "a.png").unlink()
        assert both.fingerprint(["a"]) != before
