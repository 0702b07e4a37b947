"""A folder of LabelMe files: photos with polygons, rectangles, circles, masks, points and lines drawn on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ImageOps

from episodes.files import is_file, real_path
from episodes.sources.annotation_files import check_room, shown
from episodes.sources.decoding import PHOTO_SUFFIXES, missing_file, opened, rgb, upright_size
from episodes.sources.errors import SourceError
from episodes.sources.fingerprints import fingerprint_files
from episodes.sources.labelme_shapes import (
    AREA_TYPES,
    BACKGROUND_LABEL,
    IGNORE_LABEL,
    LINE_TYPES,
    LabelledPhoto,
    Shape,
    draw_areas,
    draw_boxes,
    draw_marks,
    embedded_photo,
    read_labelme,
)
from episodes.sources.marks import line_width, point_radius
from episodes.sources.split_lists import default_splits, list_lines, read_split, split_file
from episodes.types import IGNORE, DataError, SupportKind, UInt8Array

_CLASSES_FILE = "classes.txt"


@dataclass(frozen=True)
class LabelmeSource:
    """Photos annotated with LabelMe: a JSON file each, all in one folder.

    Image ids are the names of the JSON files without suffix. The photo is ``imagePath`` when that lies in the
    folder, else the photo of the JSON's own name, else the one embedded as ``imageData``; it is turned upright
    (EXIF), as LabelMe shows it. Splits are ``all`` and the lists in ``splits/``.

    Class ids are 1..N in the order of ``classes.txt`` (one name per line, as LabelMe's ``labels.txt``; its
    ``__ignore__`` and ``_background_`` are skipped), else in alphabetical order of the labels of all files.
    Flags name no class of their own. Polygons, rectangles, circles and masks make the mask; points and lines
    are weak annotations. Shapes of different classes may overlap, the later does not cut the earlier.
    ``__ignore__`` is 255 for all classes, also on top of their shapes.

    Args:
        root: the folder.

    Raises:
        DataError: no such folder, or no JSON in it.
    """

    root: Path

    def __post_init__(self) -> None:
        root = real_path(self.root)
        if not root.is_dir() or not _json_files(root):
            came = "it holds no *.json" if root.is_dir() else "there is none"
            raise DataError(
                f"{root}: expected a folder of LabelMe's JSON files, but {came}; name the folder that has them"
            )
        object.__setattr__(self, "root", root)

    @property
    def name(self) -> str:
        """``labelme``."""
        return "labelme"

    @cached_property
    def class_names(self) -> Mapping[int, str]:
        """Class id -> label. Without ``classes.txt`` the first use reads all JSON files.

        Raises:
            SourceError: a JSON file that cannot be read, or a ``classes.txt`` that names a class twice or none.
        """
        path = self.root / _CLASSES_FILE
        if path.is_file():
            names = [name for _, name in list_lines(path) if name not in (IGNORE_LABEL, BACKGROUND_LABEL)]
            double = next((name for place, name in enumerate(names) if name in names[:place]), None)
            if double is not None or not names:
                came = "names none" if double is None else f"names {double!r} twice"
                raise SourceError(
                    path, "unknown-label", f"expected a class per line, but it {came}", "correct the list"
                )
        else:
            names = sorted(set[str]().union(*(read_labelme(file).labels() for file in self._files())))
            if not names:
                raise DataError(
                    f"{self.root}: no shape in any JSON file has a label of a class; draw some with LabelMe"
                )
        return dict(enumerate(names, start=1))

    @property
    def default_splits(self) -> tuple[str, str]:
        """``train`` and ``val`` (or ``test``) when both are listed, else ``all`` for both."""
        return default_splits(self.root)

    @property
    def folds(self) -> None:
        """None: a data set of one's own has no folds in the literature."""
        return None

    def split_file(self, split: str) -> Path:
        """The list of a split; for ``all`` the folder."""
        return split_file(self.root, split)

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids in alphabetical order, or those of a list."""
        return read_split(self.root, split, tuple(file.stem for file in self._files()))

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3), upright.

        Raises:
            SourceError: no photo, or a damaged one.
        """
        labelled = read_labelme(self._file(image_id))  # whatever its labels and the other files are
        path = self._photo_file(labelled)
        if path is None:
            return embedded_photo(labelled)
        with opened(path, "photo") as picture:
            return rgb(ImageOps.exif_transpose(picture))

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 on the class's polygons, rectangles, circles and masks, 255 on ``__ignore__``, else 0.

        Raises:
            SourceError: a photo of another size than the JSON says, a shape that cannot be drawn, or a label
                that ``classes.txt`` lacks.
            DataError: no such image or class.
        """
        label = self._label(class_id)
        labelled = self._labelled(image_id)
        return self._draw(labelled, self._checked_size(labelled), label)

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels, ascending; a class marked by points and lines alone is left out."""
        return {class_id: int((mask == 1).sum()) for class_id, mask in self.class_masks(image_id).items()}

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask for the classes with an area, ascending, at the size that the JSON gives."""
        labelled = self._labelled(image_id)
        size = labelled.size or self._photo_size(labelled)
        present = labelled.labels()
        check_room(len(present), size, labelled.file)
        masks = (
            (key, self._draw(labelled, size, label)) for key, label in self.class_names.items() if label in present
        )
        return {class_id: mask for class_id, mask in masks if (mask == 1).any()}

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        """What is drawn of one kind: uint8 (H, W), 1 = object, 0 = known background, 255 = not known; or None.

        ``point``: discs of radius max(2, 1% of the short side) pixels. ``scribble``: lines of width max(3, 1.5% of
        the short side). ``box``: 0 outside the rectangles, 255 inside. ``label``: 255 everywhere when a shape or
        a set flag names the class. ``mask`` is None here: see `mask`.

        Raises:
            SourceError: as `mask`.
            DataError: no such image or class.
        """
        label = self._label(class_id)
        labelled = self._labelled(image_id)
        drawn = [shape for shape in labelled.shapes if shape.label == label]
        types = {"point": ("point",), "scribble": LINE_TYPES, "box": ("rectangle",)}
        shapes = [shape for shape in drawn if shape.type in types.get(kind, ())]
        if not shapes and (kind != "label" or not (drawn or label in labelled.flags)):
            return None
        size = self._checked_size(labelled)
        if kind == "box":
            boxes = draw_boxes(shapes, size, labelled.file)
            boxes[_ignored(labelled, size)] = IGNORE
            return boxes
        result: UInt8Array = np.full(size, IGNORE, dtype=np.uint8)
        if kind != "label":
            extent = point_radius(size) if kind == "point" else line_width(size)
            marks = draw_marks(shapes, size, labelled.file, extent)
            result[marks & ~_ignored(labelled, size)] = 1
        return result

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the names and contents of the JSON files and photos of these ids, and of the classes' names."""
        files: list[tuple[str, list[str]]] = []
        for image_id in image_ids:
            labelled = self._labelled(image_id)
            files.append((image_id, [str(labelled.file)]))
            photo = self._photo_file(labelled)
            if photo is not None:
                files.append((photo.name, [str(photo)]))
        names = "\n".join(self.class_names.values())
        return hashlib.sha256(f"{fingerprint_files(files)}\n{names}".encode()).hexdigest()

    def _files(self) -> list[Path]:
        return _json_files(self.root)

    def _label(self, class_id: int) -> str:
        if class_id not in self.class_names:
            raise DataError(
                f"class id {class_id} is none of this data set's 1..{len(self.class_names)}; choose one of those"
            )
        return self.class_names[class_id]

    def _file(self, image_id: str) -> Path:
        path = self.root / f"{image_id}.json"
        if path.name != f"{image_id}.json" or not is_file(path):
            raise DataError(f"{self.root}: no image {image_id!r}; ids are the names of its JSON files without .json")
        return path

    def _labelled(self, image_id: str) -> LabelledPhoto:
        path = self._file(image_id)
        labelled = read_labelme(path)
        unknown = sorted(labelled.labels() - set(self.class_names.values()))
        if unknown:
            raise SourceError(
                path,
                "unknown-label",
                f"label {shown(unknown[0], 40)} is not among the {len(self.class_names)} classes",
                f"add it to {_CLASSES_FILE} or rename it",
            )
        return labelled

    def _photo_file(self, labelled: LabelledPhoto) -> Path | None:
        """The photo's file; None when the embedded photo is to be used."""
        names = [labelled.photo_name] if labelled.photo_name else []
        names += [labelled.file.stem + suffix for plain in PHOTO_SUFFIXES for suffix in (plain, plain.upper())]
        for name in names:
            if is_file(self.root / name):
                return self.root / name
        if not labelled.embeds_photo:
            if labelled.photo_name is None:
                raise SourceError(
                    labelled.file,
                    "unsafe-name",
                    "imagePath names no photo inside the folder, and none lies beside the file or is embedded in it",
                    f"put the photo beside it as {labelled.file.stem}.jpg",
                )
            raise missing_file(self.root / labelled.photo_name)
        return None

    def _photo_size(self, labelled: LabelledPhoto) -> tuple[int, int]:
        path = self._photo_file(labelled)
        if path is None:
            height, width, _ = embedded_photo(labelled).shape
            return height, width
        with opened(path, "photo") as picture:
            return upright_size(picture)

    def _checked_size(self, labelled: LabelledPhoto) -> tuple[int, int]:
        size = self._photo_size(labelled)
        if labelled.size not in (None, size):
            height, width = labelled.size or size
            raise SourceError(
                labelled.file,
                "size-mismatch",
                f"it says {width}x{height}, its photo is {size[1]}x{size[0]} pixels (upright)",
                "annotate this photo again, or put back the one that was annotated",
            )
        return size

    def _draw(self, labelled: LabelledPhoto, size: tuple[int, int], label: str) -> UInt8Array:
        mask = draw_areas(_areas(labelled, label), size, labelled.file).astype(np.uint8)
        mask[_ignored(labelled, size)] = IGNORE
        return mask


def _json_files(root: Path) -> list[Path]:
    return sorted(file for file in root.glob("*.json") if not file.name.startswith("."))  # macOS leaves ._x.json


def _areas(labelled: LabelledPhoto, label: str) -> list[Shape]:
    return [shape for shape in labelled.shapes if shape.label == label and shape.type in AREA_TYPES]


def _ignored(labelled: LabelledPhoto, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    return draw_areas(_areas(labelled, IGNORE_LABEL), size, labelled.file)
