"""Objects cut out of photos and pasted onto other photos: more diverse training tasks with exact masks.

As Ghiasi et al. 2021, "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", but drawn
once from a seed, so that features of the composed photos can be stored like those of any others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from episodes.types import DataError, FoldedDataset, MaskSource, UInt8Array

_VERSION = 1  # of the drawing: raise it when pictures change, so that caches notice
_SPLIT = "train"
_SHARES = (0.04, 0.3)
"""Of the photo that a pasted object covers."""
_MOST_ENLARGED = 2.0
_MOST_OF_SIDE = 0.9
_BLUR = 0.7  # pixels; softens the edge, which is cut at one half

Slices = tuple[slice, slice]


@dataclass(frozen=True, slots=True)
class Paste:
    """An object and how it is put onto a photo.

    Attributes:
        image_id, class_id: whose largest connected part is cut out.
        share: of the photo's area that it should cover.
        flip: whether it is mirrored.
        across, down: where, as fractions of the room that is left.
    """

    image_id: str
    class_id: int
    share: float
    flip: bool
    across: float
    down: float


@dataclass(frozen=True)
class CompositeSource:
    """A `MaskSource` whose photos are photos of another one with one or two objects pasted onto them.

    The classes are those of the other source. Masks are exact: what a photo shows itself stays labelled where nothing
    is pasted over it. Composition ``n`` is a pure function of the seed and n (`composition`).

    Args:
        source: photos and masks.
        cutouts: (image id, class id) of the objects, for example `ClassIndex.pairs` of base classes.
        backgrounds: image ids that objects are pasted onto.
        count: number of composed photos.
        seed: everything follows from it.

    Raises:
        DataError: no cut-out, no background, a count below 1 or a negative seed.
    """

    source: MaskSource
    cutouts: tuple[tuple[str, int], ...] = field(repr=False)
    backgrounds: tuple[str, ...] = field(repr=False)
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("cutouts", "backgrounds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise DataError(f"composed photos need at least one of {name}; got none")
        if self.count < 1 or self.seed < 0:
            raise DataError(f"composed photos need a count from 1 and a seed from 0, got {self.count} and {self.seed}")

    @property
    def name(self) -> str:
        """For example ``voc-composites``."""
        return f"{self.source.name}-composites"

    @property
    def class_names(self) -> Mapping[int, str]:
        """Those of the source."""
        return self.source.class_names

    @property
    def default_splits(self) -> tuple[str, str]:
        """``train`` alone: nothing is scored on composed photos."""
        return _SPLIT, _SPLIT

    @property
    def folds(self) -> FoldedDataset | None:
        """Those of the source."""
        return self.source.folds

    def ids(self, split: str) -> tuple[str, ...]:
        """``000000``, ``000001``, ... Raises DataError for another split than ``train``."""
        if split != _SPLIT:
            raise DataError(f"composed photos: no split {split!r}; there is {_SPLIT} alone")
        return tuple(f"{number:06d}" for number in range(self.count))

    def composition(self, image_id: str) -> tuple[str, tuple[Paste, ...]]:
        """(background, what is pasted onto it, in order). Raises DataError for an unknown id."""
        if re.fullmatch(r"\d{6,}", image_id) is None or int(image_id) >= self.count:
            raise DataError(f"composed photos: no image {image_id!r}; ids are 000000 to {self.count - 1:06d}")
        random = np.random.default_rng([self.seed, 4, int(image_id)])
        background = self.backgrounds[int(random.integers(len(self.backgrounds)))]
        pasted = []
        for _ in range(int(random.integers(1, 3))):
            cut_from, class_id = self.cutouts[int(random.integers(len(self.cutouts)))]
            share, flip = float(random.uniform(*_SHARES)), bool(random.uniform() < 0.5)
            across, down = (float(value) for value in random.uniform(size=2))
            pasted.append(Paste(cut_from, class_id, share, flip, across, down))
        return background, tuple(pasted)

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3)."""
        background, pasted = self.composition(image_id)
        picture = self.source.image(background).astype(np.float32)
        for paste in pasted:
            window, alpha, cut = self._placed(paste, picture.shape[:2], with_photo=True)
            picture[window] += alpha[..., None] * (cut - picture[window])
        return np.asarray(np.round(picture), dtype=np.uint8)

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 where the class is seen, 255 where ignored, 0 elsewhere."""
        background, pasted = self.composition(image_id)
        mask = self.source.mask(background, class_id)
        return _covered(mask, class_id, self._regions(pasted, mask.shape))

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels seen, ascending."""
        return {class_id: int((mask == 1).sum()) for class_id, mask in self.class_masks(image_id).items()}

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask, for the classes seen, ascending."""
        background, pasted = self.composition(image_id)
        masks = dict(self.source.class_masks(background))
        for paste in pasted:
            if paste.class_id not in masks:
                masks[paste.class_id] = self.source.mask(background, paste.class_id)
        regions = self._regions(pasted, next(iter(masks.values())).shape)
        seen = {class_id: _covered(masks[class_id], class_id, regions) for class_id in sorted(masks)}
        return {class_id: mask for class_id, mask in seen.items() if (mask == 1).any()}

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the compositions and of the photos and masks that they are made of."""
        made = [self.composition(image_id) for image_id in image_ids]
        photos = dict.fromkeys(
            photo for background, pasted in made for photo in (background, *(p.image_id for p in pasted))
        )
        parts = [str(_VERSION), self.source.fingerprint(list(photos)), *map(repr, made), *image_ids]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _regions(
        self, pasted: Sequence[Paste], shape: tuple[int, ...]
    ) -> list[tuple[int, Slices, npt.NDArray[np.bool_]]]:
        """(class id, window, bool (h, w) in it) of every pasted object on a photo of this shape."""
        placed = ((paste.class_id, *self._placed(paste, shape, with_photo=False)[:2]) for paste in pasted)
        return [(class_id, window, alpha >= 0.5) for class_id, window, alpha in placed]

    def _placed(
        self, paste: Paste, shape: tuple[int, ...], *, with_photo: bool
    ) -> tuple[Slices, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Window of a photo of this shape, alpha float32 (h, w) and, if asked for, colours float32 (h, w, 3)."""
        whole = largest_part(self.source.mask(paste.image_id, paste.class_id) == 1)
        rows, columns = (np.flatnonzero(whole.any(axis=axis)) for axis in (1, 0))
        box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        part = whole[box].astype(np.float32)
        height, width = part.shape
        wanted = float(np.sqrt(paste.share * shape[0] * shape[1] / part.sum()))
        room = _MOST_OF_SIDE * min(shape[0] / height, shape[1] / width)
        scale = min(wanted, room, _MOST_ENLARGED)
        size = max(1, round(scale * width)), max(1, round(scale * height))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        small = cv2.resize(part, size, interpolation=method)
        alpha: npt.NDArray[np.float32] = np.asarray(
            cv2.GaussianBlur(small, (0, 0), _BLUR, borderType=cv2.BORDER_CONSTANT), dtype=np.float32
        )
        top, left = int(paste.down * (shape[0] - size[1])), int(paste.across * (shape[1] - size[0]))
        colours: npt.NDArray[np.float32] = np.zeros((0, 0, 3), np.float32)
        if with_photo:
            photo = np.ascontiguousarray(self.source.image(paste.image_id)[box])
            colours = np.asarray(cv2.resize(photo, size, interpolation=method), dtype=np.float32)
        if paste.flip:
            alpha, colours = np.fliplr(alpha), np.fliplr(colours)
        return (slice(top, top + size[1]), slice(left, left + size[0])), alpha, colours


def largest_part(region: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest connected part (8 neighbours) of a region, bool (H, W). Raises DataError for an empty one.

    >>> largest_part(np.array([[True, False, True, True]])).tolist()
    [[False, False, True, True]]
    """
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    if count < 2:
        raise DataError("nothing to cut out: the image does not show the class; name (image, class) pairs that do")
    return np.asarray(labels == 1 + int(np.argmax(statistics[1:, cv2.CC_STAT_AREA])))


def _covered(
    mask: UInt8Array, class_id: int, regions: Sequence[tuple[int, Slices, npt.NDArray[np.bool_]]]
) -> UInt8Array:
    """A class's mask after objects were put over it."""
    changed = mask.copy()
    for pasted, window, region in regions:
        changed[window][region] = int(pasted == class_id)
    return changed
