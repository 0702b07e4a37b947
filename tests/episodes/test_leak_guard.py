"""The guard against leaks: it is silent on lists that keep the rules, and fires on every poison."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from episodes.fold_lists import FoldLists, draw, open_lists
from episodes.ignored_classes import IgnoredClasses
from episodes.labelled import LabelledImages
from episodes.leak_guard import LeakGuard, check_labelled
from episodes.protocols import custom_protocol, get_protocol
from episodes.sources import FolderSource, VocSource
from episodes.types import DataError, EpisodeSpec, UInt8Array

PUBLISHED = ("hsnet", "pfenet", "bam", "repri")


def lists_of(root: Path, protocol: str = "hsnet", **changes: Any) -> FoldLists:
    """Fold 0: classes 1 and 2 are novel; every second photo of class 17 shows class 1 in a corner."""
    rules = dataclasses.replace(get_protocol(protocol), min_area=1, min_grid_points=0, **changes)
    return open_lists(VocSource(root), rules, fold=0)


def episodes(lists: FoldLists, count: int = 60) -> Sequence[EpisodeSpec]:
    return draw(lists, lists.training_index, lists.training_pairs, shots=1, count=count, seed=0, order="random")


def check(lists: FoldLists, specs: Sequence[EpisodeSpec], **options: Any) -> LeakGuard:
    guard = LeakGuard()
    guard.check_episodes(lists, specs, options.pop("masks", lists.training_source), purpose="training")
    return guard


def one(query: str, class_id: int, support: str = "trainaug_17_0") -> list[EpisodeSpec]:
    return [EpisodeSpec(class_id=class_id, support_ids=(support,), query_id=query, seed=0)]


class TestSilent:
    @pytest.mark.parametrize("protocol", PUBLISHED)
    def test_on_lists_that_keep_the_rules(self, shared_voc: Path, protocol: str) -> None:
        lists = lists_of(shared_voc, protocol)
        record = check(lists, episodes(lists)).record()
        showing = {image for image, shown in lists.training_index.areas.items() if set(shown) & {1, 2}}
        used = {image for spec in episodes(lists) for image in (*spec.support_ids, spec.query_id)}
        expected = 0 if protocol == "bam" else len(showing & used)
        assert record["photos_that_show_novel_classes"] == expected
        assert bool(expected) == (protocol != "bam")
        filled = {name for name, count in record["novel_pixels"].items() if count}
        assert (
            filled == {"hsnet": {"background"}, "pfenet": {"background"}, "bam": set(), "repri": {"ignored"}}[protocol]
        )
        assert record["training"] == {
            "episodes": 60,
            "photos": len(used),
            "classes": sorted({spec.class_id for spec in episodes(lists)}),
        }
        assert record["compared_with_evaluation_by_content"]["files"] == len(used)
        assert record["choices"]["episodes"] == 0

    @pytest.mark.parametrize("protocol", PUBLISHED)
    def test_on_choices(self, shared_voc: Path, protocol: str) -> None:
        lists, guard = lists_of(shared_voc, protocol), LeakGuard()
        pairs = lists.pairs_to_choose
        assert {class_id for _, class_id in pairs} <= set(lists.choices.novel)
        guard.check_pairs(lists, pairs, lists.training_source, purpose="choices")
        assert guard.record()["choices"]["photos"] == len({image_id for image_id, _ in pairs})


class TestClassesAndPhotos:
    @pytest.mark.parametrize("class_id", [1, 2, 99])
    def test_a_novel_class(self, shared_voc: Path, class_id: int) -> None:
        with pytest.raises(DataError, match=r"leak: the training would use .*, not among the base classes"):
            check(lists_of(shared_voc), one("trainaug_17_1", class_id))

    def test_a_photo_of_the_evaluation(self, shared_voc: Path) -> None:
        with pytest.raises(DataError, match=r"leak: the training would use photo 'val_01_0', which the evaluation"):
            check(lists_of(shared_voc), one("val_01_0", 17))

    def test_a_photo_of_no_list(self, shared_voc: Path) -> None:
        """Of the evaluation's split, but without a novel class: the evaluation does not draw it; nor may training."""
        with pytest.raises(DataError, match=r"photo 'val_06_0', which is not of the split 'trainaug'"):
            check(lists_of(shared_voc), one("val_06_0", 6))

    def test_choices_on_test_data(self, shared_voc: Path) -> None:
        lists, guard = lists_of(shared_voc), LeakGuard()
        with pytest.raises(DataError, match=r"leak: the choice of a threshold would use photo 'val_02_1'"):
            guard.check_episodes(lists, one("val_02_1", 17), lists.training_source, purpose="choices")

    def test_a_photo_under_two_names(self, tiny_voc: Path) -> None:
        photos = tiny_voc / "JPEGImages"
        shutil.copy(photos / "val_01_2.jpg", photos / "trainaug_17_0.jpg")
        Image.open(photos / "trainaug_17_0.jpg").load()
        with pytest.raises(DataError, match=r"would use .*trainaug_17_0\.jpg, the same photo as .*val_01_2\.jpg"):
            check(lists_of(tiny_voc), one("trainaug_17_2", 17))

    def test_photos_of_as_many_bytes_are_read_and_let_pass(self, tiny_voc: Path) -> None:
        photos = tiny_voc / "JPEGImages"
        sizes = [(photos / name).stat().st_size for name in ("val_01_2.jpg", "trainaug_17_0.jpg")]
        for name, size in zip(("val_01_2.jpg", "trainaug_17_0.jpg"), sizes, strict=True):
            with (photos / name).open("ab") as file:  # what follows a JPEG's end is not read
                file.write(b"\0" * (max(sizes) + 9 - size))
        record = check(lists_of(tiny_voc), one("trainaug_17_2", 17)).record()
        assert record["compared_with_evaluation_by_content"]["read"] >= 2


class TestPixels:
    def test_a_protocol_that_leaves_novel_photos_out(self, shared_voc: Path) -> None:
        """The index is poisoned: it does not know of class 1 in the corner."""
        lists = lists_of(shared_voc, "bam")
        areas = {
            image: {class_id: area for class_id, area in shown.items() if class_id != 1}
            for image, shown in lists.training_index.areas.items()
        }
        poisoned = dataclasses.replace(lists, training_index=dataclasses.replace(lists.training_index, areas=areas))
        assert ("trainaug_17_1", 17) in poisoned.training_pairs
        with pytest.raises(
            DataError, match=r"leak: photo 'trainaug_17_\d' shows aeroplane, a novel class, and protocol bam"
        ):
            check(poisoned, episodes(poisoned))

    def test_novel_pixels_that_are_not_ignored(self, shared_voc: Path) -> None:
        lists = lists_of(shared_voc, "repri")
        with pytest.raises(DataError, match=r"100 pixels of aeroplane, a novel class, are background in the training"):
            check(lists, one("trainaug_17_1", 17), masks=lists.source)

    @pytest.mark.parametrize("protocol", ["hsnet", "repri"])
    def test_novel_pixels_marked_as_the_object(self, shared_voc: Path, protocol: str) -> None:
        class Leaking(VocSource):
            def mask(self, image_id: str, class_id: int) -> UInt8Array:
                found = super().mask(image_id, class_id)
                found[0, 0] = 1
                return found

        lists = lists_of(shared_voc, protocol)
        masks = IgnoredClasses(Leaking(shared_voc), frozenset({1, 2})) if protocol == "repri" else Leaking(shared_voc)
        with pytest.raises(DataError, match=r"leak: 1 pixels of aeroplane, a novel class, are marked as sheep"):
            check(lists, one("trainaug_17_1", 17), masks=masks)


def write_folder(root: Path, shown: dict[str, tuple[int, ...]]) -> FolderSource:
    """Photos of classes side by side, in one split that is trained and scored."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    for number, (image_id, classes) in enumerate(shown.items()):
        labels = np.zeros((30, 40), np.uint8)
        for place, class_id in enumerate(classes):
            labels[5:25, 2 + 12 * place : 12 + 12 * place] = class_id
        Image.fromarray(np.full((30, 40, 3), 9 * number, np.uint8)).save(root / "images" / f"{image_id}.png")
        Image.fromarray(labels).save(root / "masks" / f"{image_id}.png")
    return FolderSource(root)


class TestOneSplitForBoth:
    SHOWN: ClassVar = {"a": (1,), "b": (1, 2), "c": (2,), "d": (2, 3), "e": (3,), "f": (1, 3), "g": (2,), "h": (1,)}

    def lists(self, tmp_path: Path, shown: dict[str, tuple[int, ...]]) -> FoldLists:
        return open_lists(write_folder(tmp_path / "own", shown), custom_protocol(), fold=0, novel_classes=["cat"])

    def test_what_is_scored_trains_nothing(self, tmp_path: Path) -> None:
        lists = self.lists(tmp_path, self.SHOWN)
        assert lists.photos_to_score == {"d", "e", "f"}
        assert {image_id for image_id, _ in lists.training_pairs} == {"a", "b", "c", "g", "h"}
        assert {image_id for image_id, _ in lists.pairs_to_choose} <= {"a", "b", "c", "g", "h"}
        specs = draw(lists, lists.training_index, lists.training_pairs, shots=1, count=20, seed=0, order="random")
        record = check(lists, specs).record()
        assert (record["evaluation_photos"], record["left_out_of_training"]) == (3, 3)
        with pytest.raises(DataError, match="photo 'f', which the evaluation draws"):
            check(lists, one("f", 1, support="a"))

    def test_where_nothing_is_left(self, tmp_path: Path) -> None:
        lists = self.lists(tmp_path, {"a": (1, 3), "b": (1, 3), "c": (2, 3)})
        with pytest.raises(DataError, match=r"every photo of .* that shows ant, bee also shows a class to be scored"):
            lists.check_base()
        assert lists.pairs_to_choose == []


class TestLabelled:
    def images(self, root: Path, part: str, colours: Sequence[int]) -> LabelledImages:
        files = []
        for number, colour in enumerate(colours):
            file = root / part / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (colour, 0, 0)).save(file)
            files.append(f"{part}/{number}.png")
        return LabelledImages(name=part, root=root, files=tuple(files), labels=tuple(f"{part}{c}" for c in colours))

    def test_apart(self, tmp_path: Path) -> None:
        train, test = self.images(tmp_path, "train", (1, 2)), self.images(tmp_path, "test", (3, 4, 5))
        record = check_labelled(train, test)
        assert (record["photos"], record["compared_with"][0]["photos"]) == (2, 3)

    def test_the_same_bytes(self, tmp_path: Path) -> None:
        train, test = self.images(tmp_path, "train", (1, 2)), self.images(tmp_path, "test", (3, 2))
        with pytest.raises(DataError, match=r"train/1\.png, the same photo as .*test/1\.png"):
            check_labelled(train, test)

    def test_the_same_file(self, tmp_path: Path) -> None:
        train = self.images(tmp_path, "train", (1, 2))
        with pytest.raises(DataError, match=r"train/0\.png is in train and in other"):
            check_labelled(train, dataclasses.replace(train, name="other"))
