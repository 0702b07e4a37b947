"""Several data sets as one: classes of one concept are joined, everything else stays what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.fold_lists import open_lists
from episodes.protocols import custom_protocol
from episodes.sampler import EpisodeSampler
from episodes.sources import (
    COMMON_NAMES,
    CocoSource,
    FolderSource,
    JointSource,
    SyntheticSource,
    VocSource,
    common_name,
)
from episodes.sources.voc import VOC_CLASS_NAMES
from episodes.types import DataError

FOLDER_CLASSES = {4: "airplane", 9: "zebra"}


@pytest.fixture
def folder(tmp_path: Path) -> FolderSource:
    """Three photos of an airplane (4), two of them with a zebra (9)."""
    root = tmp_path / "own"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        labels = np.zeros((20, 24), np.uint8)
        labels[2:8, 3:9] = 4
        labels[10:15, 3:20] = 9 if number else 0
        Image.fromarray(np.full((20, 24, 3), 40 * number, np.uint8)).save(root / "images" / f"p{number}.png")
        Image.fromarray(labels).save(root / "masks" / f"p{number}.png")
    (root / "classes.txt").write_text("".join(f"{key} {name}\n" for key, name in FOLDER_CLASSES.items()))
    return FolderSource(root)


@pytest.fixture
def joint(tiny_voc: Path, folder: FolderSource) -> JointSource:
    return JointSource((VocSource(tiny_voc), folder))


def test_all_of_voc_is_in_coco_under_its_common_name() -> None:
    shared = (  # the categories of COCO that VOC has as well, as COCO names them
        *("airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("dining table", "dog", "horse", "motorcycle", "person", "potted plant", "sheep", "couch", "train", "tv"),
    )
    assert {common_name(name) for name in VOC_CLASS_NAMES.values()} == set(shared)
    assert set(COMMON_NAMES) < set(VOC_CLASS_NAMES.values())


@pytest.mark.coco
def test_real_coco_has_these_names(coco_root: Path) -> None:
    names = set(CocoSource(coco_root).class_names.values())
    assert {common_name(name) for name in VOC_CLASS_NAMES.values()} <= names


def test_classes_of_one_concept_are_one(joint: JointSource) -> None:
    assert dict(joint.class_names) == {**VOC_CLASS_NAMES, 21: "zebra"}
    assert dict(joint.own_classes("folder")) == {1: 4, 21: 9}
    assert dict(joint.own_classes("voc")) == {class_id: class_id for class_id in range(1, 21)}


def test_masks_are_those_of_the_data_sets(joint: JointSource, folder: FolderSource) -> None:
    np.testing.assert_array_equal(joint.mask("folder/p1", 1), folder.mask("p1", 4))
    assert joint.class_areas("folder/p1") == {1: 36, 21: 85}
    assert list(joint.class_masks("folder/p0")) == [1]
    nowhere = joint.mask("folder/p1", 2)  # a class that the folder does not label
    assert nowhere.shape == (20, 24)
    assert not nowhere.any()


def test_splits(joint: JointSource, tiny_voc: Path) -> None:
    train, val, both = (joint.ids(split) for split in ("train", "val", "all"))
    assert len(train) == len(val) == 32 + 3
    assert set(both) == set(train) | set(val)
    assert len(both) == 32 + 32 + 3  # the folder's photos are in both, and once in all
    more = JointSource((VocSource(tiny_voc),), (SyntheticSource(images_per_class=2),))
    assert not any(image_id.startswith("synthetic/") for image_id in more.ids("val"))
    assert sum(image_id.startswith("synthetic/train-") for image_id in more.ids("all")) == 48
    assert not any(image_id.startswith("synthetic/val-") for image_id in more.ids("all"))


def test_episodes_may_cross_data_sets(joint: JointSource) -> None:
    lists = open_lists(joint, custom_protocol(), fold=0, novel_classes=["zebra"])
    assert lists.split.novel == (21,)
    assert lists.split.base == tuple(range(1, 21))
    specs = EpisodeSampler(
        lists.training_index.pairs((1,)), shots=1, seed=0, length=60, order="random", repeat_supports=False
    )
    crossed = {(spec.support_ids[0].split("/")[0], spec.query_id.split("/")[0]) for spec in specs}
    assert {("voc", "folder"), ("folder", "voc")} <= crossed


def test_fingerprint_is_that_of_the_members(joint: JointSource, folder: FolderSource) -> None:
    ids = ["voc/val_01_0", "folder/p1"]
    before, alone = joint.fingerprint(ids), joint.fingerprint(ids[:1])
    path = folder.root / "masks" / "p1.png"
    path.write_bytes(path.read_bytes() + b" ")
    assert joint.fingerprint(ids) != before
    assert joint.fingerprint(ids[:1]) == alone
    assert joint.fingerprint(ids[::-1]) != joint.fingerprint(ids)


def test_photo_files(joint: JointSource, folder: FolderSource) -> None:
    assert joint.image_file("folder/p1") == folder.root / "images" / "p1.png"
    drawn = JointSource((SyntheticSource(),))
    assert not drawn.image_file("synthetic/train-001-0000").exists()


class TestBadInput:
    def test_no_member(self) -> None:
        with pytest.raises(DataError, match="at least one data set"):
            JointSource(())

    def test_same_name_twice(self) -> None:
        with pytest.raises(DataError, match="by different names without '/'; got synthetic, synthetic"):
            JointSource((SyntheticSource(), SyntheticSource(seed=1)))

    def test_two_classes_of_one_name(self, folder: FolderSource) -> None:
        (folder.root / "classes.txt").write_text("4 aeroplane\n9 airplane\n")
        with pytest.raises(DataError, match="two classes that go by one name, 'airplane'"):
            JointSource((FolderSource(folder.root),)).class_names  # noqa: B018

    @pytest.mark.parametrize("image_id", ["p1", "nobody/p1", "folder/"])
    def test_unknown_id(self, joint: JointSource, image_id: str) -> None:
        with pytest.raises(DataError, match=r"ids look like voc/\.\.\., folder/\.\.\."):
            joint.image(image_id)

    def test_unknown_member(self, joint: JointSource) -> None:
        with pytest.raises(DataError, match="no data set 'fss' in the joint source; it has: voc, folder"):
            joint.own_classes("fss")
