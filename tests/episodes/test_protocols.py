from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.folds import class_split, held_out_split
from episodes.index import ClassIndex, build_index
from episodes.protocols import (
    PROTOCOL_NAMES,
    EpisodeProtocol,
    Pair,
    custom_protocol,
    evaluation_pairs,
    get_protocol,
    list_pairs,
    query_pairs,
    read_protocol,
    training_pairs,
)
from episodes.sampler import EpisodeSampler, drop_small_classes
from episodes.sources import VocSource
from episodes.sources.coco import CocoSource
from episodes.sources.voc import VOC_CLASS_NAMES
from episodes.types import DataError, FoldedDataset, MaskSource
from episodes.verify import verify

_REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "hsnet_splits"


def small_index(points: dict[str, dict[int, int]]) -> ClassIndex:
    areas = {image_id: {c: 1000 * n + 10 for c, n in row.items()} for image_id, row in points.items()}
    return ClassIndex(tuple(points), areas, points, "fingerprint")


NAMES = ("hsnet", "pfenet", "bam", "repri")
# From reference/protocols.md: episodes, repeats, resolution, fit, scoring size, query draw, supports may repeat,
# smallest area, novel classes in training, shot rule, FB-IoU.
FACTS = {
    ("hsnet", "pascal"): (1000, 1, 400, "squash", 400, "list", True, 1, "background", "vote", True),
    ("hsnet", "coco"): (1000, 1, 400, "squash", 400, "class", True, 1, "background", "vote", True),
    ("pfenet", "pascal"): (5000, 1, 473, "pad", None, "image", False, 2048, "background", "mean", True),
    ("pfenet", "coco"): (20000, 1, 641, "pad", None, "image", False, 2048, "background", "mean", True),
    ("bam", "pascal"): (1000, 5, 473, "pad", None, "image", False, 2048, "excluded", "reweighted", True),
    ("bam", "coco"): (1000, 5, 641, "pad", None, "image", False, 2048, "excluded", "reweighted", True),
    ("repri", "pascal"): (1000, 5, 417, "pad", 417, "image", False, 2048, "ignored", "pooled", False),
    ("repri", "coco"): (1000, 5, 417, "pad", 417, "image", False, 2048, "ignored", "pooled", False),
}


class TestPublished:
    @pytest.mark.parametrize(("name", "dataset"), FACTS)
    def test_facts(self, name: str, dataset: FoldedDataset) -> None:
        protocol = get_protocol(name, dataset)
        assert (protocol.name, protocol.dataset) == (name, dataset)
        assert (
            protocol.episodes,
            protocol.repeats,
            protocol.resolution,
            protocol.fit,
            protocol.scoring_size,
            protocol.query_draw,
            protocol.repeat_supports,
            protocol.min_area,
            protocol.novel_in_training,
            protocol.shot_rule,
            protocol.reports_fb_iou,
        ) == FACTS[name, dataset]
        assert (protocol.training_split, protocol.evaluation_split) == (None, None)
        assert protocol.small_queries == (name != "hsnet")

    @pytest.mark.parametrize(("name", "dataset"), FACTS)
    def test_descriptions_agree_with_the_values(self, name: str, dataset: FoldedDataset) -> None:
        protocol = get_protocol(name, dataset)
        assert f"{protocol.episodes} episodes" in protocol.description
        assert f"{protocol.resolution} x {protocol.resolution}" in protocol.description
        assert (protocol.repeats == 5) == ("of 5" in protocol.description)

    def test_lists_by_rule_are_for_pascal(self) -> None:
        assert get_protocol("hsnet").min_grid_points == 3
        assert get_protocol("hsnet", "coco").min_grid_points == 0
        assert not get_protocol("hsnet", "coco").listed

    def test_default_splits_of_voc_are_those_of_the_papers(self, shared_voc: Path) -> None:
        assert VocSource(shared_voc).default_splits == ("trainaug", "val")

    def test_unknown_names(self) -> None:
        with pytest.raises(DataError, match="no protocol 'hsnett'; known are: hsnet, pfenet, bam, repri, custom"):
            get_protocol("hsnett")
        with pytest.raises(
            DataError, match="pfenet is defined for pascal and coco, not for 'ade'; take protocol custom"
        ):
            get_protocol("pfenet", "ade")  # type: ignore[arg-type]
        with pytest.raises(DataError, match="hsnet is defined for pascal and coco, not for a data set without folds"):
            get_protocol("hsnet", None)

    def test_custom_goes_with_anything(self) -> None:
        assert get_protocol("custom", None) == custom_protocol()
        assert get_protocol("custom", "coco").dataset == "coco"
        assert set(PROTOCOL_NAMES) == {*NAMES, "custom"}


class TestCustom:
    def test_defaults_admit_every_pair(self) -> None:
        index = small_index({"a": {1: 0, 6: 3}, "b": {1: 1}})
        assert list_pairs(custom_protocol(), index, [1, 6]) == index.pairs([1, 6])

    def test_defaults_suit_ones_own_data(self) -> None:
        for protocol in (custom_protocol(), get_protocol("custom", None), get_protocol("custom", "pascal")):
            assert (protocol.name, protocol.query_draw, protocol.novel_in_training) == ("custom", "random", "ignored")
        given = custom_protocol(query_draw="list", novel_in_training="background")
        assert (given.query_draw, given.novel_in_training) == ("list", "background")

    def test_fields(self) -> None:
        protocol = custom_protocol(name="mine", episodes=7, listed=[["a", 1], ("b", 2)], scoring_size=None)
        assert (protocol.name, protocol.episodes, protocol.listed) == ("mine", 7, frozenset({("a", 1), ("b", 2)}))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"episode": 3}, "a protocol has no field 'episode'; its fields are: name, description, dataset"),
            ({"episodes": 0}, "protocol custom: episodes must be a whole number, at least 1; got 0"),
            ({"episodes": True}, "episodes must be a whole number, at least 1; got True"),
            ({"repeats": 2.0}, "repeats must be a whole number, at least 1; got 2.0"),
            ({"seed": -1}, "seed must be a whole number, at least 0; got -1"),
            ({"scoring_size": 0}, "scoring_size must be a whole number, at least 1; got 0"),
            ({"resolution": None}, "resolution must be a whole number, at least 1; got None"),
            ({"fit": "crop"}, "fit must be one of squash, pad; got 'crop'"),
            ({"query_draw": "pair"}, "query_draw must be one of list, random, image, class; got 'pair'"),
            ({"novel_in_training": 1}, "novel_in_training must be one of background, excluded, ignored; got 1"),
            ({"shot_rule": "max"}, "shot_rule must be one of pooled, vote, mean, reweighted; got 'max'"),
            ({"dataset": "ade"}, "dataset must be one of pascal, coco; got 'ade'"),
            ({"repeat_supports": 1}, "repeat_supports must be true or false; got 1"),
            ({"training_split": ""}, "training_split must be a text that is not empty; got ''"),
            ({"name": 3}, "name must be a text that is not empty; got 3"),
            ({"listed": [["a", "b"]]}, "listed must be pairs of an image id and a class id, got"),
            ({"listed": "ab"}, "listed must be pairs of an image id and a class id, got 'ab'"),
        ],
    )
    def test_bad_fields(self, fields: dict[str, object], message: str) -> None:
        with pytest.raises(DataError, match=message):
            custom_protocol(**fields)

    def test_every_field_is_validated(self) -> None:
        for field in dataclasses.fields(EpisodeProtocol):
            with pytest.raises(DataError, match=field.name):
                custom_protocol(**{field.name: object()})

    def test_published_ones_are_validated_too(self) -> None:
        with pytest.raises(DataError, match="protocol hsnet: episodes must be a whole number, at least 1; got 0"):
            replace(get_protocol("hsnet"), episodes=0)
        with pytest.raises(DataError, match="protocol hsnet: listed must be pairs"):
            replace(get_protocol("hsnet"), listed=frozenset({("a", "b")}))  # type: ignore[arg-type]


class TestProtocolFile:
    def test_fields_are_those_of_the_protocol(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(
            'name = "mine"\ndataset = "coco"\nepisodes = 500\nfit = "pad"\nresolution = 473\nmin_area = 2048\n'
            'evaluation_split = "test"\nlisted = [["a", 3]]\nrepeat_supports = true\n'
        )
        assert read_protocol(path) == custom_protocol(
            name="mine",
            dataset="coco",
            episodes=500,
            fit="pad",
            resolution=473,
            min_area=2048,
            evaluation_split="test",
            listed={("a", 3)},
            repeat_supports=True,
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"episodes = ", "is not TOML"),
            (b"\xff", "is not TOML"),
            (b"a = " + b"[" * 5000, "is not TOML"),
            (b"episode = 3", "a protocol has no field 'episode'"),
            (b"[protocol]\nepisodes = 3", "a protocol has no field 'protocol'"),
            (b'episodes = "3"', "episodes must be a whole number, at least 1; got '3'"),
            (b'"a\\nb" = 1', r"no field 'a\\nb'"),
        ],
    )
    def test_mistakes_are_one_line_that_names_the_file(self, tmp_path: Path, text: bytes, message: str) -> None:
        path = tmp_path / "mine.toml"
        path.write_bytes(text)
        with pytest.raises(DataError, match=message) as caught:
            read_protocol(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["mine", "my rules v1.2", "hsnet"])
    def test_it_is_named_after_its_file_unless_it_names_itself(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / f"{name}.toml"
        path.write_text("episodes = 3\n")
        assert read_protocol(path) == custom_protocol(name=name, episodes=3)
        path.write_text('name = "another"\n')
        assert read_protocol(path).name == "another"

    def test_its_name_is_in_the_message(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text("episodes = 0")
        with pytest.raises(DataError, match=r"mine\.toml: protocol mine: episodes must be a whole number"):
            read_protocol(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read protocol .*none\.toml: No such file"):
            read_protocol(tmp_path / "none.toml")


class TestNovelClassesInTraining:
    INDEX = small_index({"a": {1: 9, 6: 9}, "b": {1: 9}, "c": {1: 9, 11: 0}, "d": {2: 9, 20: 9}, "e": {6: 9}})

    def test_excluded_leaves_out_images_with_any_class_that_is_not_base(self) -> None:
        split = class_split(range(1, 21), "pascal", 1)
        assert training_pairs(get_protocol("bam"), self.INDEX, split) == [("b", 1), ("c", 1), ("d", 2), ("d", 20)]

    def test_excluded_also_leaves_out_the_test_fold_when_classes_are_held_out(self) -> None:
        # fold 1 is the test fold, fold 2 is held out: neither 6 nor 11 may be seen, however small
        split = held_out_split(range(1, 21), "pascal", 1, 2)
        assert training_pairs(get_protocol("bam"), self.INDEX, split) == [("b", 1), ("d", 2), ("d", 20)]

    @pytest.mark.parametrize("name", ["pfenet", "repri"])
    def test_otherwise_images_stay(self, name: str) -> None:
        split = class_split(range(1, 21), "pascal", 1)
        expected = [("a", 1), ("b", 1), ("c", 1), ("d", 2), ("d", 20)]
        assert training_pairs(get_protocol(name), self.INDEX, split) == expected


class TestQueryPairs:
    INDEX = small_index({"a": {1: 9, 2: 0, 6: 9}, "b": {1: 0}, "c": {2: 9}})

    def test_small_objects_are_queries_in_images_of_the_list(self) -> None:
        protocol = get_protocol("pfenet")
        pairs = list_pairs(protocol, self.INDEX, [1, 2])
        assert pairs == [("a", 1), ("c", 2)]
        assert query_pairs(protocol, self.INDEX, pairs) == [("a", 1), ("a", 2), ("c", 2)]

    def test_not_of_classes_that_are_left_out(self) -> None:
        assert query_pairs(get_protocol("pfenet"), self.INDEX, [("a", 1)]) == [("a", 1)]

    def test_elsewhere_queries_are_the_list(self) -> None:
        assert query_pairs(get_protocol("hsnet"), self.INDEX, [("c", 2), ("a", 1)]) == [("c", 2), ("a", 1)]


def test_small_objects_are_left_out() -> None:
    index = small_index({"a": {1: 2, 6: 3}, "b": {1: 3}, "2007_001408": {16: 2}})
    assert list_pairs(get_protocol("hsnet"), index, [1, 6, 16]) == [("a", 6), ("b", 1), ("2007_001408", 16)]
    by_area = replace(get_protocol("hsnet"), min_grid_points=0, min_area=3000, listed=frozenset())
    assert list_pairs(by_area, index, [1, 6]) == [("a", 6), ("b", 1)]


def test_training_and_evaluation_take_opposite_classes() -> None:
    index = small_index({"a": {1: 9, 6: 9}, "b": {6: 9}, "c": {20: 9}})
    split = class_split(range(1, 21), "pascal", 1)
    assert evaluation_pairs(get_protocol("hsnet"), index, split) == [("a", 6), ("b", 6)]
    assert training_pairs(get_protocol("hsnet"), index, split) == [("a", 1), ("c", 20)]


# ---- against the published lists, on real data -------------------------------------------------------------


def published(part: str, fold: int) -> list[tuple[str, int]]:
    root = Path(os.environ.get("FEWSHOT_SEG_HSNET_SPLITS", _REFERENCE))
    path = root / "pascal" / part / f"fold{fold}.txt"
    if not path.is_file():
        pytest.skip(f"no hsnet lists at {root}; set FEWSHOT_SEG_HSNET_SPLITS to the folder hsnet_splits")
    return [(line.split("__")[0], int(line.split("__")[1])) for line in path.read_text().split()]


@pytest.fixture(scope="module")
def voc_indices(voc_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClassIndex]:
    cache = tmp_path_factory.mktemp("index")
    source = VocSource(voc_root)
    return {split: build_index(source, split, cache_dir=cache) for split in ("val", "trainaug")}


@pytest.mark.voc
@pytest.mark.parametrize("fold", range(4))
def test_evaluation_list_is_the_published_one(voc_indices: dict[str, ClassIndex], fold: int) -> None:
    index, reference = voc_indices["val"], published("val", fold)
    present = [pair for pair in reference if pair[0] in index.areas]
    print(f"hsnet val fold {fold}: {len(present)} of {len(reference)} pairs present")
    split = class_split(tuple(VOC_CLASS_NAMES), "pascal", fold)
    assert evaluation_pairs(get_protocol("hsnet"), index, split) == present


@pytest.mark.voc
@pytest.mark.parametrize("fold", range(4))
def test_training_list_is_nearly_the_published_one_at_reduced_size(
    voc_indices: dict[str, ClassIndex], voc_root: Path, fold: int
) -> None:
    index = voc_indices["trainaug"]
    reference = [pair for other in range(4) if other != fold for pair in published("trn", other)]
    present = {pair for pair in reference if pair[0] in index.areas}
    split = class_split(tuple(VOC_CLASS_NAMES), "pascal", fold)
    ours = set(training_pairs(get_protocol("hsnet"), index, split))
    differing = ours ^ present
    print(
        f"hsnet training for fold {fold}: {len(present)} of {len(reference)} pairs present, "
        f"{len(differing)} differ (masks here are reduced)"
    )
    source = VocSource(voc_root)
    if max(max(source.image(image_id).shape) for image_id in index.image_ids[:20]) >= 500:
        assert not differing  # original size: the rule decides every pair
        return
    # The masks here were shrunk from (mostly) 500 to 384 pixels, so a grid point may be a pixel off and the
    # rule cannot be exact. What can be asked: few pairs differ, and all of them are near the limit of 3.
    assert len(differing) < 0.01 * len(present)
    assert all(abs(index.grid_points[i].get(c, 0) - 2.5) <= 2.5 for i, c in differing)


@pytest.mark.voc
def test_real_data_smoke(voc_root: Path, voc_indices: dict[str, ClassIndex]) -> None:
    index = voc_indices["val"]
    assert index.class_ids == tuple(range(1, 21))
    protocol = get_protocol("hsnet")
    pairs = evaluation_pairs(protocol, index, class_split(range(1, 21), "pascal", 2))
    sampler = EpisodeSampler(
        pairs, shots=5, seed=protocol.seed, length=protocol.episodes, order="list", repeat_supports=True
    )
    spec = sampler[len(pairs) + 3]
    assert (spec.query_id, spec.class_id) == pairs[3]
    source = VocSource(voc_root)
    for image_id in (spec.query_id, *spec.support_ids):
        assert (source.mask(image_id, spec.class_id) == 1).any()


@pytest.mark.voc
def test_verify_on_some_real_files(voc_root: Path) -> None:
    class Some(VocSource):
        def ids(self, split: str) -> tuple[str, ...]:
            return super().ids(split)[:25]

    assert {problem.kind for problem in verify(Some(voc_root), "val")} <= {"empty-class", "too-few"}


def test_numbers_are_plain_python(tiny_voc: Path) -> None:
    # numpy integers would not survive JSON records of results.
    index = build_index(VocSource(tiny_voc), "val")
    (first, class_id), *_ = index.pairs([1])
    assert type(index.areas[first][class_id]) is int
    assert not isinstance(index.grid_points[first][class_id], np.generic)


# ---- PFENet's and BAM's filters against a plain loop over the labels -----------------------------------------


Labels = list[tuple[str, dict[int, int]]]
"""Image id and its classes' areas."""


def loop_lists(labels: Labels, classes: set[int], base: set[int] | None) -> tuple[list[Pair], list[Pair]]:
    """PFENet's `make_dataset` (with `base`, BAM's filter_intersection) and what its `__getitem__` draws from."""
    listed, drawn = [], []
    for image_id, counts in labels:
        if base is not None and not set(counts) <= base:
            continue
        large = [c for c in sorted(counts) if c in classes and counts[c] >= 2 * 32 * 32]
        listed += [(image_id, c) for c in large]
        if large:
            drawn += [(image_id, c) for c in sorted(counts) if c in classes]
    return listed, drawn


def check_against_the_loop(
    source: MaskSource, index: ClassIndex, labels: Labels, dataset: FoldedDataset, fold: int
) -> None:
    split = class_split(tuple(source.class_names), dataset, fold)
    listed, drawn = loop_lists(labels, set(split.novel), None)
    for name in ("pfenet", "bam", "repri"):
        protocol = get_protocol(name, dataset)
        pairs = evaluation_pairs(protocol, index, split)
        assert pairs == listed
        assert query_pairs(protocol, index, pairs) == [
            pair for pair in drawn if pair[1] in {class_id for _, class_id in listed}
        ]
    all_base, _ = loop_lists(labels, set(split.base), None)
    clean, _ = loop_lists(labels, set(split.base), set(split.base))
    assert training_pairs(get_protocol("pfenet", dataset), index, split) == all_base
    assert training_pairs(get_protocol("bam", dataset), index, split) == clean
    assert clean != all_base
    assert listed


@pytest.mark.voc
def test_filters_match_a_plain_loop_over_voc(voc_root: Path, voc_indices: dict[str, ClassIndex]) -> None:
    source = VocSource(voc_root)
    labels = []
    for image_id in source.ids("val"):
        mask = np.asarray(Image.open(source.mask_file(image_id)))
        values, counts = np.unique(mask, return_counts=True)
        found = dict(zip(values.tolist(), counts.tolist(), strict=True))
        labels.append((image_id, {c: n for c, n in found.items() if c not in (0, 255)}))
    check_against_the_loop(source, voc_indices["val"], labels, "pascal", 2)


@pytest.fixture(scope="module")
def coco(coco_root: Path) -> CocoSource:
    return CocoSource(coco_root)


@pytest.fixture(scope="module")
def coco_indices(coco: CocoSource) -> dict[str, ClassIndex]:
    return {split: build_index(coco, split) for split in coco.default_splits}


@pytest.fixture(scope="module")
def coco_labels(coco: CocoSource) -> Labels:
    """Areas of every class in every image, from one mask at a time."""
    ids = coco.ids(coco.default_splits[1])
    return [(i, {c: int((coco.mask(i, c) == 1).sum()) for c in coco.class_areas(i)}) for i in ids]


@pytest.mark.coco
@pytest.mark.parametrize("fold", range(4))
def test_filters_match_a_plain_loop_over_coco(
    coco: CocoSource, coco_indices: dict[str, ClassIndex], coco_labels: Labels, fold: int
) -> None:
    check_against_the_loop(coco, coco_indices[coco.default_splits[1]], coco_labels, "coco", fold)


@pytest.mark.coco
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fold", range(4))
def test_episodes_of_coco_keep_to_their_fold(
    coco: CocoSource, coco_indices: dict[str, ClassIndex], name: str, fold: int
) -> None:
    protocol = get_protocol(name, "coco")
    split = class_split(tuple(coco.class_names), "coco", fold)
    index = coco_indices[coco.default_splits[1]]
    pairs, dropped = drop_small_classes(
        evaluation_pairs(protocol, index, split), shots=1, repeat_supports=protocol.repeat_supports
    )
    sampler = EpisodeSampler(
        pairs,
        shots=1,
        seed=protocol.seed,
        length=60,
        order=protocol.query_draw,
        repeat_supports=protocol.repeat_supports,
        queries=query_pairs(protocol, index, pairs),
    )
    for spec in sampler:
        assert spec.class_id in set(split.novel) - set(dropped)
        assert index.areas[spec.support_ids[0]][spec.class_id] >= protocol.min_area
        assert spec.class_id in index.areas[spec.query_id]


@pytest.mark.coco
@pytest.mark.parametrize("fold", range(4))
def test_training_of_coco_keeps_to_the_base_classes(
    coco: CocoSource, coco_indices: dict[str, ClassIndex], fold: int
) -> None:
    index = coco_indices[coco.default_splits[0]]
    split = class_split(tuple(coco.class_names), "coco", fold)
    for name in NAMES:
        pairs = training_pairs(get_protocol(name, "coco"), index, split)
        assert {class_id for _, class_id in pairs} <= set(split.base)
    excluded = training_pairs(get_protocol("bam", "coco"), index, split)
    assert not any(set(index.areas[image_id]) & set(split.novel) for image_id, _ in excluded)
