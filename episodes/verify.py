"""Every problem of a data set, by file, without stopping at the first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from episodes.progress import tqdm
from episodes.sources import ProblemKind, SourceError
from episodes.types import DataError, MaskSource, SplitByClasses, UInt8Array

_FEWEST = 2  # images of a class that an episode of one shot needs: a support and a query

_Read = TypeVar("_Read")


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: the file; where a source has no file to name, ``SOURCE:IMAGE_ID``; for what concerns a whole split
            its list, or ``SOURCE:SPLIT``.
        kind: one word of `episodes.sources.ProblemKind`.
        message: what was expected and what came.
        mend: what to do about it.
    """

    file: str
    kind: ProblemKind
    message: str
    mend: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}; {self.mend}"

    def as_json(self) -> dict[str, str]:
        """The four parts by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitReport:
    """What one split holds and what is wrong with it.

    Attributes:
        name: of the split.
        images: number of different image ids listed.
        classes: class id -> number of images that show the class, for the classes the split should show and
            those it does show, ascending.
        problems: in the order found.
        without_object: how many of the images show no class, for which no episode draws them.
    """

    name: str
    images: int
    classes: Mapping[int, int]
    problems: tuple[Problem, ...]
    without_object: int = 0


@runtime_checkable
class _HasSplitFile(Protocol):
    def split_file(self, split: str) -> Path: ...


@runtime_checkable
class _HasImageFile(Protocol):
    def image_file(self, image_id: str) -> Path: ...


@runtime_checkable
class _HasProblems(Protocol):
    """A source that knows problems which reading its images does not show, such as a mask without a photo."""

    def problems(self, split: str) -> Iterable[SourceError]: ...


def verify(source: MaskSource, split: str) -> list[Problem]:
    """All problems of one split, empty when all is well; see `inspect`."""
    return list(inspect(source, split).problems)


def inspect(source: MaskSource, split: str) -> SplitReport:
    """Read every photo and mask of a split in full, and list all that is wrong. Progress goes to stderr.

    Beside what the source itself complains about, one file at a time: masks whose size is not the photo's, ids
    listed twice, photos that are the same pixel for pixel, and classes with too few images for an episode.

    Raises:
        DataError: only what cannot be pinned to a file of the data, for example an unknown split of a
            source without files.
    """
    return _Inspection(source, split).report()


def report(source: MaskSource, splits: Sequence[SplitReport]) -> dict[str, Any]:
    """Everything as values for JSON, with counts of problems by kind; what `report_lines` prints.

    Returns:
        ``{"source", "problems", "kinds", "splits": [{"name", "images", "without_object", "classes": {id: {"name",
        "images"}}, "kinds": {kind: count}, "problems": [{"file", "kind", "message", "mend"}]}]}``; ids of classes are
        strings, as JSON wants keys.
    """
    kinds = Counter(problem.kind for split in splits for problem in split.problems)
    try:
        names = source.class_names
    except DataError:  # it is among the problems
        names = {}
    return {
        "source": source.name,
        "problems": kinds.total(),
        "kinds": dict(kinds.most_common()),
        "splits": [
            {
                "name": split.name,
                "images": split.images,
                "without_object": split.without_object,
                "classes": {
                    str(class_id): {"name": names.get(class_id, "?"), "images": count}
                    for class_id, count in split.classes.items()
                },
                "kinds": dict(Counter(problem.kind for problem in split.problems).most_common()),
                "problems": [problem.as_json() for problem in split.problems],
            }
            for split in splits
        ],
    }


def report_lines(found: Mapping[str, Any]) -> list[str]:
    """A report in words: one line per split, then one per problem."""
    lines = []
    for split in found["splits"]:
        shown = sum(1 for one in split["classes"].values() if one["images"])
        kinds = ", ".join(f"{count} {kind}" for kind, count in split["kinds"].items())
        without = f" ({split['without_object']} without an object)" if split["without_object"] else ""
        lines.append(
            f"{split['name']}: {split['images']} images{without}, {shown} of {len(split['classes'])} classes, "
            f"problems: {len(split['problems'])}{f' ({kinds})' if kinds else ''}"
        )
    for split in found["splits"]:
        lines += [f"{one['file']}: {one['message']}; {one['mend']}" for one in split["problems"]]
    return lines


class _Inspection:
    """One pass over a split, collecting problems."""

    def __init__(self, source: MaskSource, split: str) -> None:
        self._source = source
        self._split = split
        self._place = str(source.split_file(split)) if isinstance(source, _HasSplitFile) else f"{source.name}:{split}"
        self._names: Mapping[int, str] = {}
        self._problems: dict[Problem, None] = {}  # a set that keeps the order: one broken file may meet us often
        self._shown: Counter[int] = Counter()
        self._without_object = 0
        self._first_with: dict[bytes, str] = {}

    def report(self) -> SplitReport:
        self._names = self._read(self._place, lambda: self._source.class_names) or {}
        try:
            image_ids = list(self._source.ids(self._split))
        except SourceError as error:
            self._note(error, self._place)
            return self._result(0)
        repeated = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
        for image_id in repeated:
            self._add(self._place, "duplicate", f"id {image_id} is listed more than once", "keep one line of it")
        image_ids = list(dict.fromkeys(image_ids))
        for image_id in tqdm(image_ids, desc=f"verify {self._split}", unit="image"):
            self._inspect_image(image_id)
        if isinstance(self._source, _HasProblems):
            for problem in self._read(self._place, self._source.problems, self._split) or ():
                self._note(problem, self._place)
        if image_ids:
            self._inspect_classes()
        else:
            self._add(self._place, "empty-split", "the split lists no images", "add ids, one per line")
        return self._result(len(image_ids))

    def _inspect_image(self, image_id: str) -> None:
        file = self._file_of(image_id)
        photo = self._read(file, self._source.image, image_id)
        masks = self._read(file, self._source.class_masks, image_id)
        self._shown.update((masks or {}).keys())
        self._without_object += masks is not None and not masks
        if photo is not None:
            self._inspect_twins(image_id, photo)
        if not masks:
            # No class to compare the photo with: reading any one compares the size of the labels.
            if self._names:
                self._read(file, self._source.mask, image_id, min(self._names))
        elif photo is not None:
            for class_id in [class_id for class_id, mask in masks.items() if mask.shape != photo.shape[:2]]:
                self._note_size(image_id, class_id, masks[class_id], photo)

    def _note_size(self, image_id: str, class_id: int, mask: UInt8Array, photo: UInt8Array) -> None:
        try:
            self._source.mask(image_id, class_id)  # knows the file to blame
        except DataError as error:
            self._note(error, self._file_of(image_id))
            return
        self._add(
            self._file_of(image_id),
            "size-mismatch",
            f"mask of class {class_id} is {mask.shape[1]}x{mask.shape[0]}, photo is {photo.shape[1]}x{photo.shape[0]}",
            "resize one to the other (nearest neighbour for the mask) or drop the id from the split",
        )

    def _inspect_twins(self, image_id: str, photo: UInt8Array) -> None:
        """The same picture under two ids would be a support that shows its own query."""
        content = hashlib.blake2b(str(photo.shape).encode() + photo.tobytes(), digest_size=16).digest()
        first = self._first_with.setdefault(content, image_id)
        if first != image_id:
            self._add(
                self._file_of(image_id),
                "duplicate",
                f"the same photo as {self._file_of(first)}, pixel for pixel",
                "drop one of them, or an episode may have its query as support",
            )

    def _inspect_classes(self) -> None:
        for class_id in self._expected_classes():
            count = self._shown[class_id]
            shown = f"class {class_id} ({self._names.get(class_id, '?')})"
            if not count:
                mend = "add images of it, or expect no episodes of it"
                self._add(self._place, "empty-class", f"no image of the split shows {shown}", mend)
            elif count < _FEWEST:
                mend = "add images of it: an episode needs a support and another photo as query"
                self._add(self._place, "too-few", f"only {count} image of the split shows {shown}", mend)

    def _expected_classes(self) -> tuple[int, ...]:
        if not isinstance(self._source, SplitByClasses):
            return tuple(self._names)
        return tuple(self._source.split_classes(self._split))

    def _result(self, images: int) -> SplitReport:
        expected = self._expected_classes() if images else ()
        classes = {class_id: self._shown[class_id] for class_id in sorted({*expected, *self._shown})}
        return SplitReport(
            name=self._split,
            images=images,
            classes=classes,
            problems=tuple(self._problems),
            without_object=self._without_object,
        )

    def _read(self, file: str, read: Callable[..., _Read], *arguments: object) -> _Read | None:
        """What `read` returns, or None after noting its problem, under `file` if the error names none."""
        try:
            return read(*arguments)
        except DataError as error:
            self._note(error, file)
            return None

    def _note(self, error: DataError, file: str) -> None:
        if isinstance(error, SourceError):
            self._add(error.file, error.kind, error.message, error.mend)
            return
        message, _, mend = str(error).rpartition("; ")  # the custom of DataError
        self._add(file, "bad-annotation", message or mend, mend if message else "mend it or drop the id from the split")

    def _add(self, file: str, kind: ProblemKind, message: str, mend: str) -> None:
        self._problems.setdefault(Problem(file, kind, message, mend))

    def _file_of(self, image_id: str) -> str:
        if isinstance(self._source, _HasImageFile):
            return str(self._source.image_file(image_id))
        return f"{self._source.name}:{image_id}"
