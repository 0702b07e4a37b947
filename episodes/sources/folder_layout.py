"""What lies where in a folder of one's own: photos, masks or marks in one of three forms, names of classes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from episodes.sources.decoding import PHOTO_SUFFIXES
from episodes.sources.errors import SourceError
from episodes.sources.split_lists import list_lines
from episodes.types import DataError

BACKGROUND_MARK = 254
"""Value of an index picture that marks background in scribbles and points; no class may have it."""

Form = Literal["index", "classes", "object"]
_NUMBERED = re.compile(r"(\d{1,18})[\s:,;]+(\S.*)")
_BACKGROUND_NAMES = frozenset({"background", "_background_", "__background__"})


@dataclass(frozen=True)
class Drawings:
    """The pictures of ``masks/`` or of a folder of marks.

    Attributes:
        folder: the folder.
        form: ``index`` (ID.png holds class ids), ``classes`` (CLASS/ID.png) or ``object`` (ID.png, one class).
        files: class name -> image id -> file; the class name is empty where a file holds all classes.
    """

    folder: Path
    form: Form
    files: Mapping[str, Mapping[str, Path]]

    def of(self, image_id: str, class_name: str) -> Path | None:
        """The file that may hold a class of an image, or None."""
        return self.files.get(class_name if self.form == "classes" else "", {}).get(image_id)

    def all_of(self, image_id: str) -> list[Path]:
        """Every file of an image."""
        return [files[image_id] for files in self.files.values() if image_id in files]


def pictures(folder: Path) -> dict[str, Path]:
    """Name without suffix -> picture, in alphabetical order; hidden files and other kinds of files are left out.

    Raises:
        SourceError: two pictures that differ in their suffix alone.
    """
    found: dict[str, Path] = {}
    entries = folder.iterdir() if folder.is_dir() else ()
    for file in sorted(entries):
        if file.suffix.lower() not in PHOTO_SUFFIXES or file.name.startswith(".") or not file.is_file():
            continue
        if file.stem in found:
            mend = "give one of them another name: the name without suffix is the id of the photo"
            raise SourceError(file, "duplicate", f"{found[file.stem].name} has the same name", mend)
        found[file.stem] = file
    return found


def find_drawings(folder: Path, has_names: bool) -> Drawings:
    """Which of the three forms a folder has, and its files.

    Args:
        folder: ``masks/``, ``boxes/``, ``scribbles/`` or ``points/``; it need not exist.
        has_names: whether ``classes.txt`` names the values of index pictures.

    Raises:
        SourceError: pictures beside folders of pictures.
    """
    flat = pictures(folder)
    entries = folder.iterdir() if folder.is_dir() else ()
    names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if flat and names:
        raise SourceError(
            folder,
            "bad-annotation",
            f"holds pictures ({next(iter(flat.values())).name}) beside folders ({', '.join(names[:3])})",
            "keep either one index picture per photo, or one folder per class with a black and white picture per photo",
        )
    if names:
        return Drawings(folder, "classes", {name: pictures(folder / name) for name in names})
    return Drawings(folder, "index" if has_names else "object", {"": flat})


def read_class_names(path: Path) -> dict[int, str]:
    """Class id -> name of ``classes.txt``, ascending.

    One name per line, counted from 1, or the number before each name (``7 cat`` or ``7: cat``). The background may
    be listed as well, as number 0 or as the first name (``background``). Blank lines and ``#`` comments are skipped.

    Raises:
        SourceError: no class, a number given twice or outside 1..253, a name given twice, numbers on some lines only.
    """
    lines = list(list_lines(path))
    matches = [_NUMBERED.fullmatch(line) for _, line in lines]
    numbered = [match for match in matches if match is not None]
    if 0 < len(numbered) < len(lines):
        place = next(number for (number, _), match in zip(lines, matches, strict=True) if match is None)
        mend = "number every line or none; without numbers classes are counted from 1"
        raise SourceError(path, "bad-annotation", f"line {place} has no number, others have", mend)
    if numbered:
        pairs = [(int(match[1]), match[2]) for match in numbered]
    else:
        first = 0 if lines and lines[0][1].lower() in _BACKGROUND_NAMES else 1
        pairs = [(number, name) for number, (_, name) in enumerate(lines, start=first)]
    names: dict[int, str] = {}
    for (place, _), (class_id, name) in zip(lines, pairs, strict=True):
        if class_id == 0 and name.lower() in _BACKGROUND_NAMES:
            continue
        if not 1 <= class_id < BACKGROUND_MARK or class_id in names or name in names.values():
            came = f"line {place}: class {class_id} ({name}) is out of 1..253 or given before"
            raise SourceError(path, "bad-annotation", came, "give each class its own number and name")
        names[class_id] = name
    if not names:
        raise SourceError(path, "bad-annotation", "names no class", "write one class per line, for example 1 cat")
    return dict(sorted(names.items()))


def class_names_of(masks: Drawings, names_file: Path) -> dict[int, str]:
    """Class id -> name: of ``classes.txt`` if there is one, else of the folders in ``masks/``, else ``object``."""
    if not names_file.exists():
        folders = masks.files if masks.form == "classes" else ("object",)
        return dict(enumerate(folders, start=1))
    names = read_class_names(names_file)
    check_classes(masks, names)
    return names


def check_classes(drawings: Drawings, names: Mapping[int, str]) -> None:
    """Raises SourceError when a folder of drawings has classes that the data set has not."""
    known = ", ".join(names.values())
    if drawings.form == "classes":
        for name in drawings.files:
            if name not in names.values():
                mend = f"this data set has: {known}; rename the folder, or name the class in classes.txt"
                raise SourceError(drawings.folder / name, "unknown-label", f"no class {name!r}", mend)
    elif drawings.form == "object" and drawings.files[""] and len(names) > 1:
        mend = f"sort them into one folder per class, or number the classes in classes.txt: {known}"
        raise SourceError(drawings.folder, "unknown-label", "pictures do not say which class they mark", mend)


def read_image_labels(
    path: Path, class_names: Mapping[int, str], known_ids: Mapping[str, object]
) -> dict[str, set[int]]:
    """Image id -> class ids of ``labels.txt``: ``ID class class ...``, names with spaces in double quotes.

    Raises:
        SourceError: a line that cannot be read, an unknown photo or class.
    """
    numbers = {name: class_id for class_id, name in class_names.items()}
    labels: dict[str, set[int]] = {}
    for place, line in list_lines(path):
        try:
            image_id, *names = shlex.split(line)
        except ValueError as error:
            mend = 'put names with spaces or apostrophes in double quotes: "my photo" cat'
            raise SourceError(path, "bad-annotation", f"line {place} cannot be read ({error})", mend) from None
        if image_id not in known_ids:
            mend = "write a photo's name without its suffix first, then its classes"
            raise SourceError(path, "missing", f"line {place}: no photo {image_id!r}", mend)
        for name in names:
            if name not in numbers:
                mend = f"this data set has: {', '.join(numbers)}"
                raise SourceError(path, "unknown-label", f"line {place}: no class {name!r}", mend)
        labels.setdefault(image_id, set()).update(numbers[name] for name in names)
    return labels


def find_root(root: Path) -> Path:
    """The folder, once it is sure that it holds ``images/`` and ``masks/``. Raises DataError when it does not."""
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            came = f"it has no {name}/" if root.is_dir() else "it does not exist"
            raise DataError(
                f"{root}: expected a folder with images/ (photos) and masks/ (ID.png, or CLASS/ID.png), but {came}; "
                "name the folder around them"
            )
    return root
