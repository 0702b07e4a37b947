"""The contract of every `MaskSource`, and what the synthetic one adds to it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from episodes.sources import (
    CocoJsonSource,
    CocoSource,
    CompositeSource,
    FolderSource,
    FssSource,
    JointSource,
    LabelmeSource,
    SyntheticSource,
    VocSource,
)
from episodes.types import DataError, MaskSource, UInt8Array, WeaklyAnnotated

SYNTHETIC = {"base_classes": 6, "novel_classes": 3, "images_per_class": 3, "size": 64}
IDS = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Case:
    """A source, and a photo and the mask file (or annotation file) of an id of its scored split."""

    source: MaskSource
    image_id: str
    photo: Path
    mask: Path


def _write(path: Path, pixels: UInt8Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def _photo(path: Path, number: int) -> Path:
    return _write(path, np.random.default_rng(number).integers(0, 256, (24, 30 + number, 3), dtype=np.uint8))


def _labels(number: int, low: int = 1, high: int = 2) -> UInt8Array:
    """Class `low` in every picture, `high` in every second one."""
    labels = np.zeros((24, 30 + number), dtype=np.uint8)
    labels[2:9, 3 : 12 + number] = low
    if number % 2:
        labels[12:20, 5:25] = high
    return labels


def _voc(root: Path) -> Case:
    for number, image_id in enumerate(IDS):
        _photo(root / "JPEGImages" / f"{image_id}.jpg", number)
        labels = _labels(number, 3, 20)
        labels[22:] = 255
        _write(root / "SegmentationClass" / f"{image_id}.png", labels)
    _list(root / "ImageSets" / "Segmentation" / "val.txt", IDS)
    photo, mask = root / "JPEGImages" / "a.jpg", root / "SegmentationClass" / "a.png"
    return Case(VocSource(root), "a", photo, mask)


def _sbd(root: Path) -> Case:
    _voc(root / "VOC2012")
    dataset = root / "benchmark_RELEASE" / "dataset"
    for number, image_id in enumerate(("x", "y")):
        _photo(dataset / "img" / f"{image_id}.jpg", number)
        (dataset / "cls").mkdir(exist_ok=True)
        savemat(dataset / "cls" / f"{image_id}.mat", {"GTcls": {"Segmentation": _labels(number, 3, 20)}})
    lists = root / "VOC2012" / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("x\nb\ny\n")
    source = VocSource(root / "VOC2012", sbd=root / "benchmark_RELEASE")
    return Case(source, "x", dataset / "img" / "x.jpg", dataset / "cls" / "x.mat")


def _fss(root: Path) -> Case:
    for name in ("ab_wheel", "abacus", "zebra"):
        for number in range(1, 4):
            _photo(root / name / f"{number}.jpg", number)
            grey = 255 * (_labels(number) > 0).astype(np.uint8)
            _write(root / name / f"{number}.png", np.repeat(grey[..., None], 3, axis=2))
    _list(root / "trn.txt", ("zebra",))
    _list(root / "test.txt", ("abacus", "ab_wheel"))
    return Case(FssSource(root), "abacus/1", root / "abacus" / "1.jpg", root / "abacus" / "1.png")


def _own_photos(root: Path) -> Path:
    for number, image_id in enumerate(IDS):
        _photo(root / "images" / f"{image_id}.jpg", number)
    return root / "images" / "a.jpg"


def _folder_index(root: Path) -> Case:
    photo = _own_photos(root)
    for number, image_id in enumerate(IDS):
        labels = _labels(number, 4, 9)
        labels[22:] = 255
        _write(root / "masks" / f"{image_id}.png", labels)
    (root / "classes.txt").write_text("4 cat\n9 dog\n")
    _list(root / "splits" / "train.txt", IDS[2:])
    _list(root / "splits" / "val.txt", IDS[:2])
    return Case(FolderSource(root), "a", photo, root / "masks" / "a.png")


def _folder_classes(root: Path) -> Case:
    photo = _own_photos(root)
    for number, image_id in enumerate(IDS):
        for class_id, name in ((1, "cat"), (2, "dog")):
            mask = 255 * (_labels(number) == class_id).astype(np.uint8)
            if mask.any():
                _write(root / "masks" / name / f"{image_id}.png", mask)
    return Case(FolderSource(root), "a", photo, root / "masks" / "cat" / "a.png")


def _folder_object(root: Path) -> Case:
    photo = _own_photos(root)
    for number, image_id in enumerate(IDS[:3]):  # d has no mask
        _write(root / "masks" / f"{image_id}.png", (_labels(number) > 0).astype(np.uint8))
    return Case(FolderSource(root), "a", photo, root / "masks" / "a.png")


def _coco_content() -> dict[str, object]:
    images, annotations = [], []
    for number, image_id in enumerate(IDS):
        height, width = _labels(number).shape
        images.append({"id": number, "file_name": f"{image_id}.jpg", "width": width, "height": height})
        boxes = [(7, 3, 2, 9 + number, 7, 0)]
        boxes += [(9, 5, 12, 20, 8, 0), (7, 0, 20, 4, 3, 1)] if number % 2 else []
        for category, x, y, w, h, crowd in boxes:
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "segmentation": _run_lengths(height, width) if crowd else outline,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": crowd,
                }
            )
    categories = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def _run_lengths(height: int, width: int) -> dict[str, object]:
    """The first three pixels of every column from row 20 on, as COCO's uncompressed run lengths."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[20:23, :4] = 1
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [height, width], "counts": np.diff([0, *changes.tolist(), flat.size]).tolist()}


def _coco(root: Path) -> Case:
    for number, image_id in enumerate(IDS):
        _photo(root / "val2017" / f"{image_id}.jpg", number)
    (root / "annotations").mkdir()
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(_coco_content()))
    return Case(CocoSource(root), "val2017/a", root / "val2017" / "a.jpg", path)


def _coco_json(root: Path) -> Case:
    photo = _own_photos(root)
    path = root / "annotations.json"
    path.write_text(json.dumps(_coco_content()))
    return Case(CocoJsonSource(path), "a", photo, path)


def _labelme(root: Path) -> Case:
    for number, image_id in enumerate(IDS):
        height, width = _labels(number).shape
        _photo(root / f"{image_id}.jpg", number)
        boxes = [("cat", 3, 2, 12 + number, 9)] + ([("dog", 5, 12, 25, 20)] if number % 2 else [])
        shapes = [
            {"label": label, "points": [[x, y], [r, y], [r, b], [x, b]], "shape_type": "polygon", "group_id": None}
            for label, x, y, r, b in boxes
        ]
        head = {"version": "5.0.1", "flags": {}, "imagePath": f"{image_id}.jpg", "imageData": None}
        content = {**head, "imageHeight": height, "imageWidth": width, "shapes": shapes}
        (root / f"{image_id}.json").write_text(json.dumps(content))
    return Case(LabelmeSource(root), "a", root / "a.jpg", root / "a.json")


def _joint(root: Path) -> Case:
    voc, coco = _voc(root / "VOC2012"), _coco(root / "coco")
    (root / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt").write_text("c\nd\n")
    return Case(JointSource((voc.source, coco.source)), "voc/a", voc.photo, voc.mask)


def _composites(root: Path) -> Case:
    _voc(root)
    source = CompositeSource(VocSource(root), (("b", 3), ("d", 20)), ("a", "c"), count=4, seed=1)
    background, _ = source.composition("000000")
    photo, mask = (root / folder / f"{background}" for folder in ("JPEGImages", "SegmentationClass"))
    return Case(source, "000000", photo.with_suffix(".jpg"), mask.with_suffix(".png"))


def _list(path: Path, lines: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


BUILDERS: Mapping[str, Callable[[Path], Case]] = {
    "voc": _voc,
    "voc+sbd": _sbd,
    "fss": _fss,
    "folder-index": _folder_index,
    "folder-classes": _folder_classes,
    "folder-object": _folder_object,
    "coco": _coco,
    "coco-json": _coco_json,
    "labelme": _labelme,
    "joint": _joint,
    "composites": _composites,
}

WEAK = ("folder-index", "folder-classes", "folder-object", "coco-json", "labelme")


@pytest.fixture(params=BUILDERS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """Every source that reads files, with files that the test may damage."""
    root = tmp_path / "data"
    root.mkdir()
    return BUILDERS[request.param](root)


@pytest.fixture(params=["synthetic", *BUILDERS])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> MaskSource:
    """Every source."""
    if request.param == "synthetic":
        return SyntheticSource(seed=3, **SYNTHETIC)
    root = tmp_path / "data"
    root.mkdir()
    return BUILDERS[request.param](root).source


def scored_ids(source: MaskSource) -> tuple[str, ...]:
    return tuple(source.ids(source.default_splits[1]))


class TestSourceContract:
    def test_is_a_mask_source(self, source: MaskSource) -> None:
        assert isinstance(source, MaskSource)
        assert source.name
        assert len(source.class_names) > 0
        assert list(source.class_names) == sorted(source.class_names)
        assert all(class_id > 0 and name for class_id, name in source.class_names.items())

    def test_folds_are_known_ones_or_none(self, source: MaskSource) -> None:
        assert source.folds in ("pascal", "coco", None)
        expected = {"voc": "pascal", "voc-composites": "pascal"}
        assert source.folds == expected.get(source.name)  # this tiny COCO has not the eighty classes of COCO-20i

    def test_default_splits_exist(self, source: MaskSource) -> None:
        training, scored = source.default_splits
        assert len(source.ids(scored)) > 0
        if source.name != "voc":  # the tiny VOC lists val alone
            assert len(source.ids(training)) > 0

    def test_ids_are_unique_and_stable(self, source: MaskSource) -> None:
        ids = scored_ids(source)
        assert len(ids) == len(set(ids)) > 1
        assert ids == scored_ids(source)

    def test_image_is_rgb_bytes(self, source: MaskSource) -> None:
        for image_id in scored_ids(source)[:4]:
            image = source.image(image_id)
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            np.testing.assert_array_equal(image, source.image(image_id))

    def test_masks_agree_with_areas_and_image_size(self, source: MaskSource) -> None:
        some = False
        for image_id in scored_ids(source):
            areas = source.class_areas(image_id)
            assert list(areas) == sorted(areas)
            assert set(areas) <= set(source.class_names)
            for class_id in source.class_names:
                mask = source.mask(image_id, class_id)
                assert mask.dtype == np.uint8
                assert mask.shape == source.image(image_id).shape[:2]
                assert set(np.unique(mask)) <= {0, 1, 255}
                assert int((mask == 1).sum()) == areas.get(class_id, 0)
                some |= bool((mask == 1).any())
        assert some

    def test_all_masks_at_once_are_the_masks_one_by_one(self, source: MaskSource) -> None:
        for image_id in scored_ids(source):
            masks = source.class_masks(image_id)
            assert list(masks) == list(source.class_areas(image_id))
            for class_id, mask in masks.items():
                assert mask.dtype == np.uint8
                np.testing.assert_array_equal(mask, source.mask(image_id, class_id))

    def test_unknown_split_and_class(self, source: MaskSource) -> None:
        with pytest.raises(DataError, match="no split 'nowhere'"):
            source.ids("nowhere")
        with pytest.raises(DataError, match="class"):
            source.mask(scored_ids(source)[0], 99)

    def test_unknown_id_is_named(self, source: MaskSource) -> None:
        known = min(source.class_names)
        readers = (source.image, source.class_areas, source.class_masks, lambda name: source.mask(name, known))
        for read in readers:
            with pytest.raises(DataError, match="val-999-0000"):
                read("val-999-0000")

    def test_fingerprint_depends_on_the_ids(self, source: MaskSource) -> None:
        ids = scored_ids(source)
        assert source.fingerprint(ids) == source.fingerprint(ids)
        assert source.fingerprint(ids) != source.fingerprint(ids[:-1])

    def test_travels_into_workers(self, source: MaskSource) -> None:
        image_id = scored_ids(source)[0]
        expected = source.image(image_id)
        copy = pickle.loads(pickle.dumps(source))  # after a reading: what is kept in memory must travel as well
        np.testing.assert_array_equal(copy.image(image_id), expected)
        assert copy.class_areas(image_id) == source.class_areas(image_id)
        assert copy.fingerprint([image_id]) == source.fingerprint([image_id])

    @pytest.mark.parametrize("source", WEAK, indirect=True)
    def test_annotations_are_of_the_photos_size_with_known_values(self, source: MaskSource) -> None:
        assert isinstance(source, WeaklyAnnotated)
        for image_id in scored_ids(source):
            for class_id in source.class_names:
                for kind in ("mask", "box", "scribble", "point", "label"):
                    drawn = source.annotation(image_id, class_id, kind)
                    if drawn is not None:
                        assert drawn.dtype == np.uint8
                        assert drawn.shape == source.image(image_id).shape[:2]
                        assert set(np.unique(drawn)) <= {0, 1, 255}


class TestFileContract:
    """What holds besides for sources that read files."""

    @pytest.mark.parametrize("which", ["photo", "mask"])
    def test_fingerprint_sees_a_changed_file(self, case: Case, which: str) -> None:
        path: Path = getattr(case, which)
        before = case.source.fingerprint([case.image_id])
        os.utime(path, ns=(1, 1))
        assert case.source.fingerprint([case.image_id]) == before  # copied data are the same data
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(1, 1))  # neither size nor time tell
        assert case.source.fingerprint([case.image_id]) != before

    @pytest.mark.parametrize("content", [b"", b"not a picture", None])
    def test_damaged_photo_is_named(self, case: Case, content: bytes | None) -> None:
        half = case.photo.read_bytes()[:300]
        case.photo.write_bytes(half if content is None else content)
        with pytest.raises(DataError, match=case.photo.name):
            case.source.image(case.image_id)

    def test_missing_photo_is_named(self, case: Case) -> None:
        case.photo.unlink()
        named = rf"/{case.photo.stem}\."  # a folder of one's own takes any suffix
        with pytest.raises(DataError, match=named):
            case.source.image(case.image_id)
        with pytest.raises(DataError, match=named):
            case.source.fingerprint([case.image_id])

    @pytest.mark.parametrize("content", [b"", b"neither picture nor annotation"])
    def test_damaged_mask_is_named(self, case: Case, content: bytes) -> None:
        case.mask.write_bytes(content)
        with pytest.raises(DataError, match=case.mask.name):
            case.source.class_areas(case.image_id)
        with pytest.raises(DataError, match=case.mask.name):
            case.source.mask(case.image_id, min(case.source.class_names))


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
