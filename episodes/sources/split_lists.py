"""Splits as lists of ids: ``splits/NAME.txt`` beside the data, and ``all`` without any list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from episodes.files import read_text
from episodes.sources.errors import SourceError

ALL = "all"
"""The split that every data set has without a list: all ids in the data set's own order."""


def split_file(root: Path, split: str) -> Path:
    """The list of a split's ids; ``all`` has none, its place is the data set's folder."""
    return root if split == ALL else root / "splits" / f"{split}.txt"


def known_splits(root: Path) -> tuple[str, ...]:
    """``all`` and the names of the lists under ``splits/``, in alphabetical order."""
    return (ALL, *sorted(file.stem for file in (root / "splits").glob("*.txt") if file.stem != ALL))


def list_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number (from 1) and text of every line that is neither blank nor a ``#`` comment, in UTF-8.

    Raises:
        SourceError: missing or not text.
    """
    try:
        text = read_text(path, "utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(path, "missing", "no such list", "write it, one entry per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(path, "undecodable", f"not a readable text file ({error})", "save it as UTF-8") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def read_split(root: Path, split: str, all_ids: Sequence[str]) -> tuple[str, ...]:
    """Ids of a split, each once.

    Args:
        root: folder of the data set; the list is ``{root}/splits/{split}.txt``, one id per line. Blank lines
            and lines that start with ``#`` are skipped.
        split: name of the split; ``all`` is every id and needs no list.
        all_ids: every id of the data set in its own order.

    Returns:
        ``all_ids`` for ``all``, otherwise the ids in the order of the list.

    Raises:
        SourceError: no such split, a list that is not text, or an id that the data set lacks.
    """
    if split == ALL:
        return tuple(all_ids)
    path = split_file(root, split)
    known = known_splits(root)
    if split not in known:
        raise SourceError(path, "missing", f"no split {split!r}", f"this data set has: {', '.join(known)}")
    wanted = dict.fromkeys(all_ids)
    ids: dict[str, None] = {}
    for number, image_id in list_lines(path):
        if image_id not in wanted:
            raise SourceError(
                path,
                "missing",
                f"line {number} names {image_id!r}, which this data set of {len(wanted)} images lacks",
                "correct the id (a photo's name without its suffix) or drop the line",
            )
        ids[image_id] = None
    return tuple(ids)


def default_splits(root: Path) -> tuple[str, str]:
    """Splits to train on and to be scored on: ``train`` and ``val`` or ``test`` where listed, else ``all`` twice."""
    known = known_splits(root)
    for scored in ("val", "test"):
        if {"train", scored} <= set(known):
            return "train", scored
    return ALL, ALL
