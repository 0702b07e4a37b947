from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.sources import FolderSource, LabelmeSource, SourceError, SyntheticSource, VocSource
from episodes.types import DataError, MaskSource, UInt8Array
from episodes.verify import inspect, report, report_lines, verify


def by_kind(root: Path) -> dict[tuple[str, str], str]:
    return {(Path(p.file).name, p.kind): str(p) for p in verify(VocSource(root), "val") if p.kind != "empty-class"}


def test_sound_data_only_lack_the_classes_they_lack(tiny_voc: Path) -> None:
    problems = verify(VocSource(tiny_voc), "val")
    assert {problem.kind for problem in problems} == {"empty-class"}
    assert len(problems) == 20 - 8
    assert "no image of the split shows class 3 (bird)" in problems[0].message
    assert problems[0].file.endswith("val.txt")


def test_synthetic_source_has_no_problem() -> None:
    source = SyntheticSource(base_classes=3, novel_classes=2, images_per_class=2, size=48)
    assert verify(source, "train") == []
    assert verify(source, "val") == []


def test_every_problem_is_listed_by_file(tiny_voc: Path) -> None:
    source = VocSource(tiny_voc)
    source.image_file("val_01_0").unlink()
    source.mask_file("val_01_1").unlink()
    photo = source.image_file("val_02_0")
    photo.write_bytes(photo.read_bytes()[:500])
    source.mask_file("val_02_1").write_bytes(b"no picture")
    Image.new("L", (5, 6), 2).save(source.mask_file("val_06_0"))
    mask = source.mask_file("val_06_1")
    Image.new("L", Image.open(mask).size, 40).save(mask)
    mask = source.mask_file("val_07_0")
    Image.open(mask).convert("RGB").save(mask)
    found = by_kind(tiny_voc)
    assert set(found) == {
        ("val_01_0.jpg", "missing"),
        ("val_01_1.png", "missing"),
        ("val_02_0.jpg", "undecodable"),
        ("val_02_1.png", "undecodable"),
        ("val_06_0.png", "size-mismatch"),
        ("val_06_1.png", "unknown-label"),
        ("val_07_0.png", "rgb-mask"),
    }
    assert all("\n" not in text and "; " in text for text in found.values())


def test_two_problems_of_one_file_are_both_listed(tiny_voc: Path) -> None:
    Image.new("L", (5, 6), 40).save(VocSource(tiny_voc).mask_file("val_06_0"))
    assert set(by_kind(tiny_voc)) == {("val_06_0.png", "size-mismatch"), ("val_06_0.png", "unknown-label")}


def test_empty_and_missing_split(tiny_voc: Path) -> None:
    path = tiny_voc / "ImageSets" / "Segmentation" / "val.txt"
    path.write_text("")
    (problem,) = verify(VocSource(tiny_voc), "val")
    assert (problem.kind, problem.file) == ("empty-split", str(VocSource(tiny_voc).split_file("val")))
    path.unlink()
    (problem,) = verify(VocSource(tiny_voc), "val")
    assert problem.kind == "missing"
    assert problem.mend == "this data set has: train, trainaug"


@dataclass
class PlainSource:
    """A source without files, folders or lists: two classes, photos and masks from dictionaries."""

    photos: dict[str, UInt8Array]
    masks: dict[str, dict[int, UInt8Array]]
    listed: tuple[str, ...] = ()
    broken: dict[str, DataError] = field(default_factory=dict)
    beyond: tuple[SourceError, ...] = ()
    name: str = "plain"
    class_names: dict[int, str] = field(default_factory=lambda: {1: "cup", 2: "plate"})
    default_splits: tuple[str, str] = ("all", "all")
    folds: None = None

    def ids(self, split: str) -> tuple[str, ...]:
        if split != "all":
            raise DataError(f"no split {split!r}; it has all")
        return self.listed or tuple(self.photos)

    def image(self, image_id: str) -> UInt8Array:
        return self.photos[image_id]

    def class_masks(self, image_id: str) -> dict[int, UInt8Array]:
        if image_id in self.broken:
            raise self.broken[image_id]
        return self.masks[image_id]

    def class_areas(self, image_id: str) -> dict[int, int]:
        return {class_id: int((mask == 1).sum()) for class_id, mask in self.class_masks(image_id).items()}

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        masks = self.class_masks(image_id)
        return masks.get(class_id, np.zeros(self.photos[image_id].shape[:2], np.uint8))

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        return " ".join(image_ids)

    def problems(self, split: str) -> Iterable[SourceError]:
        return self.beyond if split == "all" else ()


def plain_source(count: int = 4) -> PlainSource:
    photos = {f"p{n}": np.full((6, 8, 3), n, np.uint8) for n in range(count)}
    masks = {name: {1 + n % 2: np.ones((6, 8), np.uint8)} for n, name in enumerate(photos)}
    return PlainSource(photos=photos, masks=masks)


def test_the_plain_source_is_a_mask_source_without_problems() -> None:
    source = plain_source()
    assert isinstance(source, MaskSource)
    assert verify(source, "all") == []
    found = inspect(source, "all")
    assert (found.name, found.images, found.classes) == ("all", 4, {1: 2, 2: 2})


def test_every_present_class_is_compared_with_the_photo() -> None:
    source = plain_source()
    source.masks["p2"] = {1: np.ones((6, 8), np.uint8), 2: np.ones((8, 6), np.uint8)}
    (problem,) = verify(source, "all")
    assert (problem.file, problem.kind) == ("plain:p2", "size-mismatch")
    assert problem.message == "mask of class 2 is 6x8, photo is 8x6"
    assert problem.mend


def test_a_bare_data_error_is_pinned_to_its_image_and_the_rest_is_read() -> None:
    source = plain_source(6)
    source.broken = {"p0": DataError("polygon has 2 points; draw at least 3"), "p1": DataError("no mend given")}
    found = {problem.file: problem for problem in verify(source, "all")}
    assert set(found) == {"plain:p0", "plain:p1"}
    assert found["plain:p0"].kind == "bad-annotation"
    assert (found["plain:p0"].message, found["plain:p0"].mend) == ("polygon has 2 points", "draw at least 3")
    assert (found["plain:p1"].message, found["plain:p1"].mend) == (
        "no mend given",
        "mend it or drop the id from the split",
    )


def test_one_unreadable_file_of_many_images_is_one_problem_but_two_faults_of_it_are_two() -> None:
    source = plain_source(8)
    whole = SourceError("all.json", "bad-annotation", "not JSON", "write it again")
    source.broken = {
        "p0": whole,
        "p1": whole,
        "p2": SourceError("all.json", "bad-annotation", "id 7 twice", "drop one"),
    }
    assert [problem.message for problem in verify(source, "all")] == ["not JSON", "id 7 twice"]


def test_problems_that_only_the_source_knows() -> None:
    source = plain_source()
    source.beyond = (SourceError("masks/lonely.png", "missing", "mask without a photo", "add lonely.jpg"),)
    assert [str(problem) for problem in verify(source, "all")] == [
        "masks/lonely.png: mask without a photo; add lonely.jpg"
    ]


def test_ids_listed_twice_are_read_once() -> None:
    source = plain_source()
    source.listed = ("p0", "p1", "p2", "p0", "p3", "p0")
    found = inspect(source, "all")
    assert [(problem.file, problem.kind, problem.message) for problem in found.problems] == [
        ("plain:all", "duplicate", "id p0 is listed more than once")
    ]
    assert (found.images, found.classes) == (4, {1: 2, 2: 2})


def test_the_same_photo_under_two_ids(tiny_voc: Path) -> None:
    source = VocSource(tiny_voc)
    first, second = source.image_file("val_01_0"), source.image_file("val_01_1")
    shutil.copyfile(first, second)
    shutil.copyfile(source.mask_file("val_01_0"), source.mask_file("val_01_1"))
    (problem,) = [problem for problem in verify(source, "val") if problem.kind == "duplicate"]
    assert (problem.file, problem.message) == (str(second), f"the same photo as {first}, pixel for pixel")
    assert "query" in problem.mend


def test_photos_with_the_same_bytes_but_another_shape_differ() -> None:
    source = plain_source(4)
    source.photos["p1"] = np.zeros((8, 6, 3), np.uint8)  # p0 is zeros of 6 x 8
    source.masks["p1"] = {2: np.ones((8, 6), np.uint8)}
    assert verify(source, "all") == []


def test_a_class_with_one_image_has_no_episode() -> None:
    source = plain_source(3)
    (problem,) = verify(source, "all")
    assert (problem.kind, problem.message) == ("too-few", "only 1 image of the split shows class 2 (plate)")
    assert "query" in problem.mend


def test_an_unknown_split_without_files_is_the_callers_error() -> None:
    with pytest.raises(DataError, match="no split 'test'; it has all"):
        verify(plain_source(), "test")


def write_labelme(root: Path, count: int) -> LabelmeSource:
    """Photos ``0``, ``1``, ... with a rectangle each, labelled cat."""
    root.mkdir()
    for number in range(count):
        Image.fromarray(np.full((20, 30, 3), 9 * number, np.uint8)).save(root / f"{number}.jpg")
        shape = {"label": "cat", "shape_type": "rectangle", "points": [[2, 3], [12, 13]]}
        sheet = {"imagePath": f"{number}.jpg", "imageData": None, "imageWidth": 30, "imageHeight": 20}
        (root / f"{number}.json").write_text(json.dumps(sheet | {"shapes": [shape]}))
    return LabelmeSource(root)


def test_files_that_name_the_classes_may_be_broken_themselves(tmp_path: Path) -> None:
    source = write_labelme(tmp_path / "labelme", 4)
    (source.root / "1.json").write_text('{"shapes": [')
    (source.root / "2.jpg").write_bytes(b"broken")
    found = inspect(source, "all")
    assert {(Path(problem.file).name, problem.kind) for problem in found.problems} == {
        ("1.json", "bad-annotation"),
        ("2.jpg", "undecodable"),
    }
    assert (found.images, found.classes) == (4, {})  # without all files nobody knows the numbers of the classes
    told = report(source, [found])
    assert json.loads(json.dumps(told)) == told
    assert (told["problems"], told["kinds"]) == (2, {"bad-annotation": 1, "undecodable": 1})
    assert len(report_lines(told)) == 1 + 2


def test_report_as_json_and_as_text_say_the_same(tiny_voc: Path) -> None:
    source = VocSource(tiny_voc)
    source.image_file("val_01_0").unlink()
    found = report(source, [inspect(source, split) for split in ("trainaug", "val")])
    assert json.loads(json.dumps(found)) == found
    assert found["source"] == "voc"
    assert [split["name"] for split in found["splits"]] == ["trainaug", "val"]
    val = found["splits"][1]
    assert val["images"] == 32
    assert val["kinds"] == {"empty-class": 12, "missing": 1}
    assert val["classes"]["1"] == {"name": "aeroplane", "images": 4 + 2}  # its own, and in a corner of every second 17
    assert val["classes"]["3"] == {"name": "bird", "images": 0}
    assert found["problems"] == 25
    assert found["kinds"] == {"empty-class": 24, "missing": 1}
    missing = val["problems"][0]
    assert set(missing) == {"file", "kind", "message", "mend"}
    assert all(problem["mend"] for split in found["splits"] for problem in split["problems"])
    lines = report_lines(found)
    assert lines[:2] == [
        "trainaug: 32 images, 8 of 20 classes, problems: 12 (12 empty-class)",
        "val: 32 images, 8 of 20 classes, problems: 13 (12 empty-class, 1 missing)",
    ]
    assert len(lines) == 2 + 25
    assert f"{missing['file']}: {missing['message']}; {missing['mend']}" in lines


def test_photos_without_a_mask_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        for folder, value in (("images", ord(name)), ("masks/dog", 255)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 20), value).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "masks" / "dog" / "c.png").unlink()
    source = FolderSource(tmp_path)
    found = report(source, [inspect(source, "all")])
    assert found["splits"][0]["without_object"] == 1
    assert report_lines(found) == ["all: 3 images (1 without an object), 1 of 1 classes, problems: 0"]
