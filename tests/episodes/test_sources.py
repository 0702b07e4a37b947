"""The contract of every `MaskSource`, and what each one adds to it."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.sources import SourceError, SyntheticSource, VocSource
from episodes.types import DataError, MaskSource

SYNTHETIC = {"base_classes": 6, "novel_classes": 3, "images_per_class": 3, "size": 64}


@pytest.fixture(params=["voc", "synthetic"])
def source(request: pytest.FixtureRequest) -> MaskSource:
    if request.param == "voc":
        return VocSource(request.getfixturevalue("tiny_voc"))
    return SyntheticSource(seed=3, **SYNTHETIC)


class TestSourceContract:
    def test_is_a_mask_source(self, source: MaskSource) -> None:
        assert isinstance(source, MaskSource)
        assert source.name
        assert list(source.class_names) == sorted(source.class_names)
        assert all(0 < class_id < 255 for class_id in source.class_names)

    def test_ids_are_unique_and_stable(self, source: MaskSource) -> None:
        ids = source.ids("val")
        assert len(ids) == len(set(ids)) > 0
        assert tuple(ids) == tuple(source.ids("val"))

    def test_image_is_rgb_bytes(self, source: MaskSource) -> None:
        for image_id in source.ids("val")[:4]:
            image = source.image(image_id)
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            np.testing.assert_array_equal(image, source.image(image_id))

    def test_masks_agree_with_areas_and_image_size(self, source: MaskSource) -> None:
        for image_id in source.ids("val"):
            areas = source.class_areas(image_id)
            assert list(areas) == sorted(areas)
            for class_id in source.class_names:
                mask = source.mask(image_id, class_id)
                assert mask.dtype == np.uint8
                assert mask.shape == source.image(image_id).shape[:2]
                assert set(np.unique(mask)) <= {0, 1, 255}
                assert int((mask == 1).sum()) == areas.get(class_id, 0)

    def test_unknown_split_and_class(self, source: MaskSource) -> None:
        with pytest.raises(DataError, match="no split 'nowhere'"):
            source.ids("nowhere")
        with pytest.raises(DataError, match="class"):
            source.mask(source.ids("val")[0], 99)

    def test_unknown_id_is_named(self, source: MaskSource) -> None:
        for read in (source.image, source.class_areas, lambda name: source.mask(name, 1)):
            with pytest.raises(DataError, match="val-999-0000"):
                read("val-999-0000")

    def test_fingerprint_depends_on_the_ids(self, source: MaskSource) -> None:
        ids = source.ids("val")
        assert source.fingerprint(ids) == source.fingerprint(ids)
        assert source.fingerprint(ids) != source.fingerprint(ids[:-1])

    def test_travels_into_workers(self, source: MaskSource) -> None:
        copy = pickle.loads(pickle.dumps(source))
        image_id = source.ids("val")[0]
        np.testing.assert_array_equal(copy.image(image_id), source.image(image_id))


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

    def test_fingerprint_sees_a_changed_file(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        ids = source.ids("val")
        before = source.fingerprint(ids)
        os.utime(source.mask_file(ids[3]), ns=(1, 1))
        assert source.fingerprint(ids) != before


class TestSynthetic:
    def test_splits_share_no_class(self) -> None:
        source = SyntheticSource(**SYNTHETIC)
        assert not set(source.base_class_ids) & set(source.novel_class_ids)
        for split, classes in (("train", source.base_class_ids), ("val", source.novel_class_ids)):
            seen = {c for image_id in source.ids(split) for c in source.class_areas(image_id)}
            assert seen == set(classes) == set(source.split_classes(split))

    def test_names_are_distinct_looks(self) -> None:
        names = SyntheticSource().class_names
        assert len(set(names.values())) == len(names) == 32

    def test_main_object_covers_its_share(self) -> None:
        source = SyntheticSource(seed=5)
        shares = [source.class_areas(i)[int(i.split("-")[1])] / source.size**2 for i in source.ids("train")[:96]]
        assert 0.04 < min(shares) < max(shares) < 0.25

    def test_pictures_differ_between_images_and_seeds(self) -> None:
        one, two = SyntheticSource(seed=1, **SYNTHETIC), SyntheticSource(seed=2, **SYNTHETIC)
        first, second = one.ids("train")[:2]
        assert (one.image(first) != one.image(second)).any()
        assert (one.image(first) != two.image(first)).any()
        assert one.fingerprint([first]) != two.fingerprint([first])

    def test_object_stands_out_from_its_background(self) -> None:
        # Colour alone must move where the mask says so: guards against masks beside their object.
        source = SyntheticSource(seed=0, **SYNTHETIC)
        for image_id in source.ids("train")[:6]:
            image = source.image(image_id).astype(float)
            mask = source.mask(image_id, int(image_id.split("-")[1])) == 1
            jump = np.abs(np.diff(image, axis=1)).sum(axis=2)
            edge = mask[:, 1:] != mask[:, :-1]
            assert jump[edge].mean() > 1.5 * jump[~mask[:, 1:] & ~mask[:, :-1]].mean()

    def test_same_in_another_process(self) -> None:
        source = SyntheticSource(seed=7, **SYNTHETIC)
        code = (
            "import hashlib; from episodes.sources import SyntheticSource; "
            f"s = SyntheticSource(seed=7, **{SYNTHETIC!r}); "
            "print(hashlib.sha256(s.image('val-008-0001').tobytes()).hexdigest())"
        )
        here = hashlib.sha256(source.image("val-008-0001").tobytes()).hexdigest()
        there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert there.stdout.strip() == here

    def test_global_random_state_is_left_alone(self) -> None:
        state = np.random.get_state()[1].copy()  # noqa: NPY002  the global state is what is tested
        SyntheticSource(**SYNTHETIC).image("train-001-0000")
        np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 8}, "size must be at least 32"),
            ({"images_per_class": 1}, "images_per_class must be at least 2"),
            ({"base_classes": 44, "novel_classes": 5}, "at most 48 classes can be told apart"),
        ],
    )
    def test_bad_parameters(self, arguments: dict[str, int], message: str) -> None:
        with pytest.raises(DataError, match=message):
            SyntheticSource(**arguments)
