"""Image retrieval data sets: train and test photos whose classes are disjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from episodes.files import is_file, read_text
from episodes.labelled import IMAGE_SUFFIXES, LabelledImages, find_root, photo_names
from episodes.matlab_files import read_matlab
from episodes.sources import SourceError
from episodes.sources.decoding import reason_of
from episodes.types import DataError

RetrievalLayout = Literal["folders", "cub", "cars", "sop"]

_MOST_MATLAB_BYTES = 500_000_000  # Cars-196 has 16,185 rows: a few MB
_SOP_HEADER = ("image_id", "class_id", "super_class_id", "path")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalData:
    """Photos to train on, and photos of other classes of which each is a query against all others.

    A test class with a single photo is kept: whether it is a query is for the metric to say.

    Raises:
        DataError: a class on both sides.
    """

    train: LabelledImages
    test: LabelledImages

    def __post_init__(self) -> None:
        shared = sorted(set(self.train.labels) & set(self.test.labels))
        if shared:
            raise DataError(
                f"{self.train.root}: {len(shared)} classes are in train and in test ({', '.join(shared[:3])}); "
                "retrieval is scored on classes never trained on, so keep each class on one side"
            )


def open_retrieval(layout: RetrievalLayout, root: Path | str) -> RetrievalData:
    """The train and test photos of a retrieval data set, in the order of its folders or lists.

    Args:
        layout: how the data set lies on disk.

            - ``folders``: ``train/CLASS/*`` and ``test/CLASS/*``, any names. Hidden and other files are ignored.
            - ``cub``: CUB-200-2011 as published (``images.txt``, ``image_class_labels.txt``, ``classes.txt``,
              ``images/``). The first half of the classes trains (1-100), the rest tests, as in Oh Song et al.,
              "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016; the data set's own
              ``train_test_split.txt`` is for classification and not read.
            - ``cars``: Cars-196 as ``cars_annos.mat`` and ``car_ims/``. Classes 1-98 train, the rest test.
            - ``sop``: Stanford Online Products (``Ebay_train.txt``, ``Ebay_test.txt``), which has its own split.
        root: the folder that holds these, or for ``cub`` and ``sop`` also the folder above.

    Raises:
        SourceError: a file or folder of the layout is missing or damaged, or a listed photo is missing.
        DataError: an unknown layout, or a class in train and in test.
    """
    if layout not in _OPENERS:
        raise DataError(f"retrieval layouts are {', '.join(_OPENERS)}; got {layout!r}")
    return _OPENERS[layout](root)


def _open_folders(root: Path | str) -> RetrievalData:
    root = find_root(root, (), ("train", "test"), "folders")
    return RetrievalData(train=_class_folders(root, "train"), test=_class_folders(root, "test"))


def _class_folders(root: Path, split: str) -> LabelledImages:
    top = root / split
    folders = sorted(entry for entry in top.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise SourceError(
            top, "empty-split", "expected a folder of photos per class, found none", "sort the photos by class"
        )
    files, labels = [], []
    for folder in folders:
        names = photo_names(folder)
        if not names:
            kinds = " ".join(IMAGE_SUFFIXES)
            raise SourceError(folder, "empty-class", f"expected photos ({kinds}), found none", "add some or remove it")
        files += [f"{split}/{folder.name}/{name}" for name in names]
        labels += [folder.name] * len(names)
    return LabelledImages(name=f"{root.name} {split}", root=root, files=tuple(files), labels=tuple(labels))


def _open_cub(root: Path | str) -> RetrievalData:
    needs = ("images.txt", "image_class_labels.txt", "classes.txt", "images")
    root = find_root(root, ("CUB_200_2011",), needs, "cub")
    images, labels = root / "images.txt", root / "image_class_labels.txt"
    names = dict(_numbered(root / "classes.txt"))
    class_of = dict(_numbered(labels))
    listed = []
    for number, path in _numbered(images):
        if number not in class_of:
            raise SourceError(labels, "unknown-label", f"image {number} of images.txt has no class", "restore the file")
        listed.append((f"images/{path}", _whole(class_of[number], labels)))
    return _first_half("cub", root, listed, names, images)


def _open_cars(root: Path | str) -> RetrievalData:
    root = find_root(root, (), ("cars_annos.mat", "car_ims"), "cars (not that of the devkit, cars_train_annos.mat)")
    annotations = root / "cars_annos.mat"
    content = _matlab(annotations)
    try:
        names = {n: f"{n:03d}.{name}" for n, name in enumerate(content["class_names"], start=1)}
        entries = content["annotations"]
        listed = [
            (str(path), int(np.asarray(number).item()))
            for path, number in zip(entries["relative_im_path"], entries["class"], strict=True)
        ]
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise SourceError(
            annotations,
            "undecodable",
            f"expected class_names and annotations with relative_im_path and class ({reason_of(error)})",
            "use cars_annos.mat as published with car_ims.tgz; the devkit's cars_train_annos.mat is another format",
        ) from None
    return _first_half("cars", root, listed, names, annotations)


def _matlab(path: Path) -> dict[str, Any]:
    try:
        return read_matlab(path, most_bytes=_MOST_MATLAB_BYTES)
    except (OSError, ValueError) as error:
        why = reason_of(error)
        raise SourceError(path, "undecodable", f"not a readable MATLAB file ({why})", "fetch it again") from None


def _open_sop(root: Path | str) -> RetrievalData:
    lists = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}
    root = find_root(root, ("Stanford_Online_Products",), tuple(lists.values()), "sop")
    return RetrievalData(**{split: _sop_list(root, root / name, split) for split, name in lists.items()})


def _sop_list(root: Path, path: Path, split: str) -> LabelledImages:
    rows = list(_rows(path, len(_SOP_HEADER)))
    if not rows or tuple(rows[0]) != _SOP_HEADER:
        raise SourceError(path, "undecodable", f"expected the header {' '.join(_SOP_HEADER)!r}", "restore the file")
    if len(rows) == 1:
        raise SourceError(path, "empty-split", "lists no photo", "restore the file")
    return _listed(f"sop {split}", root, [(row[3], row[1]) for row in rows[1:]], path)


def _first_half(
    layout: str, root: Path, listed: Sequence[tuple[str, int]], names: Mapping[int, str], source: Path
) -> RetrievalData:
    """The convention of metric learning: the first half of the classes trains, the rest tests."""
    unknown = [(path, number) for path, number in listed if number not in names]
    if unknown:
        path, number = unknown[0]
        raise SourceError(source, "unknown-label", f"class {number} of {path} has no name", "restore the file")
    training = set(sorted(names)[: len(names) // 2])
    sides: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for path, number in listed:
        sides["train" if number in training else "test"].append((path, names[number]))
    for split, photos in sides.items():
        if not photos:
            raise SourceError(
                source,
                "empty-split",
                f"no photo to {split}: of {len(names)} classes the first {len(training)} train and the rest test",
                "give at least two classes with photos in both halves",
            )
    return RetrievalData(
        **{split: _listed(f"{layout} {split}", root, photos, source) for split, photos in sides.items()}
    )


def _listed(name: str, root: Path, photos: Sequence[tuple[str, str]], source: Path) -> LabelledImages:
    files, labels = zip(*photos, strict=True)
    images = LabelledImages(name=name, root=root, files=files, labels=labels)
    # A look at each file now, so that a half unpacked data set does not end a training run in the middle.
    missing = [file for file in files if not is_file(root / file)]
    if missing:
        raise SourceError(
            root / missing[0],
            "missing",
            f"listed in {source.name}, but no such file ({len(missing)} of {len(files)} photos of {name} are missing)",
            f"unpack the photos into {root}",
        )
    return images


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of ``NUMBER VALUE``, each number once."""
    seen = set()
    for number, value in ((_whole(first, path), second) for first, second in _rows(path, 2)):
        if number in seen:
            raise SourceError(path, "undecodable", f"number {number} comes twice", "restore the file")
        seen.add(number)
        yield number, value


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(path, "undecodable", f"not a readable text file ({error})", "replace it") from None
    for number, line in enumerate(lines, start=1):
        parts = line.split(maxsplit=columns - 1)  # the last column is a path or name and may hold spaces
        if parts and len(parts) != columns:
            message = f"expected {columns} columns in line {number}, found {line.strip()[:80]!r}"
            raise SourceError(path, "undecodable", message, "restore the file")
        if parts:
            yield [*parts[:-1], parts[-1].rstrip()]


def _whole(text: str, path: Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise SourceError(path, "undecodable", f"expected a whole number, found {text!r}", "restore the file") from None


_OPENERS: Mapping[str, Callable[[Path | str], RetrievalData]] = {
    "folders": _open_folders,
    "cub": _open_cub,
    "cars": _open_cars,
    "sop": _open_sop,
}
