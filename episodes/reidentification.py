"""Person re-identification data sets: train, query and gallery photos with person and camera from their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from episodes.files import user_path
from episodes.labelled import IMAGE_SUFFIXES, LabelledImages, find_root, photo_names
from episodes.sources import SourceError
from episodes.types import DataError

ReidentificationLayout = Literal["market1501", "dukemtmc", "cuhk03-np"]

_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


@dataclass(frozen=True)
class _Naming:
    """How a data set names its photos and which person ids stand for no person."""

    pattern: re.Pattern[str]
    expected: str
    inner: tuple[str, ...]
    junk: str | None = None
    distractor: str | None = None


# The patterns end at the dot: some copies of Market-1501 have names that end in ".jpg.jpg".
_NAMINGS: Mapping[str, _Naming] = MappingProxyType(
    {
        "market1501": _Naming(
            pattern=re.compile(r"(-1|\d{4,})_c(\d+)s\d+_\d+_\d+\."),
            expected="PERSON_cCAMERAsSEQUENCE_FRAME_BOX.jpg, such as 0002_c1s1_000451_03.jpg",
            inner=("Market-1501-v15.09.15", "Market-1501", "market1501"),
            junk="-1",
            distractor="0000",
        ),
        "dukemtmc": _Naming(
            pattern=re.compile(r"(\d{4,})_c(\d+)_f\d+\."),
            expected="PERSON_cCAMERA_fFRAME.jpg, such as 0005_c2_f0046985.jpg",
            inner=("DukeMTMC-reID",),
        ),
        "cuhk03-np": _Naming(
            pattern=re.compile(r"(\d{4,})_c(\d+)_\d+\."),
            expected="PERSON_cCAMERA_NUMBER.png, such as 0001_c1_301.png",
            inner=(),
        ),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReidentificationData:
    """Photos to train on, queries, and the gallery that they are searched in, all with cameras.

    Gallery photos of the query's person from the query's own camera are still there: the metric leaves them
    out, query by query.

    Raises:
        DataError: photos without cameras, or a person in train and in query.
    """

    train: LabelledImages
    query: LabelledImages
    gallery: LabelledImages

    def __post_init__(self) -> None:
        for images in (self.train, self.query, self.gallery):
            if images.cameras is None:
                raise DataError(f"{images.name}: re-identification needs the camera of every photo; got none")
        shared = sorted(set(self.train.labels) & set(self.query.labels))
        if shared:
            raise DataError(
                f"{self.query.root}: {len(shared)} persons are in train and in query ({', '.join(shared[:3])}); "
                "re-identification is scored on persons never trained on, so keep each person on one side"
            )


def open_reidentification(layout: ReidentificationLayout, root: Path | str) -> ReidentificationData:
    """Train, query and gallery photos of a data set with ``bounding_box_train``, ``query``, ``bounding_box_test``.

    Labels are the person ids as they stand in the file names, ``0002``. Files that are no photos and hidden
    files are ignored.

    Args:
        layout: how photos are named.

            - ``market1501``: ``0002_c1s1_000451_03.jpg`` (Zheng et al., "Scalable Person Re-identification: A
              Benchmark", ICCV 2015). Person -1 is junk, neither right nor wrong, and left out; person 0000 are
              distractors, kept in the gallery under the label ``0000`` and allowed nowhere else.
            - ``dukemtmc``: DukeMTMC-reID, ``0005_c2_f0046985.jpg`` (Zheng et al., "Unlabeled Samples Generated
              by GAN Improve the Person Re-identification Baseline in Vitro", ICCV 2017).
            - ``cuhk03-np``: ``0001_c1_301.png``, the new protocol of Zhong et al., "Re-ranking Person
              Re-identification with k-reciprocal Encoding", CVPR 2017; its boxes are ``labeled`` or ``detected``.
        root: the folder that holds the three, or the one above as the archives unpack it. For ``cuhk03-np`` the
            folder ``labeled`` or ``detected``, or the one above if it holds only one of these.

    Raises:
        SourceError: a folder is missing or without photos, or a photo's name is not of the layout.
        DataError: an unknown layout, a person in train and in query, or both kinds of boxes to choose from.
    """
    if layout not in _NAMINGS:
        raise DataError(f"re-identification layouts are {', '.join(_NAMINGS)}; got {layout!r}")
    naming = _NAMINGS[layout]
    inner = _cuhk_boxes(user_path(root)) if layout == "cuhk03-np" else naming.inner
    root = find_root(root, inner, tuple(_FOLDERS.values()), layout)
    name = f"{layout} {root.name}" if layout == "cuhk03-np" else layout
    parts = {split: _open_folder(root, split, naming, f"{name} {split}") for split in _FOLDERS}
    return ReidentificationData(**parts)


def _cuhk_boxes(root: Path) -> tuple[str, ...]:
    found = tuple(boxes for boxes in ("labeled", "detected") if (root / boxes).is_dir())
    if len(found) == 2:
        raise DataError(
            f"{root}: has labeled/ and detected/, two versions of cuhk03-np that are scored apart; "
            f"name one: {root / 'labeled'} or {root / 'detected'}"
        )
    return found


def _open_folder(root: Path, split: str, naming: _Naming, name: str) -> LabelledImages:
    folder = root / _FOLDERS[split]
    files, persons, cameras = [], [], []
    for photo in photo_names(folder):
        match = naming.pattern.match(photo)
        if match is None:
            raise SourceError(
                folder / photo,
                "unknown-label",
                f"the name tells no person and camera; expected {naming.expected}",
                "rename or remove it, or choose another layout",
            )
        person, camera = match.groups()
        if person == naming.junk:
            continue
        if person == naming.distractor and split != "gallery":
            raise SourceError(
                folder / photo,
                "unknown-label",
                f"person {person} marks distractors, expected in {_FOLDERS['gallery']} alone",
                "move it there or remove it",
            )
        files.append(f"{folder.name}/{photo}")
        persons.append(person)
        cameras.append(int(camera))
    if not files:
        kinds = " ".join(IMAGE_SUFFIXES)
        raise SourceError(folder, "empty-split", f"expected photos of persons ({kinds}), found none", "put them there")
    return LabelledImages(name=name, root=root, files=tuple(files), labels=tuple(persons), cameras=tuple(cameras))
