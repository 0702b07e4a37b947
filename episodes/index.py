"""Which class is in which image, and how large: read once from all masks, then kept beside the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from episodes.files import read_text
from episodes.progress import tqdm
from episodes.types import DataError, MaskSource, UInt8Array
from episodes.writing import atomic_path

_FORMAT = 1
_CHUNK = 32
"""Images that a worker reads at a time; progress moves in these steps."""
_MOST_WORKERS = 8
GRID_STEP = 32
"""Distance of the grid points in pixels of a photo at VOC's full size."""
GRID_LONG_SIDE = 500
"""Longest side of VOC's photos."""


@dataclass(frozen=True)
class ClassIndex:
    """Classes of the images of one split.

    Attributes:
        image_ids: all ids of the split, in the data set's order.
        areas: image id -> class id -> pixels.
        grid_points: image id -> class id -> points of a grid that fall on the class; see `count_grid_points`.
        fingerprint: the source's fingerprint of these ids when the masks were read.
    """

    image_ids: tuple[str, ...]
    areas: Mapping[str, Mapping[int, int]]
    grid_points: Mapping[str, Mapping[int, int]]
    fingerprint: str

    def __post_init__(self) -> None:
        members: dict[int, list[str]] = {}
        for image_id in self.image_ids:
            for class_id in self.areas[image_id]:
                members.setdefault(class_id, []).append(image_id)
        frozen = MappingProxyType({class_id: tuple(images) for class_id, images in sorted(members.items())})
        object.__setattr__(self, "_members", frozen)

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Classes that occur in the split, ascending."""
        return tuple(self._by_class())

    def images_of(self, class_id: int) -> tuple[str, ...]:
        """Images that show a class, in the data set's order; empty when none does."""
        return self._by_class().get(class_id, ())

    def pairs(self, classes: Iterable[int]) -> list[tuple[str, int]]:
        """(image id, class id) for these classes, in image order, then by class id."""
        wanted = set(classes)
        return [
            (image_id, class_id)
            for image_id in self.image_ids
            for class_id in sorted(self.areas[image_id])
            if class_id in wanted
        ]

    def _by_class(self) -> Mapping[int, tuple[str, ...]]:
        members: Mapping[int, tuple[str, ...]] = self.__dict__["_members"]
        return members

    def __reduce__(self) -> tuple[type[ClassIndex], tuple[Any, ...]]:
        plain_areas, plain_points = dict(self.areas), dict(self.grid_points)
        return type(self), (self.image_ids, plain_areas, plain_points, self.fingerprint)


def count_grid_points(mask: UInt8Array, scale: float = 1.0) -> int:
    """Points (1 + 32 i, 1 + 32 j) of the full-size photo at which a mask is 1.

    OSLSM (Shaban et al. 2017, `_remove_small_objects`) keeps an image for a class when its mask, shrunk to
    1/32 by nearest neighbour, has more than two foreground cells; the lists of CANet, PFENet and HSNet come
    from there. Its padding of 15 pixels and rounding put the samples at 1 + 32 i.

    Args:
        mask: uint8 (H, W), 1 = foreground.
        scale: size of this copy relative to the photo at full size; 1 for originals.

    >>> count_grid_points(np.ones((64, 96), dtype=np.uint8))
    6
    """
    rows, columns = (
        np.floor(np.arange(1, np.ceil(side / scale), GRID_STEP) * scale).astype(np.int64) for side in mask.shape
    )
    return int((mask[np.ix_(rows, columns)] == 1).sum())


def build_index(
    source: MaskSource,
    split: str,
    *,
    cache_dir: Path | None = None,
    workers: int | None = None,
    show_progress: bool = False,
) -> ClassIndex:
    """Index of a split; read from `cache_dir` when that still matches the data.

    Each image's labels are decoded once. Workers are threads: decoding and counting leave Python's lock, and
    processes would spend longer starting (every one imports torch) than reading takes.

    Args:
        source: the data set; its `repr` and `split` name the stored file.
        split: name of the split.
        cache_dir: folder for the stored index, created when missing; None stores nothing.
        workers: threads that read masks; by default one per core, at most 8. The index does not depend on it.
        show_progress: a progress bar on stderr while masks are read.

    Raises:
        DataError: an empty split, workers < 1, or whatever the source finds wrong with a file (the first one in
            the order of the split).
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    if workers < 1:
        raise DataError(f"the number of workers that read masks must be at least 1, got {workers}")
    image_ids = tuple(source.ids(split))
    if not image_ids:
        raise DataError(f"split {split!r} of {source.name} lists no images; name a split that does")
    fingerprint = source.fingerprint(image_ids)
    if cache_dir is None:
        return _read_masks(source, image_ids, fingerprint, workers, show_progress)
    key = hashlib.sha256(f"{source!r} {split}".encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"index-{source.name}-{split}-{key}.json"
    stored = _load(path, image_ids, fingerprint)
    if stored is not None:
        return stored
    index = _read_masks(source, image_ids, fingerprint, workers, show_progress)
    _store(path, index)
    return index


@dataclass(frozen=True, slots=True)
class _Counted:
    """Of one image: longest side of its masks (0 without a class), and per class area and grid points.

    The points are counted twice: as if the image had its original size, and as if its long side stood for
    `GRID_LONG_SIDE`; which of them holds is known when all images have been read.
    """

    long_side: int
    areas: dict[int, int]
    as_original: dict[int, int]
    as_reduced: dict[int, int]


def _count(source: MaskSource, image_id: str) -> _Counted:
    masks = source.class_masks(image_id)
    side = max((max(mask.shape) for mask in masks.values()), default=0)
    as_original = {class_id: count_grid_points(mask) for class_id, mask in masks.items()}
    scale = min(1.0, side / GRID_LONG_SIDE)
    return _Counted(
        long_side=side,
        areas={class_id: int(np.count_nonzero(mask == 1)) for class_id, mask in masks.items()},
        as_original=as_original,
        as_reduced=as_original
        if scale == 1
        else {class_id: count_grid_points(mask, scale) for class_id, mask in masks.items()},
    )


def _count_all(source: MaskSource, image_ids: Sequence[str], workers: int) -> Iterator[list[_Counted]]:
    """Counts of all images in order, a chunk at a time; the first image in error raises its error."""

    def read(first: int) -> list[_Counted]:
        return [_count(source, image_id) for image_id in image_ids[first : first + _CHUNK]]

    with ThreadPoolExecutor(workers, thread_name_prefix="index") as pool:
        yield from pool.map(read, range(0, len(image_ids), _CHUNK))


def _read_masks(
    source: MaskSource, image_ids: tuple[str, ...], fingerprint: str, workers: int, show_progress: bool
) -> ClassIndex:
    found_all: list[_Counted] = []
    with tqdm(total=len(image_ids), desc="index", unit="image", disable=not show_progress) as bar:
        for chunk in _count_all(source, image_ids, workers):
            found_all.extend(chunk)
            bar.update(len(chunk))
    counted = dict(zip(image_ids, found_all, strict=True))
    # A copy of VOC whose longest photo is short of 500 pixels was reduced: then its largest photos stand for
    # 500 pixels each, and the ones below that length were small from the start and left as they were.
    longest = max(found.long_side for found in counted.values())
    return ClassIndex(
        image_ids=image_ids,
        areas={image_id: found.areas for image_id, found in counted.items()},
        grid_points={
            image_id: found.as_reduced if found.long_side == longest else found.as_original
            for image_id, found in counted.items()
        },
        fingerprint=fingerprint,
    )


def _store(path: Path, index: ClassIndex) -> None:
    content = {
        "format": _FORMAT,
        "fingerprint": index.fingerprint,
        "images": [
            [
                image_id,
                [[c, area, index.grid_points[image_id][c]] for c, area in index.areas[image_id].items()],
            ]
            for image_id in index.image_ids
        ],
    }
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    except DataError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise DataError(f"cannot keep the index in {path.parent}: {reason}; name another --cache") from error


def _load(path: Path, image_ids: tuple[str, ...], fingerprint: str) -> ClassIndex | None:
    """The stored index, or None when there is none, it is damaged, or the data have changed since."""
    try:
        content = json.loads(read_text(path))
        if content["format"] != _FORMAT or content["fingerprint"] != fingerprint:
            return None
        areas = {str(name): {int(c): int(area) for c, area, _ in rows} for name, rows in content["images"]}
        points = {str(name): {int(c): int(count) for c, _, count in rows} for name, rows in content["images"]}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError):
        return None
    if tuple(areas) != tuple(dict.fromkeys(image_ids)):
        return None
    return ClassIndex(image_ids=image_ids, areas=areas, grid_points=points, fingerprint=fingerprint)
