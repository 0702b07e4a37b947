"""Photos with one label each, for retrieval and re-identification, from files in any folder layout."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import ImageOps

from episodes.files import is_file, real_path
from episodes.sources import SourceError
from episodes.sources.decoding import opened, rgb
from episodes.sources.fingerprints import fingerprint_files
from episodes.types import DataError, UInt8Array

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""How the names of photos end, in lower case; capitals are fine in the files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """Photos with one label each (a class or a person), and the camera where it is known.

    Cheap to construct, holds no open files, travels into workers. `image` and `fingerprint` are those of
    `MaskSource`, so that whatever reads photos by id from one reads from the other.

    Attributes:
        name: short name for reports, for example ``cub_subset test``.
        root: folder that `files` are relative to.
        files: paths of the photos below `root`, with ``/`` between folders. They are the image ids.
        labels: class name or person id, one per file.
        cameras: number of the camera, one per file; None where cameras are not known.

    Raises:
        DataError: no files, fields of different lengths, a file listed twice, an absolute path or one
            with ``..``, or an empty label.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    labels: tuple[str, ...]
    cameras: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field, values in (("labels", self.labels), ("cameras", self.cameras)):
            if values is not None and len(values) != len(self.files):
                raise DataError(f"{self.name}: expected one of {field} per file, got {len(values)} for {len(self)}")
        if not self.files:
            raise DataError(f"{self.name}: expected at least one photo, got none; name a folder with photos")
        seen: set[str] = set()
        for file, label in zip(self.files, self.labels, strict=True):
            path = PurePosixPath(file)
            if not file or path.is_absolute() or ".." in path.parts:
                raise DataError(f"{self.name}: expected files below {self.root}, got {file!r}; name it from there")
            if file in seen:
                raise DataError(f"{self.name}: {file} is listed twice; list every photo once")
            if not label:
                raise DataError(f"{self.name}: {file} has an empty label; give it one or leave the file out")
            seen.add(file)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels that occur, sorted."""
        return tuple(sorted(set(self.labels)))

    @property
    def codes(self) -> npt.NDArray[np.int64]:
        """The labels as numbers, int64 (N,): positions in `class_names`."""
        position = {label: code for code, label in enumerate(self.class_names)}
        return np.array([position[label] for label in self.labels], np.int64)

    def image(self, image_id: str) -> UInt8Array:
        """RGB photo as people see it, uint8 (H, W, 3): EXIF orientation applied, transparency on white.

        Grey, palette, CMYK and 16-bit photos are converted.

        Raises:
            SourceError: missing or undecodable file.
        """
        with opened(self.root / image_id, "photo") as picture:
            return rgb(ImageOps.exif_transpose(picture))

    def image_file(self, image_id: str) -> Path:
        """The photo of an id."""
        return self.root / image_id

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the relative paths and contents of these photos. Raises SourceError for a missing one."""
        return fingerprint_files((image_id, (f"{self.root}/{image_id}",)) for image_id in image_ids)

    def select(self, labels: Collection[str]) -> LabelledImages:
        """The photos with these labels, in the same order. Raises DataError for no or an unknown label."""
        wanted = set(labels)
        unknown = sorted(wanted - set(self.labels))
        if unknown or not wanted:
            came = f"got {', '.join(unknown[:5])}" if unknown else "got none"
            raise DataError(f"{self.name}: expected labels such as {', '.join(self.class_names[:3])}; {came}")
        kept = [n for n, label in enumerate(self.labels) if label in wanted]
        return replace(
            self,
            files=tuple(self.files[n] for n in kept),
            labels=tuple(self.labels[n] for n in kept),
            cameras=None if self.cameras is None else tuple(self.cameras[n] for n in kept),
        )


def split_labels(
    images: LabelledImages, *, fraction: float = 1 / 3, seed: int = 0
) -> tuple[LabelledImages, LabelledImages]:
    """Two parts without a class in common: (kept for training, held out for choices).

    Args:
        images: two classes or more.
        fraction: share of the classes that is held out, between 0 and 1; rounded to whole classes, at least
            one on each side.
        seed: decides which classes, together with their names; not negative.

    Raises:
        DataError: a single class, or a fraction or seed out of range.
    """
    names = images.class_names
    if not 0 < fraction < 1:
        raise DataError(f"the held-out fraction must be between 0 and 1, got {fraction}")
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}")
    if len(names) < 2:
        raise DataError(f"{images.name}: a split by class needs at least 2 classes, got only {names[0]!r}")
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    drawn = np.random.default_rng(seed).permutation(len(names))
    kept, held_out = ([names[n] for n in part] for part in (drawn[count:], drawn[:count]))
    return (
        replace(images.select(kept), name=f"{images.name} (kept)"),
        replace(images.select(held_out), name=f"{images.name} (held out)"),
    )


def photo_names(folder: Path) -> list[str]:
    """Sorted names of the photos that lie directly in a folder. Hidden files and those of other kinds are left out."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
        )


def find_root(root: Path | str, inner: Iterable[str], needs: Sequence[str], layout: str) -> Path:
    """The folder with all entries in `needs`: `root`, or one of its folders named in `inner` (as archives unpack).

    Raises:
        SourceError: names the first entry that is missing, in the folder that has most of them.
    """
    root = real_path(root)
    candidates = (root, *(root / name for name in inner))
    missing = {folder: [need for need in needs if not _is_there(folder / need)] for folder in candidates}
    best = min(candidates, key=lambda folder: len(missing[folder]))
    if missing[best]:
        raise SourceError(
            best / missing[best][0],
            "missing",
            f"no such file or folder; the layout {layout} has {', '.join(needs)}",
            "name the folder that holds them, or another layout",
        )
    return best


def _is_there(path: Path) -> bool:
    return is_file(path) if path.suffix else path.is_dir()
