"""Class folds of PASCAL-5i (Shaban et al. 2017) and COCO-20i (Nguyen and Todorovic 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from episodes.types import DataError, FoldedDataset

FOLDS = 4
_CLASSES: dict[FoldedDataset, int] = {"pascal": 20, "coco": 80}


@dataclass(frozen=True)
class ClassSplit:
    """Class ids to train on, which may be none, and class ids to be scored on; no class is in both.

    Raises:
        DataError: a class on both sides, or nothing to be scored.
    """

    base: tuple[int, ...]
    novel: tuple[int, ...]

    def __post_init__(self) -> None:
        shared = sorted(set(self.base) & set(self.novel))
        if shared:
            raise DataError(f"classes {shared} are both base and novel; keep each on one side")
        if not self.novel:
            raise DataError("a class split needs classes to be scored, but there is no novel class; name one or more")


def _check(fold: int) -> int:
    if isinstance(fold, bool) or fold not in range(FOLDS):
        raise DataError(f"fold must be 0, 1, 2 or 3; got {fold}")
    return int(fold)


def pascal_fold(fold: int) -> tuple[int, ...]:
    """VOC class ids of a fold: {5 i + 1 .. 5 i + 5}.

    >>> pascal_fold(1)
    (6, 7, 8, 9, 10)
    """
    first = 5 * _check(fold) + 1
    return tuple(range(first, first + 5))


def coco_fold(fold: int) -> tuple[int, ...]:
    """Category *positions* of a fold, 0-based in ascending order of category id: {i, i + 4, i + 8, ...}.

    >>> coco_fold(2)[:3]
    (2, 6, 10)
    """
    return tuple(range(_check(fold), _CLASSES["coco"], FOLDS))


def _fold_classes(class_ids: Sequence[int], dataset: FoldedDataset, fold: int) -> tuple[int, ...]:
    if dataset not in _CLASSES:
        raise DataError(f"folds are known for pascal and coco; got {dataset!r}")
    ordered = sorted(class_ids)
    if len(ordered) != _CLASSES[dataset]:
        raise DataError(f"the folds of {dataset} need its {_CLASSES[dataset]} classes; got {len(ordered)}")
    positions = (c - 1 for c in pascal_fold(fold)) if dataset == "pascal" else coco_fold(fold)
    return tuple(ordered[position] for position in positions)


def class_split(class_ids: Sequence[int], dataset: FoldedDataset, fold: int) -> ClassSplit:
    """Base and novel classes when `fold` is the test fold.

    Args:
        class_ids: all class ids of the data set, 20 or 80.
        dataset: whose folds.
        fold: 0..3; its classes are novel, all others base.

    Raises:
        DataError: fold outside 0..3, unknown data set, or a wrong number of classes.
    """
    novel = _fold_classes(class_ids, dataset, fold)
    return ClassSplit(base=tuple(c for c in sorted(class_ids) if c not in novel), novel=novel)


def held_out_split(class_ids: Sequence[int], dataset: FoldedDataset, fold: int, validation_fold: int) -> ClassSplit:
    """Base and validation classes for model selection that never sees the test fold's classes.

    Args:
        class_ids: all class ids of the data set.
        dataset: whose folds.
        fold: the test fold; its classes are on neither side.
        validation_fold: another fold; its classes become `novel`, the remaining two folds are `base`.

    Raises:
        DataError: as `class_split`, or both folds are the same.
    """
    if _check(fold) == _check(validation_fold):
        raise DataError(f"validation fold {validation_fold} is the test fold; choose another of 0..3")
    test = set(_fold_classes(class_ids, dataset, fold))
    novel = _fold_classes(class_ids, dataset, validation_fold)
    base = tuple(c for c in sorted(class_ids) if c not in test and c not in novel)
    return ClassSplit(base=base, novel=novel)
