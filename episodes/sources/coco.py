"""COCO as it is distributed, and COCO's JSON format of one's own, as CVAT, Label Studio or Roboflow export it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from episodes.files import is_file, real_path
from episodes.sources.annotation_files import bad_annotation
from episodes.sources.coco_annotations import CocoAnnotations, CocoPhoto, read_annotations
from episodes.sources.coco_outlines import class_boxes
from episodes.sources.coco_reader import CocoReader
from episodes.sources.errors import SourceError
from episodes.sources.split_lists import default_splits, read_split, split_file
from episodes.types import IGNORE, DataError, FoldedDataset, SupportKind, UInt8Array

_CATEGORIES = 80  # of COCO's instances: what COCO-20i divides into folds
_TRAIN_AND_SCORED = (("train2017", "val2017"), ("train2014", "val2014"))
_OWN_NAMES = ("annotations.json", "_annotations.coco.json")


def _photo_folders(root: Path) -> dict[str, Path]:
    """Folder of the photos of every split that has a JSON and photos, in alphabetical order."""
    files = (root / "annotations").glob("instances_*.json")
    folders = {}
    for split in sorted(file.stem.removeprefix("instances_") for file in files):
        found = next((folder for folder in (root / split, root / "images" / split) if folder.is_dir()), None)
        if found is not None:
            folders[split] = found
    return folders


@dataclass(frozen=True)
class CocoSource(CocoReader):
    """COCO's own layout: ``annotations/instances_{split}.json``, photos in ``{split}/`` or ``images/{split}/``.

    Class ids are COCO's category ids (1..90). Image ids are ``{split}/{name of the photo without suffix}``.
    Splits are those whose JSON and folder of photos are there.

    Args:
        root: the folder that holds ``annotations``, or a folder with such a folder named ``coco``.

    Raises:
        DataError: no split in this layout.
    """

    root: Path
    _folders: dict[str, Path] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        root = real_path(self.root)
        for candidate in (root, root / "coco"):
            folders = _photo_folders(candidate)
            if folders:
                object.__setattr__(self, "root", candidate)
                object.__setattr__(self, "_folders", folders)
                return
        came = "has no such files" if root.is_dir() else "does not exist"
        raise DataError(
            f"{root}: expected annotations/instances_SPLIT.json and its photos in SPLIT/ or images/SPLIT/ (for example "
            f"val2017), but it {came}; name the folder that holds annotations"
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that are there, in alphabetical order."""
        return tuple(self._folders)

    @property
    def name(self) -> str:
        """``coco``."""
        return "coco"

    @cached_property
    def class_names(self) -> Mapping[int, str]:
        """The categories by id, from the smallest of the JSON files; all splits must have the same."""
        return read_annotations(self._smallest()).class_names

    @property
    def default_splits(self) -> tuple[str, str]:
        """Those of 2017, else those of 2014, else the first and the last that are there."""
        splits = self.splits
        for pair in _TRAIN_AND_SCORED:
            if set(pair) <= set(splits):
                return pair
        return splits[0], splits[-1]

    @property
    def folds(self) -> FoldedDataset | None:
        """COCO-20i when there are exactly 80 categories."""
        return "coco" if len(self.class_names) == _CATEGORIES else None

    def split_file(self, split: str) -> Path:
        """The JSON of a split."""
        return self.root / "annotations" / f"instances_{split}.json"

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids of a split in the order of its JSON."""
        return tuple(f"{split}/{key}" for key in self._annotations(split).photos)

    def _smallest(self) -> Path:
        files = (self.split_file(split) for split in self.splits)
        return min(files, key=lambda file: (file.stat().st_size, file.name))

    def _annotations(self, split: str) -> CocoAnnotations:
        path = self.split_file(split)
        if split not in self._folders:
            known = ", ".join(self.splits)
            raise SourceError(path, "missing", f"no split {split!r} (JSON and photos)", f"this data set has: {known}")
        annotations = read_annotations(path)
        if annotations.class_names != self.class_names:
            raise bad_annotation(
                path,
                f"its categories differ from those of {self._smallest().name}",
                "keep the splits of one data set here",
            )
        return annotations

    def _annotations_of(self, image_id: str) -> tuple[CocoAnnotations, str]:
        split, _, key = image_id.partition("/")
        if split not in self._folders:
            raise DataError(f"{self.root}: no image {image_id!r}; ids are SPLIT/NAME with SPLIT one of {self.splits}")
        return self._annotations(split), key

    def _photo_file(self, annotations: CocoAnnotations, photo: CocoPhoto) -> Path:
        return self._folders[annotations.file.stem.removeprefix("instances_")] / photo.name


@dataclass(frozen=True)
class CocoJsonSource(CocoReader):
    """One JSON of one's own in COCO's format, with its photos.

    Photos are looked for by ``file_name`` in `images`, or without it beside the JSON, in ``images/`` beside it
    and, for a JSON in a folder ``annotations`` (CVAT), in ``images/`` beside that folder. Image ids are the
    file names without suffix when these are unique, else with it. Splits are ``all`` and the lists in
    ``splits/`` beside the JSON. Class ids are the category ids; for a category 0 see
    `episodes.sources.coco_annotations.read_annotations`.

    Args:
        annotations: the JSON, or a folder that holds ``annotations.json``, ``_annotations.coco.json`` or one
            JSON alone, directly or in ``annotations/``.
        images: folder of the photos.

    Raises:
        DataError: no JSON or several, or no folder of photos.
    """

    annotations: Path
    images: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "annotations", _find_json(real_path(self.annotations)))
        if self.images is not None:
            images = real_path(self.images)
            if not images.is_dir():
                raise DataError(f"{images}: expected the folder of the photos, but there is none; name that folder")
            object.__setattr__(self, "images", images)

    @property
    def name(self) -> str:
        """``coco-json``."""
        return "coco-json"

    @property
    def class_names(self) -> Mapping[int, str]:
        """The categories by class id."""
        return read_annotations(self.annotations).class_names

    @property
    def default_splits(self) -> tuple[str, str]:
        """``train`` and ``val`` (or ``test``) when both are listed, else ``all`` for both."""
        return default_splits(self.annotations.parent)

    @property
    def folds(self) -> None:
        """None: a data set of one's own has no folds in the literature."""
        return None

    def split_file(self, split: str) -> Path:
        """The list of a split; for ``all`` the JSON."""
        path = split_file(self.annotations.parent, split)
        return self.annotations if path == self.annotations.parent else path

    def ids(self, split: str) -> tuple[str, ...]:
        """All image ids in the order of the JSON, or those of a list."""
        return read_split(self.annotations.parent, split, tuple(read_annotations(self.annotations).photos))

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        """Weak annotations in the JSON: uint8 (H, W), or None when there is none of this kind.

        ``box``: 0 outside the class's ``bbox`` fields, 255 inside. ``label``: 255 everywhere when an object of
        the class is annotated in any way.

        Raises:
            SourceError: a box that cannot be drawn, or a photo of another size.
            DataError: no such image or class.
        """
        self._check_class(class_id)
        annotations, photo = self._find(image_id)
        if not any(thing.class_id == class_id and not thing.crowd for thing in photo.objects):
            return None
        self._check_size(annotations, photo)
        if kind == "box":
            return class_boxes(annotations.file, photo, class_id)
        return np.full(photo.size, IGNORE, dtype=np.uint8) if kind == "label" else None

    def _annotations_of(self, image_id: str) -> tuple[CocoAnnotations, str]:
        return read_annotations(self.annotations), image_id

    def _photo_file(self, annotations: CocoAnnotations, photo: CocoPhoto) -> Path:
        if self.images is not None:
            return self.images / photo.name
        beside = annotations.file.parent
        above = [beside.parent / "images"] if beside.name == "annotations" else []
        places = [folder / photo.name for folder in (beside, beside / "images", *above)]
        return next((place for place in places if is_file(place)), places[0])


def _find_json(path: Path) -> Path:
    if is_file(path):
        return path
    if not path.is_dir():
        raise DataError(
            f"{path}: expected a JSON file in COCO's format or its folder, but there is none; check the path"
        )
    for folder in (path, path / "annotations"):
        found = sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))
        named = [file for file in found if file.name in _OWN_NAMES]
        if len(named or found) == 1:
            return (named or found)[0]
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise DataError(f"{folder}: expected one JSON file in COCO's format, found {names}; name the file itself")
    raise DataError(f"{path}: expected a JSON file in COCO's format, but the folder holds none; name the file")
