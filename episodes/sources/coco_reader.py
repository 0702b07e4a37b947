"""What COCO's own layout and a COCO JSON of one's own share: reading images and masks once the files are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from PIL import ImageOps

from episodes.sources.annotation_files import check_room
from episodes.sources.coco_annotations import CocoAnnotations, CocoPhoto
from episodes.sources.coco_outlines import class_mask
from episodes.sources.decoding import opened, rgb, upright_size
from episodes.sources.errors import SourceError
from episodes.sources.fingerprints import fingerprint_files
from episodes.types import DataError, UInt8Array


class CocoReader(ABC):
    """What both sources share: photos and masks of an image once its annotations and files are found."""

    @property
    @abstractmethod
    def class_names(self) -> Mapping[int, str]: ...

    @abstractmethod
    def _annotations_of(self, image_id: str) -> tuple[CocoAnnotations, str]:
        """The parsed file that lists an image, and the image's key in it (which it may lack)."""

    @abstractmethod
    def _photo_file(self, annotations: CocoAnnotations, photo: CocoPhoto) -> Path:
        """Where the photo is, or should be."""

    def _find(self, image_id: str) -> tuple[CocoAnnotations, CocoPhoto]:
        annotations, key = self._annotations_of(image_id)
        photo = annotations.photos.get(key)
        if photo is None:
            raise DataError(
                f"{annotations.file}: no image {image_id!r}; its images are named like {_example(annotations)}"
            )
        return annotations, photo

    def image_file(self, image_id: str) -> Path:
        """The photo of an id."""
        return self._photo_file(*self._find(image_id))

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3), turned upright (EXIF) when the JSON gives the upright size.

        Raises:
            SourceError: missing or damaged photo.
        """
        annotations, photo = self._find(image_id)
        with opened(self._photo_file(annotations, photo), "photo") as picture:
            return rgb(ImageOps.exif_transpose(picture) if upright_size(picture) == photo.size else picture)

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 on the union of the class's objects, 255 on its crowds where no object is, 0 elsewhere.

        Crowds of other classes are 0. Boxes without outline are as crowds: the object is somewhere inside.

        Raises:
            SourceError: missing or damaged photo, one of another size than the JSON says, or an outline that
                cannot be drawn.
            DataError: no such image or class.
        """
        self._check_class(class_id)
        annotations, photo = self._find(image_id)
        self._check_size(annotations, photo)
        return class_mask(annotations.file, photo, class_id)

    def _check_class(self, class_id: int) -> None:
        if class_id not in self.class_names:
            raise DataError(
                f"class id {class_id} is none of this data set's {len(self.class_names)} classes, "
                f"{min(self.class_names)}..{max(self.class_names)}; choose one of those"
            )

    def _check_size(self, annotations: CocoAnnotations, photo: CocoPhoto) -> None:
        path = self._photo_file(annotations, photo)
        with opened(path, "photo") as picture:
            width, height = picture.size
            sizes = {(height, width), upright_size(picture)}
        if photo.size not in sizes:
            raise SourceError(
                path,
                "size-mismatch",
                f"photo is {width}x{height}, {annotations.file.name} says {photo.size[1]}x{photo.size[0]} pixels",
                "fetch the photo that was annotated, or drop it from the JSON",
            )

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels of its objects, ascending; a class of crowds or boxes alone is left out."""
        return {class_id: int((mask == 1).sum()) for class_id, mask in self.class_masks(image_id).items()}

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask for the classes with an outlined object, ascending, at the size that the JSON gives."""
        annotations, photo = self._find(image_id)
        present = sorted({thing.class_id for thing in photo.objects})
        check_room(len(present), photo.size, annotations.file)
        masks = ((class_id, class_mask(annotations.file, photo, class_id)) for class_id in present)
        return {class_id: mask for class_id, mask in masks if (mask == 1).any()}

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the names and contents of the photos of these ids and of the JSON files that list them."""
        found = {image_id: self._find(image_id) for image_id in image_ids}
        lists = {annotations.file for annotations, _ in found.values()}
        files = [(path.name, [str(path)]) for path in sorted(lists)]
        photos = ((image_id, [str(self._photo_file(*pair))]) for image_id, pair in found.items())
        return fingerprint_files(chain(files, photos))


def _example(annotations: CocoAnnotations) -> str:
    return repr(next(iter(annotations.photos), "(it lists none)"))
