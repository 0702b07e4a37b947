"""Every problem of a data set, by file, without stopping at the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from episodes.sources import ProblemKind, SourceError
from episodes.types import MaskSource


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: the file; for a class without images the list of the split, or the split's name.
        kind: ``missing``, ``undecodable``, ``size-mismatch``, ``unknown-label``, ``rgb-mask``,
            ``empty-class`` or ``empty-split``.
        message: what was expected and what came.
        mend: what to do about it.
    """

    file: str
    kind: ProblemKind
    message: str
    mend: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}; {self.mend}"


@runtime_checkable
class _HasSplitFile(Protocol):
    def split_file(self, split: str) -> Path: ...


@runtime_checkable
class _HasSplitClasses(Protocol):
    def split_classes(self, split: str) -> tuple[int, ...]: ...


def verify(source: MaskSource, split: str) -> list[Problem]:
    """All problems of one split: every photo and mask is decoded in full. Progress goes to stderr.

    Args:
        source: the data set.
        split: name of the split.

    Returns:
        Problems in the order found: files in the order of the split, then classes without any image.
        Empty when all is well.

    Raises:
        DataError: only what cannot be pinned to a file of the data, for example an unknown split of a
            source without files.
    """
    place = str(source.split_file(split)) if isinstance(source, _HasSplitFile) else f"{source.name}:{split}"
    found: dict[tuple[str, str], Problem] = {}
    image_ids = _collect(found, source.ids, split)
    if image_ids is None:
        return list(found.values())
    if not image_ids:
        return [Problem(place, "empty-split", "the split lists no images", "add ids, one per line")]
    images: Counter[int] = Counter()
    for image_id in tqdm(image_ids, desc=f"verify {split}", unit="image"):
        _collect(found, source.image, image_id)
        areas: Mapping[int, int] | None = _collect(found, source.class_areas, image_id)
        images.update((areas or {}).keys())
        # The class does not matter: reading any mask compares its size with the photo's.
        _collect(found, source.mask, image_id, min(source.class_names))
    expected = source.split_classes(split) if isinstance(source, _HasSplitClasses) else source.class_names
    for class_id in expected:
        if not images[class_id]:
            found[place, f"class {class_id}"] = Problem(
                place,
                "empty-class",
                f"no image of the split shows class {class_id} ({source.class_names[class_id]})",
                "add images of it, or expect no episodes of it",
            )
    return list(found.values())


def _collect(found: dict[tuple[str, str], Problem], read: Callable[..., Any], *arguments: object) -> Any:
    """What `read` returns, or None after noting its problem."""
    try:
        return read(*arguments)
    except SourceError as error:
        problem = Problem(error.file, error.kind, error.message, error.mend)
        found.setdefault((problem.file, problem.kind), problem)
        return None
