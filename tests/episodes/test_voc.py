"""PASCAL VOC's folder layout."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.sources import SourceError, VocSource
from episodes.types import DataError


class TestVoc:
    def test_finds_the_folder_from_above(self, tiny_voc: Path, tmp_path: Path) -> None:
        (tmp_path / "data" / "VOCdevkit").mkdir(parents=True)
        tiny_voc.rename(tmp_path / "data" / "VOCdevkit" / "VOC2012")
        expected = (tmp_path / "data" / "VOCdevkit" / "VOC2012").resolve()
        for root in (tmp_path / "data", tmp_path / "data" / "VOCdevkit", expected):
            assert VocSource(root).root == expected

    def test_mask_folder_by_preference_and_by_name(self, tiny_voc: Path) -> None:
        (tiny_voc / "SegmentationClass").mkdir()
        assert VocSource(tiny_voc).masks == "SegmentationClassAug"
        assert VocSource(tiny_voc, "SegmentationClass").masks == "SegmentationClass"
        (tiny_voc / "SegmentationClassAug").rename(tiny_voc / "elsewhere")
        assert VocSource(tiny_voc).masks == "SegmentationClass"

    def test_palette_and_grey_masks_give_the_labels(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        palette, grey = "val_01_0", "val_17_0"
        assert Image.open(source.mask_file(palette)).mode == "P"
        assert Image.open(source.mask_file(grey)).mode == "L"
        assert source.class_areas(palette) == {1: 31 * 31}
        assert source.class_areas(grey) == {17: 31 * 31}
        assert int((source.mask(palette, 1) == 255).sum()) == 33 * 33 - 31 * 31

    def test_wrong_root(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nothing: expected a VOC2012 folder with JPEGImages/.*not exist"):
            VocSource(tmp_path / "nothing")
        with pytest.raises(DataError, match=r"has no such folders; name the folder that holds JPEGImages"):
            VocSource(tmp_path)

    def test_wrong_mask_folder(self, tiny_voc: Path) -> None:
        with pytest.raises(DataError, match=r"expected a mask folder Labels, found .*SegmentationClassAug"):
            VocSource(tiny_voc, "Labels")

    def test_missing_files(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        source.image_file("val_01_0").unlink()
        with pytest.raises(SourceError, match=r"val_01_0\.jpg: no such file") as caught:
            source.image("val_01_0")
        assert caught.value.kind == "missing"
        with pytest.raises(SourceError, match=r"val_01_0\.jpg: no such file"):
            source.fingerprint(["val_01_0"])

    def test_truncated_photo(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        path = source.image_file("val_02_0")
        path.write_bytes(path.read_bytes()[:400])
        with pytest.raises(SourceError, match=r"val_02_0\.jpg: photo cannot be decoded .*save the file again"):
            source.image("val_02_0")

    @pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
    def test_damaged_mask(self, tiny_voc: Path, content: bytes) -> None:
        source = VocSource(tiny_voc)
        source.mask_file("val_02_0").write_bytes(content)
        with pytest.raises(SourceError, match=r"val_02_0\.png: mask cannot be decoded"):
            source.class_areas("val_02_0")

    def test_colour_coded_mask(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        path = source.mask_file("val_02_0")
        Image.open(path).convert("RGB").save(path)
        with pytest.raises(SourceError, match=r"val_02_0\.png: mask is colour-coded \(RGB\).*map each colour"):
            source.mask("val_02_0", 2)

    def test_sixteen_bit_mask(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        path = source.mask_file("val_02_0")
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)).save(path)
        with pytest.raises(SourceError, match=r"expected P or L.*save it as mode L"):
            source.mask("val_02_0", 2)

    def test_mask_of_another_size(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        Image.new("L", (10, 20), 2).save(source.mask_file("val_02_0"))
        width, height = Image.open(source.image_file("val_02_0")).size
        with pytest.raises(SourceError, match=rf"mask is 10x20, photo val_02_0\.jpg is {width}x{height} pixels"):
            source.mask("val_02_0", 2)

    def test_unknown_label(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        Image.new("L", (10, 20), 77).save(source.mask_file("val_02_0"))
        with pytest.raises(SourceError, match=r"expected labels 0\.\.20 and 255, found 77"):
            source.class_areas("val_02_0")

    def test_error_keeps_its_parts_on_the_way_out_of_a_worker(self) -> None:
        error = SourceError("a.png", "missing", "no such file", "put it there")
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.kind) == ("a.png: no such file; put it there", "missing")

    def test_trains_on_the_larger_list_where_there_is_one(self, tiny_voc: Path, tmp_path: Path) -> None:
        lists, sbd = tiny_voc / "ImageSets" / "Segmentation", tmp_path / "sbd"
        (sbd / "cls").mkdir(parents=True)
        assert VocSource(tiny_voc).default_splits == ("trainaug", "val")
        (lists / "trainaug.txt").unlink()
        assert VocSource(tiny_voc).default_splits == ("train", "val")
        assert VocSource(tiny_voc, sbd=sbd).default_splits == ("trainaug", "val")
        (lists / "train.txt").unlink()  # with neither, the message about trainaug tells of SBD too
        assert VocSource(tiny_voc).default_splits == ("trainaug", "val")

    def test_fingerprint_sees_a_changed_file(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        ids = source.ids("val")
        before = source.fingerprint(ids)
        source.mask_file(ids[3]).write_bytes(source.mask_file(ids[2]).read_bytes())
        assert source.fingerprint(ids) != before

    def test_unknown_split(self, tiny_voc: Path) -> None:
        with pytest.raises(SourceError, match=r"no split 'nowhere'; this data set has: train, trainaug, val$"):
            VocSource(tiny_voc).ids("nowhere")
        (tiny_voc / "ImageSets" / "Segmentation" / "trainaug.txt").unlink()
        with pytest.raises(SourceError, match=r"no split 'trainaug'; .* put together when the folder of SBD is named"):
            VocSource(tiny_voc).ids("trainaug")


@pytest.mark.voc
class TestRealVoc:
    def test_masks_agree_with_areas(self, voc_root: Path) -> None:
        source = VocSource(voc_root)
        assert set(source.ids("train")) <= set(source.ids("trainaug"))
        assert not set(source.ids("trainaug")) & set(source.ids("val"))
        for image_id in source.ids("val")[:5] + source.ids("trainaug")[-5:]:
            masks = source.class_masks(image_id)
            assert {c: int((m == 1).sum()) for c, m in masks.items()} == source.class_areas(image_id)
            for class_id, mask in masks.items():
                np.testing.assert_array_equal(mask, source.mask(image_id, class_id))
