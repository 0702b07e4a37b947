"""Several data sets as one: their photos side by side, and classes of one concept joined under one id."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from episodes.types import DataError, MaskSource, PhotoFiles, SupportKind, UInt8Array, WeaklyAnnotated

COMMON_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "motorbike": "motorcycle",
        "pottedplant": "potted plant",
        "sofa": "couch",
        "tvmonitor": "tv",
    }
)
"""All twenty classes of VOC are among COCO's eighty (Lin et al. 2014); these six go by COCO's name there."""

_SPLITS = ("train", "val", "all")
Value = TypeVar("Value")


def common_name(name: str) -> str:
    """The name under which classes of several data sets are one.

    >>> common_name("aeroplane"), common_name("cat")
    ('airplane', 'cat')
    """
    return COMMON_NAMES.get(name, name)


@dataclass(frozen=True)
class JointSource:
    """A `MaskSource` of several others.

    Image ids are the members' own behind the member's name (``voc/2007_000032``). Classes are numbered from 1 in the
    order of the members; classes of the same `common_name` are one, under the name that the first member has for it,
    and an episode of such a class may take its support from one data set and its query from another. A class is
    unknown, and so background, in the photos of a data set that does not label it; no episode draws it from there.

    Splits: ``train`` holds the members' training photos, ``val`` their photos for evaluation, ``all`` both.

    Args:
        members: data sets of different names.
        training_only: more of them, whose training photos are in ``train`` and ``all``, and none in ``val``.

    Raises:
        DataError: no member, or two of the same name.
    """

    members: tuple[MaskSource, ...]
    training_only: tuple[MaskSource, ...] = ()

    def __post_init__(self) -> None:
        names = [source.name for source in (*self.members, *self.training_only)]
        if not self.members:
            raise DataError("a joint source needs at least one data set; got none")
        if len(set(names)) < len(names) or any("/" in name for name in names):
            raise DataError(f"data sets are joined by different names without '/'; got {', '.join(names)}")

    @property
    def name(self) -> str:
        """``joint``."""
        return "joint"

    @property
    def default_splits(self) -> tuple[str, str]:
        """``train`` and ``val``."""
        return "train", "val"

    @property
    def folds(self) -> None:
        """None: a joint data set has no folds in the literature."""
        return None

    @property
    def class_names(self) -> Mapping[int, str]:
        """Class id -> name, in ascending order of id."""
        return self._classes[0]

    @cached_property
    def sources(self) -> Mapping[str, MaskSource]:
        """The data sets by name, members first."""
        return {source.name: source for source in (*self.members, *self.training_only)}

    @cached_property
    def _classes(self) -> tuple[dict[int, str], dict[str, dict[int, int]]]:
        """Names by joint id; and by data set: joint id -> its own id."""
        names: dict[int, str] = {}
        joint_ids: dict[str, int] = {}
        own: dict[str, dict[int, int]] = {}
        for member, source in self.sources.items():
            own[member] = {}
            for class_id, name in source.class_names.items():
                joint_id = joint_ids.setdefault(common_name(name), len(joint_ids) + 1)
                if joint_id in own[member]:
                    raise DataError(f"{member} has two classes that go by one name, {common_name(name)!r}; rename one")
                names.setdefault(joint_id, name)
                own[member][joint_id] = class_id
        return names, own

    def own_classes(self, member: str) -> Mapping[int, int]:
        """Joint class id -> the member's own class id, for the member's classes. Raises DataError: no such member."""
        if member not in self.sources:
            raise DataError(f"no data set {member!r} in the joint source; it has: {', '.join(self.sources)}")
        return self._classes[1][member]

    def origin(self, image_id: str) -> tuple[MaskSource, str]:
        """The data set of a photo, and its id there. Raises DataError when no data set's name is in front."""
        member, _, own_id = image_id.partition("/")
        if member not in self.sources or not own_id:
            known = ", ".join(f"{name}/..." for name in self.sources)
            raise DataError(f"joint source: no image {image_id!r}; ids look like {known}")
        return self.sources[member], own_id

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids of ``train``, ``val`` or ``all``, member after member, each once."""
        if split not in _SPLITS:
            raise DataError(f"joint source: no split {split!r}; it has {', '.join(_SPLITS)}")
        found: dict[str, None] = {}
        for member, source in self.sources.items():
            for part in self._parts(member, split):
                found.update(dict.fromkeys(f"{member}/{image_id}" for image_id in source.ids(part)))
        return tuple(found)

    def image(self, image_id: str) -> UInt8Array:
        """RGB image, uint8 (H, W, 3)."""
        source, own_id = self.origin(image_id)
        return source.image(own_id)

    def image_file(self, image_id: str) -> Path:
        """The photo's file; for an unknown id or a photo without a file, a place where nothing is."""
        source, own_id = self.origin(image_id)
        return source.image_file(own_id) if isinstance(source, PhotoFiles) else Path(image_id)

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        """uint8 (H, W): 1 where the class is, 255 where ignored, 0 elsewhere and where its data set has no such class.

        Raises:
            DataError: no such image or class, or whatever the data set finds wrong with it.
        """
        if class_id not in self.class_names:
            raise DataError(f"joint source: no class {class_id}; it has 1..{len(self.class_names)}")
        source, own_id = self.origin(image_id)
        own_class = self._classes[1][source.name].get(class_id)
        if own_class is not None:
            return source.mask(own_id, own_class)
        return np.zeros_like(source.mask(own_id, min(source.class_names)))  # another class, for the size

    def class_areas(self, image_id: str) -> Mapping[int, int]:
        """Class id -> pixels, ascending."""
        source, own_id = self.origin(image_id)
        return self._renumbered(source, source.class_areas(own_id))

    def class_masks(self, image_id: str) -> Mapping[int, UInt8Array]:
        """Class id -> mask, for the classes present, ascending."""
        source, own_id = self.origin(image_id)
        return self._renumbered(source, source.class_masks(own_id))

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        """What the data set has drawn; None if it has nothing of this kind."""
        source, own_id = self.origin(image_id)
        own_class = self._classes[1][source.name].get(class_id)
        if own_class is None or not isinstance(source, WeaklyAnnotated):
            return None
        return source.annotation(own_id, own_class, kind)

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        """Hex digest of the ids, and of the data sets' digests of their images among these."""
        by_member: dict[str, list[str]] = {}
        for image_id in image_ids:
            source, own_id = self.origin(image_id)
            by_member.setdefault(source.name, []).append(own_id)
        parts = [f"{member} {self.sources[member].fingerprint(own_ids)}" for member, own_ids in by_member.items()]
        return hashlib.sha256("\n".join([*parts, *image_ids]).encode()).hexdigest()

    def _parts(self, member: str, split: str) -> tuple[str, ...]:
        """A data set's own splits that make up a split of the joint one."""
        training, evaluation = self.sources[member].default_splits
        if self.sources[member] in self.training_only:
            return () if split == "val" else (training,)
        return {"train": (training,), "val": (evaluation,), "all": (training, evaluation)}[split]

    def _renumbered(self, source: MaskSource, values: Mapping[int, Value]) -> dict[int, Value]:
        joint_ids = {own: joint for joint, own in self._classes[1][source.name].items()}
        return dict(sorted((joint_ids[own], value) for own, value in values.items()))
