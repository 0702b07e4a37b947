"""A folder of one's own: photos in images/, masks in masks/, and perhaps supports drawn as marks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import ImageOps

from episodes.files import real_path, user_path
from episodes.sources import split_lists
from episodes.sources.decoding import opened, rgb
from episodes.sources.errors import SourceError
from episodes.sources.fingerprints import fingerprint_files
from episodes.sources.folder_layout import (
    BACKGROUND_MARK,
    Drawings,
    check_classes,
    class_names_of,
    find_drawings,
    find_root,
    pictures,
    read_image_labels,
)
from episodes.sources.label_maps import check_size, label_areas, one_class, photo_size, read_label_map
from episodes.sources.marks import box_annotation, stroke_annotation
from episodes.sources.object_masks import object_mask
from episodes.types import IGNORE, SUPPORT_KINDS, DataError, SupportKind, UInt8Array

_MARK_FOLDERS: Mapping[SupportKind, str] = {"box": "boxes", "scribble": "scribbles", "point": "points"}


@dataclass(frozen=True)
class FolderSource:
    """Photos and masks of a practitioner's own folder.

    ``images/ID.jpg`` (or .jpeg .png .bmp .tif .tiff .webp) are the photos, seen as people see them: the orientation
    of their EXIF data is applied. ``masks/`` has one of three forms, found out by itself:

    - ``masks/ID.png`` and ``classes.txt``: palette or grey PNG of class ids, 0 background, 255 ignored. The names
      file has one name per line, counted from 1, or ``7 cat``. With a single class, black and white masks pass too.
    - ``masks/CLASS/ID.png``: one mask per class, read as `object_mask` does: nonzero is the object in masks of
      labels (0, 1) and in black and white ones (0, 255), 128 and more in those with soft edges. Classes
      are numbered from 1 in alphabetical order, or by ``classes.txt``.
    - ``masks/ID.png`` without ``classes.txt``: as before, of the single class ``object``.

    A photo without a mask is never drawn for an episode; a mask without a photo is a problem that `problems` names.
    Splits are ``all`` and the lists ``splits/NAME.txt``.

    Supports may be marked by hand, see `annotation`: in ``boxes/``, ``scribbles/`` and ``points/``, in the same
    forms as masks, and in ``labels.txt``.

    Args:
        root: the folder around ``images/`` and ``masks/``.

    Raises:
        DataError: no such folders, or class names that contradict each other.
    """

    root: Path
    class_names: Mapping[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        root = real_path(find_root(user_path(self.root)))
        object.__setattr__(self, "root", root)
        object.__setattr__(self, "class_names", class_names_of(self._masks, self._names_file))
        for marks in self._marks.values():
            check_classes(marks, self.class_names)

    @property
    def name(self) -> str:
        """``folder``."""
        return "folder"

    @property
    def default_splits(self) -> tuple[str, str]:
        """``train`` and ``val`` or ``test`` where they are listed, else ``all`` twice."""
        return split_lists.default_splits(self.root)

    @property
    def folds(self) -> None:
        """None."""
        return None

    def split_file(self, split: str) -> Path:
        """The list of a split's ids; the folder itself for ``all``."""
        return split_lists.split_file(self.root, split)

    def ids(self, split: str) -> tuple[str, ...]:
        """Names of the photos without suffix, in alphabetical order or that of ``splits/{split}.txt``."""
        return split_lists.read_split(self.root, split, tuple(self._photos))

    def image_file(self, image_id: str) -> Path:
        """The photo of an id; for an id without a photo the place where it should be."""
        return self._photos.get(image_id, self.root / "images" / image_id)

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3), upright. Raises SourceError when missing or damaged."""
        with opened(self._photo(image_id), "photo") as picture:
            return rgb(ImageOps.exif_transpose(picture))

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 where the class is, 255 where ignored, 0 elsewhere and in photos without a mask.

        Raises:
            SourceError: missing, damaged or coloured mask, or its size differs from the upright photo's.
            DataError: no such class.
        """
        return self._of_photo(self._masks, image_id, class_id)

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels, ascending; marks drawn for weak supports do not count."""
        return {class_id: int((mask == 1).sum()) for class_id, mask in self.class_masks(image_id).items()}

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask, ascending. Raises SourceError for a value that is no class, or a mask without photo."""
        self._photo(image_id)
        if self._masks.form == "index":
            path = self._masks.of(image_id, "")
            if path is None:
                return {}
            labels = self._labels(path)
            return {class_id: one_class(labels, class_id) for class_id in self._areas(labels, path)}
        files = {class_id: self._masks.of(image_id, name) for class_id, name in self.class_names.items()}
        masks = {class_id: _read_object(path) for class_id, path in files.items() if path is not None}
        return {class_id: mask for class_id, mask in masks.items() if (mask == 1).any()}

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        """What somebody drew for an image and a class: uint8 (H, W), 1 = object, 0 = background, 255 = not known.

        - ``mask``: the mask.
        - ``box``: the bounding box of every connected region drawn in ``boxes/`` (filled or an outline): 255
          inside, 0 outside. Boxes that touch count as one.
        - ``scribble`` and ``point``: 1 where drawn in ``scribbles/`` or ``points/``, 255 elsewhere. Index pictures
          (those with ``classes.txt``) mark background with 254; it becomes 0.
        - ``label``: 255 everywhere, for the classes that ``labels.txt`` gives the photo (``ID class class ...``).

        Returns:
            None when nothing of this kind is drawn for the class.

        Raises:
            SourceError: a damaged or coloured picture, another size than the upright photo's, a bad line.
            DataError: no such class or kind.
        """
        self._check_class(class_id)
        if kind not in SUPPORT_KINDS:
            raise DataError(f"support kind {kind!r} is not one of {', '.join(SUPPORT_KINDS)}")
        photo = self._photo(image_id)
        if kind == "label":
            width, height = photo_size(photo, upright=True)
            labelled = class_id in self._image_labels.get(image_id, ())
            return np.full((height, width), IGNORE, dtype=np.uint8) if labelled else None
        if kind == "mask":
            mask = self.mask(image_id, class_id)
            return mask if (mask == 1).any() else None
        return self._drawn(self._marks[kind], kind, image_id, class_id)

    def problems(self, split: str) -> Iterator[SourceError]:
        """What reading photos and masks does not show: drawings without a photo, and marks that cannot be read."""
        for drawings in (self._masks, *self._marks.values()):
            for files in drawings.files.values():
                yield from (_without_photo(path) for image_id, path in files.items() if image_id not in self._photos)
        for image_id in self.ids(split):
            for kind in (*self._marks, "label"):
                for class_id in self.class_names:
                    try:
                        self.annotation(image_id, class_id, kind)
                    except SourceError as error:
                        yield error

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the relative paths and contents of the photos, masks and marks of these ids, and the lists."""
        files = [file for file in (self._names_file, self._labels_file) if file.exists()]
        for image_id in image_ids:
            files.append(self._photo(image_id))
            for drawings in (self._masks, *self._marks.values()):
                files += drawings.all_of(image_id)
        prefix = len(str(self.root))
        return fingerprint_files((str(file)[prefix:], (str(file),)) for file in files)

    @property
    def _names_file(self) -> Path:
        return self.root / "classes.txt"

    @property
    def _labels_file(self) -> Path:
        return self.root / "labels.txt"

    @cached_property
    def _photos(self) -> Mapping[str, Path]:
        return pictures(self.root / "images")

    @cached_property
    def _masks(self) -> Drawings:
        return find_drawings(self.root / "masks", self._names_file.exists())

    @cached_property
    def _marks(self) -> Mapping[SupportKind, Drawings]:
        has_names = self._names_file.exists()
        return {kind: find_drawings(self.root / name, has_names) for kind, name in _MARK_FOLDERS.items()}

    @cached_property
    def _image_labels(self) -> Mapping[str, set[int]]:
        path = self._labels_file
        return read_image_labels(path, self.class_names, self._photos) if path.exists() else {}

    def _photo(self, image_id: str) -> Path:
        if image_id in self._photos:
            return self._photos[image_id]
        masks = self._masks.all_of(image_id)
        if masks:
            raise _without_photo(masks[0])
        mend = "put the photo there or drop its id from the split's list"
        raise SourceError(self.root / "images" / image_id, "missing", "no photo of this name with any suffix", mend)

    def _check_class(self, class_id: int) -> None:
        if class_id not in self.class_names:
            known = ", ".join(f"{number} {name}" for number, name in self.class_names.items())
            raise DataError(f"class id {class_id} is not one of this data set's: {known}")

    def _drawn(self, marks: Drawings, kind: SupportKind, image_id: str, class_id: int) -> UInt8Array | None:
        path = marks.of(image_id, self.class_names[class_id])
        if path is None:
            return None
        drawn = self._of_photo(marks, image_id, class_id) == 1
        background = np.zeros_like(drawn)
        if marks.form == "index":
            labels = self._labels(path)
            background = labels == BACKGROUND_MARK
            self._areas(np.where(background, 0, labels).astype(np.uint8), path)
        if not drawn.any():
            return None
        return box_annotation(drawn) if kind == "box" else stroke_annotation(drawn, background)

    def _of_photo(self, drawings: Drawings, image_id: str, class_id: int) -> UInt8Array:
        """One class of a drawing, at its photo's size; zeros where there is no file."""
        self._check_class(class_id)
        photo = self._photo(image_id)
        size = photo_size(photo, upright=True)
        path = drawings.of(image_id, self.class_names[class_id])
        if path is None:
            return np.zeros(size[::-1], dtype=np.uint8)
        drawn = one_class(self._labels(path), class_id) if drawings.form == "index" else _read_object(path)
        check_size(drawn, path, photo, size)
        return drawn

    def _labels(self, path: Path) -> UInt8Array:
        """The class ids of an index picture; with a single class, white in black and white is that class."""
        if path.suffix.lower() in (".jpg", ".jpeg"):
            raise SourceError(path, "undecodable", "JPEG changes class ids", "save index pictures as PNG")
        labels = read_label_map(path)
        if len(self.class_names) == 1 and set(np.unique(labels)) == {0, IGNORE}:
            return np.where(labels == IGNORE, min(self.class_names), 0).astype(np.uint8)
        return labels

    def _areas(self, labels: UInt8Array, path: Path) -> dict[int, int]:
        known = ", ".join(map(str, self.class_names))
        mend = "name the value in classes.txt or correct the mask"
        return label_areas(labels, self.class_names, path, f"0, 255 and the classes {known}", mend)


def _without_photo(path: Path) -> SourceError:
    mend = "give it and its photo the same name without suffix, or remove it"
    return SourceError(path, "missing", f"drawing without a photo images/{path.stem}.*", mend)


def _read_object(path: Path) -> UInt8Array:
    with opened(path, "mask") as picture:
        return object_mask(ImageOps.exif_transpose(picture), path)
