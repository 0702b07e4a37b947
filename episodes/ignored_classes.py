"""A source in which some classes are ignored wherever they are not the class that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from episodes.types import IGNORE, FoldedDataset, MaskSource, SupportKind, UInt8Array, WeaklyAnnotated


@dataclass(frozen=True)
class IgnoredClasses:
    """A `MaskSource` like another one, but for pixels of `ignored` classes: 255 in the masks of all other classes.

    Training under protocols that must not learn novel classes as background uses it
    (`EpisodeProtocol.novel_in_training` is ``ignored``).

    Args:
        source: the data set.
        ignored: class ids.
    """

    source: MaskSource
    ignored: frozenset[int]

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.source.name

    @property
    def class_names(self) -> Mapping[int, str]:
        """Those of the data set."""
        return self.source.class_names

    @property
    def default_splits(self) -> tuple[str, str]:
        """Those of the data set."""
        return self.source.default_splits

    @property
    def folds(self) -> FoldedDataset | None:
        """Those of the data set."""
        return self.source.folds

    def ids(self, split: str) -> Sequence[str]:
        """Image ids of a split."""
        return self.source.ids(split)

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3)."""
        return self.source.image(image_id)

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 where the class is, 255 where ignored or of an ignored class, 0 elsewhere."""
        return self._without(self.source.mask(image_id, class_id), class_id, self.source.class_masks(image_id))

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels: those of the data set."""
        return self.source.class_areas(image_id)

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask, for the classes present, ascending."""
        masks = self.source.class_masks(image_id)
        return {class_id: self._without(mask, class_id, masks) for class_id, mask in masks.items()}

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        """What the data set has drawn, with ignored classes not known; None if it has nothing of this kind."""
        if not isinstance(self.source, WeaklyAnnotated):
            return None
        drawn = self.source.annotation(image_id, class_id, kind)
        return None if drawn is None else self._without(drawn, class_id, self.source.class_masks(image_id))

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """That of the data set: the files are the same."""
        return self.source.fingerprint(image_ids)

    def _without(self, mask: UInt8Array, class_id: int, present: Mapping[int, UInt8Array]) -> UInt8Array:
        changed = mask.copy()
        for other, region in present.items():
            if other in self.ignored and other != class_id:
                changed[(region == 1) & (mask == 0)] = IGNORE
        return changed
