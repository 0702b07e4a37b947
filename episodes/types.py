"""The words of the field as values: episode, episode batch, source of images and masks.

A *class id* is the label value of a class in its data set (VOC: 1..20). 0 is background and 255 is ignore
in every mask of this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # the command line explains itself without loading torch
    from torch import Tensor

IGNORE = 255
"""Mask value of pixels that belong to neither foreground nor background and are never scored."""

OUTSIDE = 254
"""Value of pixels of weak annotations that lie beside the photo (padding): neither known nor open."""

UInt8Array = npt.NDArray[np.uint8]

SupportKind = Literal["mask", "box", "scribble", "point", "label"]
"""How a support's object is marked: by all of its pixels, or by less; see `episodes.annotations`."""
SUPPORT_KINDS: tuple[SupportKind, ...] = get_args(SupportKind)


class DataError(ValueError):
    """A problem of the user's data or request: one line that says what was expected, what came, how to mend it.

    Names of files and what stands in them may hold anything: line ends, and characters that a terminal obeys, are
    shown as ``\\n`` and the like.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    r"""The text with every character that is none to look at written out, so that it is one line of any terminal.

    >>> print(printable("a\nb \x1b[2J \udcff é"))
    a\nb \x1b[2J \udcff é
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeSpec:
    """One episode by name: which images, which class, which randomness. Loads nothing.

    Attributes:
        class_id: label value of the episode's class.
        support_ids: K image ids; a protocol may let them repeat (hsnet does).
        query_id: image id of the query, never among the supports.
        seed: seed of everything random that happens to this episode's images (augmentation).

    Raises:
        DataError: no support, or the query is among the supports.
    """

    class_id: int
    support_ids: tuple[str, ...]
    query_id: str
    seed: int

    def __post_init__(self) -> None:
        if not self.support_ids:
            raise DataError("an episode needs at least one support image; got none: ask for shots >= 1")
        if self.query_id in self.support_ids:
            raise DataError(f"query {self.query_id!r} is among its own supports {self.support_ids}")

    @property
    def shots(self) -> int:
        """Number of supports, K."""
        return len(self.support_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeBatch:
    """B episodes of K shots as tensors, all at one size H x W.

    Attributes:
        support_images: float32 (B, K, 3, H, W), RGB in [0, 1]; the backbone normalises, not the loader.
        support_masks: uint8 (B, K, H, W), 1 = foreground, 0 = background, 255 = ignored, or not known where the
            support is marked by less than a mask; there, 254 is beside the photo.
        support_dense: bool (B, K), whether the support is marked by a mask.
        support_truth: uint8 (B, K, H, W), the masks, whatever the supports are marked by.
        query_images: float32 (B, 3, H, W).
        query_masks: uint8 (B, H, W), same values as the support masks.
        class_ids: int64 (B,).
        specs: the B specs, in order.
    """

    support_images: Tensor
    support_masks: Tensor
    support_dense: Tensor
    support_truth: Tensor
    query_images: Tensor
    query_masks: Tensor
    class_ids: Tensor
    specs: tuple[EpisodeSpec, ...]

    def __len__(self) -> int:
        return len(self.specs)


FoldedDataset = Literal["pascal", "coco"]
"""Data sets whose classes the literature divides into four folds."""


class PhotoSource(Protocol):
    """Photos by id: what features are computed from. Every `MaskSource` is one."""

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3)."""
        ...

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest that changes when one of these photos changes; fast."""
        ...


@runtime_checkable
class PhotoFiles(Protocol):
    """A source whose photos are files: what is computed from a photo can then be kept by its content."""

    def image_file(self, image_id: str) -> Path:
        """The photo's file; for an unknown id, a place where nothing is."""
        ...


@runtime_checkable
class MaskSource(Protocol):
    """Images with masks per class, by id. Every data set of this package is one of these.

    Implementations are cheap to construct, hold no open files, can be pickled into workers, and raise
    `DataError` naming the file for anything missing or undecodable.
    """

    @property
    def name(self) -> str:
        """Short name for reports, for example ``voc``."""
        ...

    @property
    def class_names(self) -> Mapping[int, str]:
        """Class id -> name, background excluded, in ascending order of id."""
        ...

    @property
    def default_splits(self) -> tuple[str, str]:
        """Names of the splits to train on and to be scored on; they may be the same."""
        ...

    @property
    def folds(self) -> FoldedDataset | None:
        """Whose class folds apply, or None when the data set has none."""
        ...

    def ids(self, split: str) -> Sequence[str]:
        """Image ids of a split in the data set's own order. Raises DataError for an unknown split."""
        ...

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3)."""
        ...

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 where the class is, 255 where ignored, 0 elsewhere."""
        ...

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> its number of pixels in this image, for the classes present, ascending."""
        ...

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> `mask`, for the classes present, ascending; reads the image's labels once.

        The size is not compared with the photo's: this is what an index of thousands of masks reads.
        """
        ...

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest that changes when the content of an image or mask of these ids changes, and nowhere else."""
        ...


@runtime_checkable
class SplitByClasses(Protocol):
    """A source whose splits have classes of their own."""

    def split_classes(self, split: str) -> tuple[int, ...]:
        """Classes of a split, ascending. Raises DataError for an unknown split."""
        ...


@runtime_checkable
class WeaklyAnnotated(Protocol):
    """A source with supports that somebody drew as boxes, scribbles or points, beside its masks or instead of them."""

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        """uint8 (H, W): 1 = object, 0 = known background, 255 = not known; None when nothing of this kind is drawn."""
        ...
