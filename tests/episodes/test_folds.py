from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from episodes.folds import ClassSplit, class_split, coco_fold, held_out_split, pascal_fold
from episodes.sources.voc import VOC_CLASS_NAMES
from episodes.types import DataError

folds = st.integers(0, 3)
datasets = st.sampled_from(["pascal", "coco"])
# COCO's category ids have gaps; these stand for them.
CLASS_IDS = {"pascal": tuple(range(1, 21)), "coco": tuple(range(3, 3 + 2 * 80, 2))}


def test_pascal_folds_by_name() -> None:
    # The table of Shaban et al. (2017) as every repository has it.
    names = [{VOC_CLASS_NAMES[c] for c in pascal_fold(i)} for i in range(4)]
    assert names == [
        {"aeroplane", "bicycle", "bird", "boat", "bottle"},
        {"bus", "car", "cat", "chair", "cow"},
        {"diningtable", "dog", "horse", "motorbike", "person"},
        {"pottedplant", "sheep", "sofa", "train", "tvmonitor"},
    ]


def test_coco_folds_are_strided() -> None:
    assert coco_fold(0)[:3] == (0, 4, 8)
    assert sorted(p for i in range(4) for p in coco_fold(i)) == list(range(80))


@given(datasets, folds)
def test_classes_never_cross(dataset: str, fold: int) -> None:
    split = class_split(CLASS_IDS[dataset], dataset, fold)
    assert not set(split.base) & set(split.novel)
    assert sorted(split.base + split.novel) == list(CLASS_IDS[dataset])
    assert len(split.novel) == len(CLASS_IDS[dataset]) // 4


@given(datasets, folds, folds)
def test_held_out_classes_are_neither_test_nor_base(dataset: str, fold: int, validation: int) -> None:
    if fold == validation:
        with pytest.raises(DataError, match=f"validation fold {fold} is the test fold"):
            held_out_split(CLASS_IDS[dataset], dataset, fold, validation)
        return
    split = held_out_split(CLASS_IDS[dataset], dataset, fold, validation)
    test_classes = set(class_split(CLASS_IDS[dataset], dataset, fold).novel)
    assert not test_classes & (set(split.base) | set(split.novel))
    assert split.novel == class_split(CLASS_IDS[dataset], dataset, validation).novel
    assert len(split.base) == len(CLASS_IDS[dataset]) // 2


@given(datasets, folds, folds)
def test_novel_classes_of_one_fold_are_base_in_every_other(dataset: str, fold: int, other: int) -> None:
    novel = class_split(CLASS_IDS[dataset], dataset, fold).novel
    split = class_split(CLASS_IDS[dataset], dataset, other)
    assert set(novel) <= set(split.novel if fold == other else split.base)


@pytest.mark.parametrize("fold", [-1, 4, True])
def test_fold_outside(fold: int) -> None:
    for make in (pascal_fold, coco_fold):
        with pytest.raises(DataError, match="fold must be 0, 1, 2 or 3; got"):
            make(fold)


def test_wrong_classes_and_data_set() -> None:
    with pytest.raises(DataError, match="folds of pascal need its 20 classes; got 19"):
        class_split(range(1, 20), "pascal", 0)
    with pytest.raises(DataError, match="known for pascal and coco; got 'ade'"):
        class_split(range(1, 21), "ade", 0)  # type: ignore[arg-type]


def test_class_split_keeps_its_sides_apart() -> None:
    with pytest.raises(DataError, match=r"classes \[2\] are both base and novel"):
        ClassSplit(base=(1, 2), novel=(2,))
    with pytest.raises(DataError, match="there is no novel class"):
        ClassSplit(base=(1, 2), novel=())
