"""FSS-1000: a thousand classes of ten photos each, one object mask per photo.

Li et al., FSS-1000: A 1000-Class Dataset for Few-Shot Segmentation, CVPR 2020. A folder per class with
``1.jpg`` .. ``10.jpg`` and their masks ``1.png`` .. ``10.png``, white on black.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from episodes.files import real_path, user_path
from episodes.sources.decoding import opened
from episodes.sources.errors import SourceError
from episodes.sources.fingerprints import fingerprint_files
from episodes.sources.label_maps import check_size, photo_size
from episodes.sources.split_lists import ALL, list_lines
from episodes.types import DataError, UInt8Array

_NESTED = ("FSS-1000", "fewshot_data", "fewshot_data/fewshot_data")
_NO_CLASSES = frozenset({"splits", "__MACOSX"})
_LIST_FOLDERS = (".", "splits", "splits/fss")
_TRAINING = ("trn", "train")
_PUBLISHED = ("trn.txt", "train.txt", "val.txt", "test.txt")


@dataclass(frozen=True)
class FssSource:
    """Images and masks of a folder in FSS-1000's layout.

    Class ids are 1..N in the alphabetical order of the class folders; image ids are ``{class}/{number}``. A mask
    knows one class alone: pixels from 128 up, in grey or after conversion to grey, are the object, as in the
    reference code of HSNet. Nothing is ignored.

    The split ``all`` is every image. The other splits are lists of class names, ``{split}.txt`` in the folder of the
    data, in its ``splits/`` or ``splits/fss/``; the published ones, 520, 240 and 240 classes, are ``trn``, ``val``
    and ``test``. Images come in the order of the class ids, then of their numbers.

    Args:
        root: the folder that holds the class folders, or the one around ``fewshot_data`` or ``FSS-1000``.

    Raises:
        DataError: no class folder there.
    """

    root: Path
    class_names: Mapping[int, str] = field(init=False, repr=False, compare=False)
    _lists: tuple[Path, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = user_path(self.root)
        root = real_path(_find_root(given))
        object.__setattr__(self, "root", root)
        object.__setattr__(self, "class_names", dict(enumerate(_class_folders(root), start=1)))
        homes = dict.fromkeys((root, real_path(given)))
        object.__setattr__(self, "_lists", tuple(home / folder for home in homes for folder in _LIST_FOLDERS))

    @property
    def name(self) -> str:
        """``fss``."""
        return "fss"

    @property
    def default_splits(self) -> tuple[str, str]:
        """``trn`` and ``test`` where they are listed, else ``all`` twice."""
        splits = self._split_files
        training = next((split for split in _TRAINING if split in splits), None)
        return (training, "test") if training and "test" in splits else (ALL, ALL)

    @property
    def folds(self) -> None:
        """None: its splits divide the classes."""
        return None

    def split_file(self, split: str) -> Path:
        """The list of a split's class names; the folder of the data for ``all``."""
        if split == ALL:
            return self.root
        splits = self._split_files
        if split not in splits:
            known = ", ".join((ALL, *sorted(splits)))
            place = self.root / f"{split}.txt"
            raise SourceError(place, "missing", f"no split {split!r}", f"this data set has: {known}")
        return splits[split]

    def split_classes(self, split: str) -> tuple[int, ...]:
        """Ids of the classes of a split, ascending. Raises SourceError for a name without a folder."""
        if split == ALL:
            return tuple(self.class_names)
        path = self.split_file(split)
        found = set()
        for number, name in list_lines(path):
            if name not in self._class_ids:
                raise SourceError(
                    path,
                    "missing",
                    f"line {number} names class {name!r}, which has no folder in {self.root}",
                    "unpack the class there or drop the line",
                )
            found.add(self._class_ids[name])
        return tuple(sorted(found))

    def ids(self, split: str) -> tuple[str, ...]:
        """``{class}/{number}`` of all photos of the split's classes."""
        names = (self.class_names[class_id] for class_id in self.split_classes(split))
        return tuple(f"{name}/{stem}" for name in names for stem in _photo_stems(self.root / name))

    def image_file(self, image_id: str) -> Path:
        """The photo of an id."""
        return self.root / f"{image_id}.jpg"

    def mask_file(self, image_id: str) -> Path:
        """The mask of an id."""
        return self.root / f"{image_id}.png"

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3). Raises SourceError when missing or damaged."""
        self._class_of(image_id)
        with opened(self.image_file(image_id), "photo") as picture:
            return np.asarray(picture.convert("RGB"))

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 on the object of the image's own class, 0 elsewhere and for every other class.

        Raises:
            SourceError: missing or damaged mask, or its size differs from the photo's.
            DataError: no such class.
        """
        if class_id not in self.class_names:
            raise DataError(f"class id {class_id} is not one of this data set's 1..{len(self.class_names)}")
        mask, photo = self._object(image_id), self.image_file(image_id)
        check_size(mask, self.mask_file(image_id), photo, photo_size(photo))
        return mask if class_id == self._class_of(image_id) else np.zeros_like(mask)

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """The image's class -> pixels of its object; empty when the mask is black."""
        return {class_id: int(mask.sum()) for class_id, mask in self.class_masks(image_id).items()}

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """The image's class -> mask; empty when the mask is black."""
        mask = self._object(image_id)
        return {self._class_of(image_id): mask} if mask.any() else {}

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the relative paths and contents of the photos and masks of these ids."""
        names = (f"/{image_id}{suffix}" for image_id in image_ids for suffix in (".jpg", ".png"))
        return fingerprint_files((name, (f"{self.root}{name}",)) for name in names)

    @cached_property
    def _class_ids(self) -> Mapping[str, int]:
        return {name: class_id for class_id, name in self.class_names.items()}

    @property
    def _split_files(self) -> dict[str, Path]:
        # The nearest list of a name counts. Beside the data, other text files than the published lists are none.
        found: dict[str, Path] = {}
        for folder in self._lists:
            lists = folder.glob("*.txt") if "splits" in folder.parts[-2:] else map(folder.joinpath, _PUBLISHED)
            for file in sorted(lists):
                if file.is_file():
                    found.setdefault(file.stem, file)
        return found

    def _class_of(self, image_id: str) -> int:
        name, _, stem = image_id.partition("/")
        if name not in self._class_ids or not stem:
            mend = f"ids are CLASS/NUMBER, for example {self.class_names[1]}/1"
            raise SourceError(self.image_file(image_id), "missing", f"no image {image_id!r}", mend)
        return self._class_ids[name]

    def _object(self, image_id: str) -> UInt8Array:
        self._class_of(image_id)
        with opened(self.mask_file(image_id), "mask") as picture:
            return (np.asarray(picture.convert("L")) >= 128).astype(np.uint8)


def _find_root(root: Path) -> Path:
    for candidate in (root, *(root / folder for folder in reversed(_NESTED))):
        if candidate.is_dir() and any(_photo_stems(candidate / name) for name in _class_folders(candidate)):
            return candidate
    came = "has none" if root.is_dir() else "does not exist"
    raise DataError(
        f"{root}: expected a folder per class with 1.jpg .. 10.jpg and masks 1.png .. 10.png (there or in "
        f"{', '.join(_NESTED)}), but it {came}; name the folder that holds the class folders"
    )


def _class_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(name for name in names if name not in _NO_CLASSES)


def _photo_stems(folder: Path) -> list[str]:
    """Names of the photos without suffix: numbers by their value, then everything else."""
    stems = [name.removesuffix(".jpg") for name in os.listdir(folder) if name.endswith(".jpg")]  # noqa: PTH208  fast
    return sorted(stems, key=lambda stem: (not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem))
