"""PASCAL VOC 2012 and data sets in its layout: JPEGImages, ImageSets/Segmentation, SegmentationClass[Aug]."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from episodes.sources.decoding import missing_file, opened
from episodes.sources.errors import SourceError
from episodes.types import IGNORE, DataError, FoldedDataset, UInt8Array

_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle"),
    *("bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_CLASS_NAMES: Mapping[int, str] = MappingProxyType(dict(enumerate(_NAMES, start=1)))

_MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")
_COLOUR_MODES = ("RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")


def _find_root(root: Path) -> Path:
    for candidate in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (candidate / "JPEGImages").is_dir() and (candidate / "ImageSets" / "Segmentation").is_dir():
            return candidate
    came = "exists but has no such folders" if root.is_dir() else "does not exist"
    raise DataError(
        f"{root}: expected a VOC2012 folder with JPEGImages/ and ImageSets/Segmentation/ (there, in VOC2012/ "
        f"or in VOCdevkit/VOC2012/), but it {came}; name the folder that holds JPEGImages"
    )


def _find_masks(root: Path, masks: str | None) -> str:
    wanted = _MASK_FOLDERS if masks is None else (masks,)
    for name in wanted:
        if (root / name).is_dir():
            return name
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    raise DataError(
        f"{root}: expected a mask folder {' or '.join(wanted)}, found {', '.join(found)}; "
        "unpack the masks there or name another mask folder"
    )


def _one_class(labels: UInt8Array, class_id: int) -> UInt8Array:
    result: UInt8Array = (labels == class_id).astype(np.uint8)
    result[labels == IGNORE] = IGNORE
    return result


@dataclass(frozen=True)
class VocSource:
    """Images and masks of a VOC2012 folder.

    Masks are PNG files whose pixel values are class ids, with a palette (as VOC ships them) or grey;
    0 is background, 1..20 are the classes, 255 is ignored.

    Args:
        root: a VOC2012 folder, or a folder that holds ``VOC2012`` or ``VOCdevkit/VOC2012``.
        masks: ``SegmentationClassAug`` or ``SegmentationClass``; by default the first that exists.

    Raises:
        DataError: no such layout, or no such mask folder.
    """

    root: Path
    masks: str | None = None

    def __post_init__(self) -> None:
        root = _find_root(Path(self.root).expanduser()).resolve()
        object.__setattr__(self, "masks", _find_masks(root, self.masks))
        object.__setattr__(self, "root", root)

    @property
    def name(self) -> str:
        """``voc``."""
        return "voc"

    @property
    def class_names(self) -> Mapping[int, str]:
        """The twenty classes of VOC by label value."""
        return VOC_CLASS_NAMES

    @property
    def default_splits(self) -> tuple[str, str]:
        """``trainaug`` (VOC train and SBD, without val) and ``val``."""
        return "trainaug", "val"

    @property
    def folds(self) -> FoldedDataset:
        """PASCAL-5i."""
        return "pascal"

    def split_file(self, split: str) -> Path:
        """The list of a split's image ids."""
        return self.root / "ImageSets" / "Segmentation" / f"{split}.txt"

    def image_file(self, image_id: str) -> Path:
        """The photo of an id."""
        return self.root / "JPEGImages" / f"{image_id}.jpg"

    def mask_file(self, image_id: str) -> Path:
        """The mask of an id."""
        return self.root / str(self.masks) / f"{image_id}.png"

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids of ``ImageSets/Segmentation/{split}.txt`` in the order of the file."""
        path = self.split_file(split)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
            raise SourceError(path, "missing", f"no split {split!r}", f"this data set has: {known}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(path, "undecodable", f"not a readable text file ({error})", "replace it") from None
        return tuple(line.split()[0] for line in lines if line.strip())

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3). Raises SourceError when missing or damaged."""
        path = self.image_file(image_id)
        with opened(path, "photo") as picture:
            return np.asarray(picture.convert("RGB"))

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 where the class is, 255 where ignored, 0 elsewhere.

        Raises:
            SourceError: missing, damaged or colour-coded mask, or its size differs from the photo's.
            DataError: no such class.
        """
        if class_id not in VOC_CLASS_NAMES:
            raise DataError(f"class id {class_id} is not one of VOC's 1..20; choose one of those")
        labels = self._labels(image_id)
        path = self.image_file(image_id)
        with opened(path, "photo") as picture:
            width, height = picture.size
        if labels.shape != (height, width):
            raise SourceError(
                self.mask_file(image_id),
                "size-mismatch",
                f"mask is {labels.shape[1]}x{labels.shape[0]}, photo {path.name} is {width}x{height} pixels",
                "resize one to the other (nearest neighbour for the mask) or drop the id from the split",
            )
        return _one_class(labels, class_id)

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels, ascending. Raises SourceError for a value that is no label."""
        return self._areas(image_id, self._labels(image_id))

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask, ascending, from one reading. Raises SourceError for a value that is no label."""
        labels = self._labels(image_id)
        return {class_id: _one_class(labels, class_id) for class_id in self._areas(image_id, labels)}

    def _areas(self, image_id: str, labels: UInt8Array) -> dict[int, int]:
        counts = np.bincount(labels.ravel(), minlength=256)
        present = [int(label) for label in np.flatnonzero(counts) if label not in (0, IGNORE)]
        unknown = [label for label in present if label not in VOC_CLASS_NAMES]
        if unknown:
            raise SourceError(
                self.mask_file(image_id),
                "unknown-label",
                f"expected labels 0..20 and 255, found {', '.join(map(str, unknown[:5]))}",
                "map the values to VOC's class ids, 255 for ignore",
            )
        return {label: int(counts[label]) for label in present}

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of (relative path, size, mtime) of the photos and masks of these ids."""
        digest = hashlib.sha256()
        prefix = str(self.root)
        for image_id in image_ids:
            for path in (f"{prefix}/JPEGImages/{image_id}.jpg", f"{prefix}/{self.masks}/{image_id}.png"):
                try:
                    entry = os.stat(path)  # noqa: PTH116  thousands of files: a Path each would double the time
                except OSError:
                    raise missing_file(Path(path)) from None
                digest.update(f"{path[len(prefix) :]}\0{entry.st_size}\0{entry.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _labels(self, image_id: str) -> UInt8Array:
        path = self.mask_file(image_id)
        with opened(path, "mask") as picture:
            if picture.mode in _COLOUR_MODES:
                raise SourceError(
                    path,
                    "rgb-mask",
                    f"mask is colour-coded ({picture.mode}), expected a palette or grey PNG of class ids",
                    "convert it: map each colour of VOC's colour map to its class id and save as mode P or L",
                )
            if picture.mode not in ("P", "L"):
                raise SourceError(
                    path,
                    "undecodable",
                    f"mask has mode {picture.mode}, expected P or L with 8 bits",
                    "save it as mode L",
                )
            return np.asarray(picture)
