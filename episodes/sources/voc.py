"""PASCAL VOC 2012 and data sets in its layout: JPEGImages, ImageSets/Segmentation, SegmentationClass[Aug]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from episodes.files import read_text, real_path, user_path
from episodes.sources.decoding import opened
from episodes.sources.errors import SourceError
from episodes.sources.fingerprints import fingerprint_files
from episodes.sources.label_maps import check_size, label_areas, one_class, photo_size, read_label_map
from episodes.sources.sbd import find_sbd, read_sbd_labels
from episodes.types import DataError, FoldedDataset, UInt8Array

_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle"),
    *("bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_CLASS_NAMES: Mapping[int, str] = MappingProxyType(dict(enumerate(_NAMES, start=1)))

_MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")


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


_TRAINAUG, _NOVAL = "trainaug", "train_sbd_noval"
_DERIVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    # The lists of SBD that join VOC's train, without VOC's val.
    {_TRAINAUG: ("train", "val"), _NOVAL: ("train_noval",)}
)


@dataclass(frozen=True)
class VocSource:
    """Images and masks of a VOC2012 folder, with the masks of SBD where its folder is named.

    Masks are PNG files whose pixel values are class ids, with a palette (as VOC ships them) or grey;
    0 is background, 1..20 are the classes, 255 is ignored.

    The masks of SBD come ready-made, as the PNG files of ``SegmentationClassAug``, or as they were published,
    as MATLAB files. Then an image has VOC's PNG where there is one and SBD's ``cls/ID.mat`` otherwise, as in the
    ready-made folder; its photo comes from JPEGImages or else from SBD's ``img``. Two splits are put together
    where ``ImageSets/Segmentation`` has no list of their name, each id once, VOC's first:

    - ``trainaug``: VOC train, SBD train, SBD val, without VOC val: 10,582 images.
    - ``train_sbd_noval``: VOC train and SBD's ``train_noval.txt`` (5,623 images, offered beside the archive),
      without VOC val. This is the training list of PFENet and of BAM and RePRI after it, 5,953 images
      (the rule: https://github.com/dvlab-research/PFENet/issues/13).

    Args:
        root: a VOC2012 folder, or a folder that holds ``VOC2012`` or ``VOCdevkit/VOC2012``.
        masks: ``SegmentationClassAug`` or ``SegmentationClass``; by default the first that exists.
        sbd: the folder ``benchmark_RELEASE`` of SBD, the one around it or the ``dataset`` in it.

    Raises:
        DataError: no such layout, or no such mask folder.
    """

    root: Path
    masks: str | None = None
    sbd: Path | None = None

    def __post_init__(self) -> None:
        root = real_path(_find_root(user_path(self.root)))
        object.__setattr__(self, "masks", _find_masks(root, self.masks))
        object.__setattr__(self, "root", root)
        if self.sbd is not None:
            object.__setattr__(self, "sbd", real_path(find_sbd(user_path(self.sbd))))

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
        """``trainaug`` (VOC train and SBD, without val), else ``train`` where there is no SBD; and ``val``."""
        has_more = (
            self.sbd is not None or self.split_file(_TRAINAUG).is_file() or not self.split_file("train").is_file()
        )
        return (_TRAINAUG if has_more else "train"), "val"

    @property
    def folds(self) -> FoldedDataset:
        """PASCAL-5i."""
        return "pascal"

    def split_file(self, split: str) -> Path:
        """The list of a split's image ids; of a split put together, the first list of SBD in it."""
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if split in _DERIVED and self.sbd is not None and not path.exists():
            return self.sbd / f"{_DERIVED[split][0]}.txt"
        return path

    def image_file(self, image_id: str) -> Path:
        """The photo of an id."""
        return _first(self._image_places(image_id))

    def mask_file(self, image_id: str) -> Path:
        """The mask of an id, PNG or SBD's ``.mat``."""
        return _first(self._mask_places(image_id))

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids of ``ImageSets/Segmentation/{split}.txt`` in the order of the file, or of a split put together."""
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if split not in _DERIVED or self.sbd is None or path.exists():
            return self._listed(path, split)
        parts = [self.ids("train")]
        parts += [_read_list(self.sbd / f"{name}.txt", _mend_list(name)) for name in _DERIVED[split]]
        left_out = set(self.ids("val"))
        return tuple(dict.fromkeys(image_id for part in parts for image_id in part if image_id not in left_out))

    def _listed(self, path: Path, split: str) -> tuple[str, ...]:
        known = {file.stem for file in path.parent.glob("*.txt")} | (set() if self.sbd is None else set(_DERIVED))
        if split not in known:
            more = "; this one is put together when the folder of SBD is named too" if split in _DERIVED else ""
            mend = f"this data set has: {', '.join(sorted(known)) or 'none'}{more}"
            raise SourceError(path, "missing", f"no split {split!r}", mend)
        return _read_list(path, "replace it")

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3). Raises SourceError when missing or damaged."""
        with opened(self.image_file(image_id), "photo") as picture:
            return np.asarray(picture.convert("RGB"))

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 where the class is, 255 where ignored, 0 elsewhere.

        Raises:
            SourceError: missing, damaged or colour-coded mask, or its size differs from the photo's.
            DataError: no such class.
        """
        if class_id not in VOC_CLASS_NAMES:
            raise DataError(f"class id {class_id} is not one of VOC's 1..20; choose one of those")
        path, photo = self.mask_file(image_id), self.image_file(image_id)
        labels = _read_labels(path)
        check_size(labels, path, photo, photo_size(photo))
        return one_class(labels, class_id)

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels, ascending. Raises SourceError for a value that is no label."""
        path = self.mask_file(image_id)
        return _areas(_read_labels(path), path)

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask, ascending, from one reading. Raises SourceError for a value that is no label."""
        path = self.mask_file(image_id)
        labels = _read_labels(path)
        return {class_id: one_class(labels, class_id) for class_id in _areas(labels, path)}

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the relative paths and contents of the photos and masks of these ids."""
        return fingerprint_files(
            file
            for image_id in image_ids
            for file in (
                (f"/JPEGImages/{image_id}.jpg", self._image_places(image_id)),
                (f"/{self.masks}/{image_id}.png", self._mask_places(image_id)),
            )
        )

    def _image_places(self, image_id: str) -> tuple[str, ...]:
        own = f"{self.root}/JPEGImages/{image_id}.jpg"
        return (own,) if self.sbd is None else (own, f"{self.sbd}/img/{image_id}.jpg")

    def _mask_places(self, image_id: str) -> tuple[str, ...]:
        own = f"{self.root}/{self.masks}/{image_id}.png"
        return (own,) if self.sbd is None else (own, f"{self.sbd}/cls/{image_id}.mat")


def _first(places: Sequence[str]) -> Path:
    """The first of these files that exists, else the first."""
    paths = [Path(place) for place in places]
    return next((path for path in paths if len(paths) == 1 or path.exists()), paths[0])


def _read_list(path: Path, mend: str) -> tuple[str, ...]:
    try:
        lines = read_text(path).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(path, "missing", "no such list", mend) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(path, "undecodable", f"not a readable text file ({error})", "replace it") from None
    return tuple(line.split()[0] for line in lines if line.strip())


def _mend_list(name: str) -> str:
    if name == "train_noval":
        return "fetch it from http://home.bharathh.info/pubs/codes/SBD/train_noval.txt (5,623 ids) and put it there"
    return "unpack it from SBD's archive"


def _read_labels(path: Path) -> UInt8Array:
    return read_sbd_labels(path) if path.suffix == ".mat" else read_label_map(path)


def _areas(labels: UInt8Array, path: Path) -> dict[int, int]:
    mend = "map the values to VOC's class ids, 255 for ignore"
    return label_areas(labels, VOC_CLASS_NAMES, path, "labels 0..20 and 255", mend)
