"""What a training may not see, checked against what it is about to use.

The lists of a fold already keep novel classes and evaluation photos out (`FoldLists`). This looks again, from the other
end: at the episodes that were drawn, the labels of their photos as the data set has them, the masks that the training
will read, and the files. It knows the rules and not how they were followed, so that a mistake in a list, a source or a
protocol stops the run instead of flattering its score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from episodes.fold_lists import FoldLists
from episodes.labelled import LabelledImages
from episodes.types import IGNORE, DataError, EpisodeSpec, MaskSource, PhotoFiles, PhotoSource, UInt8Array

Purpose = Literal["training", "choices"]
"""Weights, or a decision such as a threshold."""


@dataclass
class _Seen:
    """Of one purpose."""

    episodes: int = 0
    photos: set[str] = field(default_factory=set)
    classes: set[int] = field(default_factory=set)


class LeakGuard:
    """Checks the episodes of a run before they are used, and counts what it checked; one for a run.

    What holds after `check_episodes` has returned, for every photo and class that the episodes use:

    - the class is a base class, the photo is of the training split, and the evaluation does not draw it, nor another
      file with the same bytes;
    - where the protocol leaves out photos that show a novel class, the photo shows none, however small;
    - no pixel of a novel class is marked as the object, unless the data set itself labels it as both;
    - where the protocol ignores novel classes, their pixels are 255 in the mask that the training reads.
    """

    def __init__(self) -> None:
        self._seen: dict[Purpose, _Seen] = {"training": _Seen(), "choices": _Seen()}
        self._checked: set[tuple[str, int, frozenset[int], str]] = set()
        self._pixels = {"ignored": 0, "background": 0, "of both classes": 0}
        self._showing: set[str] = set()
        self._contents: _Contents | None = None
        self._rules: dict[str, Any] = {}

    def check_episodes(
        self, lists: FoldLists, specs: Iterable[EpisodeSpec], masks: MaskSource, *, purpose: Purpose
    ) -> None:
        """Check all photos and classes of some episodes.

        Args:
            lists: the fold that they were drawn from.
            specs: the episodes.
            masks: where the training reads masks.
            purpose: what they are used for.

        Raises:
            DataError: the first thing that is not as it must be; class, photo and file are named.
        """
        seen, pairs = self._seen[purpose], dict[tuple[str, int], None]()
        for spec in specs:
            seen.episodes += 1
            pairs.update(dict.fromkeys((image_id, spec.class_id) for image_id in (*spec.support_ids, spec.query_id)))
        self.check_pairs(lists, list(pairs), masks, purpose=purpose)

    def check_pairs(
        self, lists: FoldLists, pairs: Sequence[tuple[str, int]], masks: MaskSource, *, purpose: Purpose
    ) -> None:
        """`check_episodes` for photos and classes that are used without episodes."""
        what = "the training" if purpose == "training" else "the choice of a threshold"
        names = lists.source.class_names
        foreign = sorted({class_id for _, class_id in pairs} - set(lists.split.base))
        if foreign:
            shown = ", ".join(names.get(one, str(one)) for one in foreign[:5])
            raise DataError(
                f"leak: {what} would use {shown}, not among the base classes; only base classes may be used"
            )
        photos = list(dict.fromkeys(image_id for image_id, _ in pairs))
        self._check_photos(lists, photos, what)
        rule, novel = lists.protocol.novel_in_training, frozenset(lists.split.novel)
        for image_id, class_id in pairs:
            key = (image_id, class_id, novel, rule)
            if key not in self._checked:
                self._check_mask(lists, image_id, class_id, masks)
                self._checked.add(key)
        self._seen[purpose].photos.update(photos)
        self._seen[purpose].classes.update(class_id for _, class_id in pairs)
        self._rules = {
            "novel_in_training": rule,
            "evaluation_photos": len(lists.photos_to_score),
            "left_out_of_training": len(lists.photos_to_score & set(lists.training_index.image_ids)),
        }

    def record(self) -> dict[str, Any]:
        """What was checked, JSON-able, for a run's record."""
        used: dict[str, Any] = {
            purpose: {"episodes": seen.episodes, "photos": len(seen.photos), "classes": sorted(seen.classes)}
            for purpose, seen in self._seen.items()
        }
        contents = None if self._contents is None else {"files": self._contents.files, "read": self._contents.read}
        pixels = {name.replace(" ", "_"): count for name, count in self._pixels.items()}
        return {
            **self._rules,
            **used,
            "photos_that_show_novel_classes": len(self._showing),
            "novel_pixels": pixels,
            "compared_with_evaluation_by_content": contents,
        }

    def _check_photos(self, lists: FoldLists, photos: Sequence[str], what: str) -> None:
        listed, scored = set(lists.training_index.image_ids), lists.photos_to_score
        for image_id in photos:
            if image_id in scored:
                raise DataError(
                    f"leak: {what} would use photo {image_id!r}, which the evaluation draws; take it off one list"
                )
            if image_id not in listed:
                split = lists.protocol.training_split
                raise DataError(f"leak: {what} would use photo {image_id!r}, which is not of the split {split!r}")
        if self._contents is None or self._contents.scored != scored:
            self._contents = _Contents(lists.source, scored)
        self._contents.check(lists.source, photos, what)

    def _check_mask(self, lists: FoldLists, image_id: str, class_id: int, masks: MaskSource) -> None:
        labels = lists.source.class_masks(image_id)
        present = [one for one in lists.split.novel if one in labels and (labels[one] == 1).any()]
        if not present:
            return
        self._showing.add(image_id)
        names, rule = lists.source.class_names, lists.protocol.novel_in_training
        if rule == "excluded":
            raise DataError(
                f"leak: photo {image_id!r} shows {names[present[0]]}, a novel class, and protocol "
                f"{lists.protocol.name} trains on no photo that does; delete the stored index in --cache, and report it"
            )
        mask = masks.mask(image_id, class_id)
        own = labels[class_id] == 1 if class_id in labels else np.zeros(mask.shape, bool)
        for one in present:
            self._check_region(mask, labels[one] == 1, own, (image_id, names[class_id], names[one]), rule)

    def _check_region(
        self, mask: UInt8Array, region: np.ndarray[Any, Any], own: np.ndarray[Any, Any], about: Any, rule: str
    ) -> None:
        image_id, asked, novel = about
        values, both = mask[region], own[region]
        wrong = int(((values == 1) & ~both).sum())
        if wrong:
            raise DataError(
                f"leak: {wrong} pixels of {novel}, a novel class, are marked as {asked} in the mask of photo "
                f"{image_id!r}; mend the mask"
            )
        open_ = int(((values == 0) & ~both).sum())
        if open_ and rule == "ignored":
            raise DataError(
                f"leak: {open_} pixels of {novel}, a novel class, are background in the training mask of {asked} in "
                f"photo {image_id!r}, where the protocol ignores them"
            )
        self._pixels["ignored"] += int((values == IGNORE).sum())
        self._pixels["background"] += int((values == 0).sum())
        self._pixels["of both classes"] += int((values == 1).sum())


class _Contents:
    """Files of the evaluation by what is in them: read only where a training file has as many bytes.

    A source whose photos are no files is not compared: `files` stays 0.
    """

    def __init__(self, source: PhotoSource, scored: Collection[str]) -> None:
        self.scored, self.files, self.read = scored, 0, 0
        self._compared: set[str] = set()
        self._by_size: dict[int, list[Path]] = {}
        self._digests: dict[Path, bytes] = {}
        for image_id in sorted(scored):
            found = _file_of(source, image_id)
            if found is not None:
                self._by_size.setdefault(found[1], []).append(found[0])

    def check(self, source: PhotoSource, photos: Iterable[str], what: str) -> None:
        """Raises DataError where one of these photos has the bytes of an evaluation photo."""
        for image_id in photos:
            if image_id in self._compared:
                continue
            self._compared.add(image_id)
            found = _file_of(source, image_id)
            if found is None:
                continue
            self.files += 1
            for other in self._by_size.get(found[1], ()):
                if self._digest(found[0]) == self._digest(other):
                    raise DataError(
                        f"leak: {what} would use {found[0]}, the same photo as {other} of the evaluation under another "
                        "name; delete one of them, or take it off its list"
                    )

    def _digest(self, file: Path) -> bytes:
        if file not in self._digests:
            self.read += 1
            with file.open("rb") as opened:
                self._digests[file] = hashlib.file_digest(opened, "sha256").digest()
        return self._digests[file]


def _file_of(source: PhotoSource, image_id: str) -> tuple[Path, int] | None:
    if not isinstance(source, PhotoFiles):
        return None
    file = source.image_file(image_id)
    try:
        return file, file.stat().st_size
    except OSError:  # no photo behind this id: whoever reads it says so
        return None


def check_labelled(training: LabelledImages, *scored: LabelledImages) -> dict[str, Any]:
    """The guard of retrieval and re-identification: no photo that is scored trains, under its name or another.

    That no class is on both sides is seen to where the data set is opened. Returns what was checked, JSON-able.

    Raises:
        DataError: a file, or one with the same bytes, is on both sides.
    """
    compared = []
    for images in scored:
        both = {training.root / one for one in training.files} & {images.root / one for one in images.files}
        if both:
            raise DataError(f"leak: {min(both)} is in {training.name} and in {images.name}; keep it on one side")
        contents = _Contents(images, images.files)
        contents.check(training, training.files, "the training")
        compared.append({"name": images.name, "photos": len(images), "read": contents.read})
    return {"photos": len(training), "classes": len(training.class_names), "compared_with": compared}
