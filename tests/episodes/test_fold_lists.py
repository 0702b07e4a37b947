"""Lists of a fold: who is base, novel and held out, what is drawn, and what every data set x protocol keeps to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from episodes.episode_files import fingerprint_episodes
from episodes.fold_lists import (
    FoldLists,
    class_splits,
    draw,
    drawable,
    evaluation_specs,
    left_out_classes,
    open_lists,
    protocol_for,
    splits_of,
)
from episodes.folds import ClassSplit, class_split, held_out_split
from episodes.ignored_classes import IgnoredClasses
from episodes.index import ClassIndex
from episodes.protocols import PROTOCOL_NAMES, EpisodeProtocol, custom_protocol, get_protocol
from episodes.sources import FolderSource, FssSource, SyntheticSource, VocSource
from episodes.types import DataError, EpisodeSpec, MaskSource

CLASSES = (1, 2, 6, 7, 11, 12)  # two of each of three folds of PASCAL-5i
NAMES = ("ant", "bee", "cat", "dog", "emu", "fox")


def labels_of(class_id: int, other: int, k: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A large object of one class (2500 pixels), and in every second picture a small one of the other (100)."""
    labels = np.zeros((70, 90), np.uint8)
    labels[4 : 56 + k, 9:61] = 255
    labels[5:55, 10:60] = class_id
    if k % 2:
        labels[58:68, 70:80] = other
    return labels


def write_pictures(photos: Path, masks: Path, split: str, classes: tuple[int, ...]) -> list[str]:
    photos.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    ids = []
    for position, class_id in enumerate(classes):
        for k in range(4):
            image_id = f"{split}_{class_id}_{k}"
            labels = labels_of(class_id, classes[(position + 1) % len(classes)], k)
            noise = np.random.default_rng([class_id, k]).integers(0, 60, (70, 90, 3))
            photo = noise + (10 * labels.astype(int) % 190)[..., None]
            Image.fromarray(photo.astype(np.uint8)).save(photos / f"{image_id}.jpg")
            Image.fromarray(labels).save(masks / f"{image_id}.png")
            ids.append(image_id)
    return ids


def voc(root: Path) -> VocSource:
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, name in (("train", "trainaug"), ("val", "val")):
        ids = write_pictures(root / "JPEGImages", root / "SegmentationClass", split, CLASSES)
        (lists / f"{name}.txt").write_text("\n".join(ids))
    return VocSource(root)


def folder(root: Path) -> FolderSource:
    (root / "splits").mkdir(parents=True)
    for split in ("train", "val"):
        ids = write_pictures(root / "images", root / "masks", split, (1, 2, 3, 4, 5, 6))
        (root / "splits" / f"{split}.txt").write_text("\n".join(ids))
    (root / "classes.txt").write_text("\n".join(NAMES))
    return FolderSource(root)


def fss(root: Path) -> FssSource:
    for number, name in enumerate(NAMES, 1):
        (root / name).mkdir(parents=True)
        for k in range(1, 4):
            labels = labels_of(number, number, 2 * k)
            Image.fromarray(np.repeat(labels[..., None], 3, 2)).save(root / name / f"{k}.jpg")
            Image.fromarray(np.where(labels == number, 255, 0).astype(np.uint8)).save(root / name / f"{k}.png")
    (root / "trn.txt").write_text("\n".join(NAMES[:4]))
    (root / "test.txt").write_text("\n".join(NAMES[4:]))
    return FssSource(root)


def synthetic(_: Path) -> SyntheticSource:
    return SyntheticSource(base_classes=6, novel_classes=3, images_per_class=4, size=64)


BUILDERS: Mapping[str, Callable[[Path], MaskSource]] = {
    "voc": voc,
    "folder": folder,
    "fss": fss,
    "synthetic": synthetic,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MaskSource]:
    return {name: build(tmp_path_factory.mktemp(name) / "data") for name, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def voc_source(sources: dict[str, MaskSource]) -> MaskSource:
    return sources["voc"]


@pytest.fixture(scope="module")
def own(sources: dict[str, MaskSource]) -> MaskSource:
    return sources["folder"]


def protocol_named(name: str, source: MaskSource) -> EpisodeProtocol:
    protocol = get_protocol(name, None if name == "custom" else source.folds or "pascal")
    return replace(protocol, min_area=min(protocol.min_area, 500))  # of generated pictures, too, some pass


NOVEL = {"folder": ("bee", "fox"), "voc": None, "fss": None, "synthetic": None}


class TestEverySourceAndProtocol:
    @pytest.mark.parametrize("protocol_name", PROTOCOL_NAMES)
    @pytest.mark.parametrize("name", BUILDERS)
    def test_lists_keep_the_rules(self, sources: dict[str, MaskSource], name: str, protocol_name: str) -> None:
        source = sources[name]
        lists = open_lists(source, protocol_named(protocol_name, source), fold=1, novel_classes=NOVEL[name])
        protocol, base, novel = lists.protocol, set(lists.split.base), set(lists.split.novel)
        assert base
        assert novel
        assert not base & novel
        assert lists.held_out is not None
        assert set(lists.held_out.base) | set(lists.held_out.novel) <= base
        assert (protocol.training_split, protocol.evaluation_split) == source.default_splits

        assert lists.training_pairs
        assert {class_id for _, class_id in lists.training_pairs} <= base
        assert {class_id for _, class_id in lists.evaluation_pairs} <= novel
        for index, pairs in (
            (lists.training_index, lists.training_pairs),
            (lists.evaluation_index, lists.evaluation_pairs),
        ):
            assert len(set(pairs)) == len(pairs)
            for image_id, class_id in pairs:
                area = int((source.mask(image_id, class_id) == 1).sum())
                assert index.areas[image_id][class_id] == area >= protocol.min_area

        for ways in (1, 2):
            specs = evaluation_specs(lists, shots=2, count=6, ways=ways)
            assert len(specs) == 6 * ways * protocol.repeats
            again = evaluation_specs(lists, shots=2, count=6, ways=ways)
            assert fingerprint_episodes(specs) == fingerprint_episodes(again)
            self.check(specs, lists, ways)

    def check(self, specs: Any, lists: FoldLists, ways: int) -> None:
        allowed = set(lists.evaluation_pairs)
        for spec in specs:
            assert isinstance(spec, EpisodeSpec)
            assert spec.class_id in lists.split.novel
            assert spec.query_id not in spec.support_ids
            assert all((support, spec.class_id) in allowed for support in spec.support_ids)
            assert lists.protocol.repeat_supports or len(set(spec.support_ids)) == 2
        for first in range(0, len(specs), ways):
            episode = specs[first : first + ways]
            assert episode[0].class_id in lists.evaluation_index.areas[episode[0].query_id]
            assert len({spec.query_id for spec in episode}) == 1
            assert len({spec.class_id for spec in episode}) == ways


class TestNovelClassesInTraining:
    """Pictures 1 and 3 of class 2 show class 6 (fold 1) in a corner, those of 7 class 11, those of 12 class 1."""

    def lists(self, source: MaskSource, protocol: str) -> FoldLists:
        return open_lists(source, get_protocol(protocol), fold=1)

    def test_hsnet_takes_them_for_background(self, voc_source: MaskSource) -> None:
        lists = self.lists(voc_source, "hsnet")
        assert lists.training_source is voc_source
        assert ("train_2_1", 2) in lists.training_pairs
        assert (lists.training_source.mask("train_2_1", 2)[58:68, 70:80] == 0).all()

    def test_repri_ignores_them(self, voc_source: MaskSource) -> None:
        lists = self.lists(voc_source, "repri")
        assert isinstance(lists.training_source, IgnoredClasses)
        assert ("train_2_1", 2) in lists.training_pairs
        mask, expected = lists.training_source.mask("train_2_1", 2), voc_source.mask("train_2_1", 2).copy()
        expected[58:68, 70:80] = 255
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(  # another base class stays background
            lists.training_source.mask("train_1_1", 1), voc_source.mask("train_1_1", 1)
        )

    def test_bam_leaves_their_pictures_out(self, voc_source: MaskSource) -> None:
        lists = self.lists(voc_source, "bam")
        assert lists.training_source is voc_source
        shown = {image_id for image_id, _ in lists.training_pairs}
        assert "train_2_0" in shown
        assert not {"train_2_1", "train_2_3"} & shown
        assert all(set(lists.split.base) >= set(lists.training_index.areas[image_id]) for image_id in shown)


class TestClassSplits:
    def test_folds(self, voc_source: MaskSource) -> None:
        ids, protocol = range(1, 21), get_protocol("hsnet")
        for fold in range(4):
            split, held_out = class_splits(voc_source, protocol, fold=fold)
            assert split == class_split(ids, "pascal", fold)
            assert held_out == held_out_split(ids, "pascal", fold, (fold + 1) % 4)
        assert class_splits(voc_source, protocol, fold=0, validation_fold=3)[1] == held_out_split(ids, "pascal", 0, 3)

    def test_names_are_not_for_folds(self, voc_source: MaskSource) -> None:
        with pytest.raises(DataError, match="classes of voc are divided by --fold; leave --novel-classes out"):
            class_splits(voc_source, get_protocol("hsnet"), fold=0, novel_classes=["cow"])

    def test_splits_with_classes_of_their_own(self, sources: dict[str, MaskSource]) -> None:
        split, held_out = class_splits(sources["fss"], custom_protocol(), fold=3)
        assert split == ClassSplit(base=(1, 2, 3, 4), novel=(5, 6))
        assert held_out == ClassSplit(base=(1, 2, 3), novel=(4,))
        everything, nothing = class_splits(sources["fss"], custom_protocol(evaluation_split="all"), fold=0)
        assert everything == ClassSplit(base=(), novel=(1, 2, 3, 4, 5, 6))
        assert nothing is None
        split, held_out = class_splits(sources["synthetic"], custom_protocol(), fold=0)
        assert (split.base, split.novel) == ((1, 2, 3, 4, 5, 6), (7, 8, 9))
        assert held_out == ClassSplit(base=(1, 2, 3, 4), novel=(5, 6))

    def test_names(self, own: MaskSource) -> None:
        split, held_out = class_splits(own, custom_protocol(), fold=0, novel_classes=["fox", "ant", "fox"])
        assert split == ClassSplit(base=(2, 3, 4, 5), novel=(1, 6))
        assert held_out == ClassSplit(base=(2, 3, 4), novel=(5,))
        split, held_out = class_splits(own, custom_protocol(), fold=0, novel_classes=NAMES[1:])
        assert (split.base, held_out) == ((1,), None)

    def test_all_are_novel_by_default(self, own: MaskSource) -> None:
        split, held_out = class_splits(own, custom_protocol(), fold=0)
        assert split == ClassSplit(base=(), novel=(1, 2, 3, 4, 5, 6))
        assert held_out is None

    def test_unknown_names(self, own: MaskSource) -> None:
        message = "--novel-classes: folder has no class cow, Ant; it has: ant, bee, cat, dog, emu, fox"
        with pytest.raises(DataError, match=message):
            class_splits(own, custom_protocol(), fold=0, novel_classes=["cow", "fox", "Ant"])

    @given(novel=st.sets(st.sampled_from(NAMES), min_size=1))
    def test_held_out_classes_are_base_classes(self, novel: set[str]) -> None:
        source = SyntheticNames()
        split, held_out = class_splits(source, custom_protocol(), fold=0, novel_classes=sorted(novel))
        assert {source.class_names[class_id] for class_id in split.novel} == novel
        assert set(split.base) | set(split.novel) == set(source.class_names)
        if held_out is None:
            assert len(split.base) < 2
        else:
            assert held_out.base + held_out.novel == split.base


class SyntheticNames(SyntheticSource):
    """No files: six classes by name."""

    def __init__(self) -> None:
        super().__init__(base_classes=3, novel_classes=3)

    @property
    def class_names(self) -> Mapping[int, str]:
        return dict(enumerate(NAMES, 1))


class TestProtocolFor:
    def test_names_the_splits(self, voc_source: MaskSource) -> None:
        given_splits = protocol_for(voc_source, get_protocol("bam"))
        assert given_splits == replace(get_protocol("bam"), training_split="trainaug", evaluation_split="val")
        other = protocol_for(voc_source, replace(get_protocol("bam"), evaluation_split="trainaug"))
        assert splits_of(other, voc_source) == ("trainaug", "trainaug")

    def test_published_lists_are_for_folds_alone(self, own: MaskSource) -> None:
        hsnet = protocol_for(own, get_protocol("hsnet"))
        assert (hsnet.min_grid_points, hsnet.listed, hsnet.resolution) == (0, frozenset(), 400)

    def test_generated_pictures_keep_their_size(self, sources: dict[str, MaskSource]) -> None:
        once = protocol_for(sources["synthetic"], get_protocol("pfenet"))
        assert (once.name, once.resolution, once.scoring_size) == ("pfenet (synthetic)", 64, 64)
        assert protocol_for(sources["synthetic"], once) == once


class TestDrawing:
    def test_classes_with_too_few_images_are_left_out(self, own: MaskSource) -> None:
        lists = open_lists(own, custom_protocol(), fold=0)
        assert left_out_classes(lists, shots=5) == ()  # four pictures, and two more in a corner
        assert left_out_classes(lists, shots=6) == (1, 2, 3, 4, 5, 6)
        with pytest.raises(DataError, match="no 6-shot episodes: protocol custom has too few images of ant, bee, cat"):
            evaluation_specs(lists, shots=6)
        areas = {image_id: dict(row) for image_id, row in lists.evaluation_index.areas.items()}
        for image_id in ("val_3_0", "val_3_1", "val_3_2"):
            del areas[image_id][3]
        fewer = replace(lists, evaluation_index=replace(lists.evaluation_index, areas=areas))
        assert left_out_classes(fewer, shots=3) == (3,)
        specs = evaluation_specs(fewer, shots=3, count=40)
        assert {spec.class_id for spec in specs} == {1, 2, 4, 5, 6}

    def test_no_image_of_the_wanted_classes(self, voc_source: MaskSource) -> None:
        lists = open_lists(voc_source, get_protocol("hsnet"), fold=3)
        assert left_out_classes(lists, shots=1) == (16, 17, 18, 19, 20)
        with pytest.raises(
            DataError, match=r"protocol hsnet finds no image of the wanted classes \(pottedplant, sheep"
        ):
            evaluation_specs(lists, shots=1)

    def test_objects_that_are_too_small_are_told(self, voc_source: MaskSource) -> None:
        lists = open_lists(voc_source, replace(get_protocol("pfenet"), min_area=9999), fold=0)
        with pytest.raises(DataError, match="counting those with 9999 pixels of the class and more"):
            evaluation_specs(lists, shots=1)

    def test_small_queries_of_a_class_without_supports(self) -> None:
        """A picture is a query of any of its classes, but never of one that has too few supports."""
        areas = {"a": {1: 3000, 2: 10}, "b": {1: 3000}, "c": {1: 3000, 2: 3000}, "d": {2: 10}}
        index = ClassIndex(tuple(areas), areas, areas, "fingerprint")
        source = SyntheticSource(base_classes=2, novel_classes=2)
        lists = FoldLists(
            source=source,
            protocol=get_protocol("pfenet"),
            training_index=index,
            evaluation_index=index,
            split=ClassSplit(base=(3, 4), novel=(1, 2)),
            held_out=None,
            fold=None,
        )
        kept, queries = drawable(lists, index, lists.evaluation_pairs, shots=1)
        assert kept == [("a", 1), ("b", 1), ("c", 1)]  # class 2 has one large object, c, which could be query itself
        assert queries == kept
        assert left_out_classes(lists, shots=1) == (2,)
        areas["b"] = {1: 3000, 2: 3000}
        kept, queries = drawable(lists, index, lists.evaluation_pairs, shots=1)
        assert ("a", 2) not in kept
        assert ("a", 2) in queries
        assert ("d", 2) not in queries

    def test_count_and_seed(self, voc_source: MaskSource) -> None:
        lists = open_lists(voc_source, get_protocol("hsnet"), fold=0)
        assert len(evaluation_specs(lists, shots=1)) == 1000
        assert evaluation_specs(lists, shots=1, count=5)[:] == evaluation_specs(lists, shots=1)[:5]
        assert evaluation_specs(lists, shots=1, seed=0)[:5] != evaluation_specs(lists, shots=1, seed=1)[:5]

    @pytest.mark.parametrize("ways", [1, 2])
    def test_repeats_are_the_runs_of_the_seeds_that_follow(self, voc_source: MaskSource, ways: int) -> None:
        lists = open_lists(voc_source, get_protocol("bam"), fold=0)
        together = evaluation_specs(lists, shots=1, count=3, seed=7, ways=ways)
        once = replace(lists, protocol=replace(lists.protocol, repeats=1))
        runs = [evaluation_specs(once, shots=1, count=3, seed=seed, ways=ways) for seed in range(7, 12)]
        assert list(together) == [spec for run in runs for spec in run]

    def test_more_ways_than_classes(self, voc_source: MaskSource) -> None:
        with pytest.raises(DataError, match="3-way episodes need 3 classes, the pairs have 2"):
            evaluation_specs(open_lists(voc_source, get_protocol("hsnet"), fold=0), shots=1, ways=3)

    def test_training_draws_by_chance(self, voc_source: MaskSource) -> None:
        lists = open_lists(voc_source, get_protocol("hsnet"), fold=0)
        specs = draw(lists, lists.training_index, lists.training_pairs, shots=1, count=30, seed=0, order="random")
        assert {spec.class_id for spec in specs} == {6, 7, 11, 12}
        assert not {1, 2} & {spec.class_id for spec in specs}


class TestOpenLists:
    def test_one_index_where_both_splits_are_the_same(self, own: MaskSource) -> None:
        lists = open_lists(own, custom_protocol(training_split="all", evaluation_split="all"), fold=0)
        assert lists.training_index is lists.evaluation_index
        assert lists.fold is None
        assert set(lists.fingerprint) == {"training", "evaluation"}

    def test_cache(self, voc_source: MaskSource, tmp_path: Path) -> None:
        lists = open_lists(voc_source, get_protocol("hsnet"), fold=0, index_cache=tmp_path)
        assert any(tmp_path.iterdir())
        again = open_lists(voc_source, get_protocol("hsnet"), fold=0, index_cache=tmp_path)
        assert again.training_index.areas == lists.training_index.areas

    def test_unknown_split(self, own: MaskSource) -> None:
        with pytest.raises(DataError, match="no split 'nowhere'"):
            open_lists(own, custom_protocol(evaluation_split="nowhere"), fold=0)

    def test_nothing_to_train_on(self, own: MaskSource) -> None:
        lists = open_lists(own, custom_protocol(), fold=0)
        for refused in (lists.check_base, lambda: lists.choices):
            with pytest.raises(DataError, match="nothing to train on: all classes of folder are to be scored; name"):
                refused()
        lists = open_lists(own, custom_protocol(), fold=0, novel_classes=NAMES[1:])
        lists.check_base()
        with pytest.raises(
            DataError, match=r"too few base classes to hold some out for choices: at least 2 .* there is ant; name"
        ):
            _ = lists.choices
