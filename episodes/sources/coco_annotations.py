"""COCO's JSON format: photos, categories, and which objects are on which photo."""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from episodes.sources.annotation_files import (
    bad_annotation,
    inner_name,
    is_whole,
    kind_of,
    read_json_object,
    shown,
    stated_size,
)
from episodes.sources.errors import SourceError

_FILES_KEPT = 8  # parsed files that a process keeps: train and val of a few data sets


@dataclass(frozen=True, slots=True)
class CocoObject:
    """One entry of ``annotations``; outline and box are as the JSON has them and looked at when drawn."""

    number: object
    class_id: int
    crowd: bool
    segmentation: object
    bbox: object


@dataclass(frozen=True, slots=True)
class CocoPhoto:
    """One entry of ``images`` with its objects. `size` is (height, width) in pixels."""

    name: str
    size: tuple[int, int]
    objects: list[CocoObject]


@dataclass(frozen=True)
class CocoAnnotations:
    """A parsed file.

    Attributes:
        file: where it was read.
        class_names: class id -> name, ascending. Class ids are the category ids, unless there is a category 0
            (see `read_annotations`).
        photos: photos in the order of the file, by name without suffix when these are unique, else by name.
    """

    file: Path
    class_names: Mapping[int, str]
    photos: Mapping[str, CocoPhoto]


def read_annotations(path: Path) -> CocoAnnotations:
    """A COCO JSON file, parsed once per process while it does not change.

    A category 0 cannot be a class id here, 0 being background. When nothing is drawn of it and another
    category names it as its supercategory, as Roboflow writes it, it is left out; otherwise all class ids are
    the category ids plus one.

    Raises:
        SourceError: missing file, broken JSON, or lists that do not fit together. Outlines are checked by
            `episodes.sources.coco_outlines`.
    """
    try:
        entry = path.stat()
    except OSError:
        raise SourceError(path, "missing", "no such file", "put the annotations there") from None
    return _parse(path, entry.st_size, entry.st_mtime_ns)


@lru_cache(maxsize=_FILES_KEPT)
def _parse(path: Path, size: int, mtime: int) -> CocoAnnotations:  # noqa: ARG001  a changed file is another key
    content = read_json_object(path, _compact)
    entries = {key: _entries(content, key, path) for key in ("categories", "images", "annotations")}
    used = {entry.get("category_id") for entry in entries["annotations"] if is_whole(entry.get("category_id"))}
    names, shift = _class_names(entries["categories"], used, path)
    photos = _photos(entries["images"], path)
    for place, entry in enumerate(entries["annotations"]):
        number = entry.get("id", f"number {place + 1}")
        photo = photos.get(entry["image_id"]) if _is_id(entry.get("image_id")) else None
        if photo is None:
            raise bad_annotation(
                path,
                f"annotation {shown(number, 40)} belongs to image {shown(entry.get('image_id'), 40)}, "
                "which is not in images",
            )
        category = entry.get("category_id")
        if not is_whole(category) or category + shift not in names:
            raise SourceError(
                path,
                "unknown-label",
                f"annotation {shown(number, 40)} has category {shown(category, 40)}, which is not in categories",
                "add the category or drop the annotation",
            )
        photo.objects.append(
            CocoObject(
                number, category + shift, entry.get("iscrowd") == 1, entry.get("segmentation"), entry.get("bbox")
            )
        )
    return CocoAnnotations(path, names, MappingProxyType(_by_short_name(photos, path)))


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """An object of the JSON with its polygons as arrays: a list of numbers takes four times the memory."""
    outline = entry.get("segmentation")
    if isinstance(outline, list):
        with contextlib.suppress(TypeError, OverflowError):  # no numbers: refused when it is to be drawn
            entry["segmentation"] = [array("d", polygon) for polygon in outline]
    return entry


def _entries(content: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    value = content.get(key)
    if not isinstance(value, list):
        found = kind_of(value) if key in content else f"only {', '.join(sorted(content))[:100] or 'nothing'}"
        raise bad_annotation(path, f"expected a list {key!r}, found {found}", "name a JSON file in COCO's format")
    for place, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise bad_annotation(path, f"entry {place + 1} of {key!r} is {kind_of(entry)}, expected an object")
    return value


def _is_id(value: object) -> bool:
    return is_whole(value) or isinstance(value, str)


def _class_names(entries: list[dict[str, Any]], used: set[object], path: Path) -> tuple[dict[int, str], int]:
    names: dict[int, str] = {}
    for place, entry in enumerate(entries):
        number, name = entry.get("id"), entry.get("name")
        if not (is_whole(number) and number >= 0 and isinstance(name, str) and name):
            raise bad_annotation(
                path,
                f"category {place + 1} needs an id from 0 up and a name, "
                f"found {shown(number, 40)} and {shown(name, 40)}",
            )
        if number in names:
            raise bad_annotation(path, f"two categories have the id {number}")
        names[number] = name
    parents = [entry.get("supercategory") for entry in entries if entry.get("id") != 0]
    if 0 in names and 0 not in used and names[0] in parents:
        del names[0]
    if not names:
        raise bad_annotation(path, "lists no categories", "export the annotations with their categories")
    shift = 1 if 0 in names else 0
    return {number + shift: names[number] for number in sorted(names)}, shift


def _photos(entries: list[dict[str, Any]], path: Path) -> dict[object, CocoPhoto]:
    photos: dict[object, CocoPhoto] = {}
    for place, entry in enumerate(entries):
        number = entry.get("id")
        if not _is_id(number):
            raise bad_annotation(path, f"image {place + 1} needs an id, found {shown(number, 40)}")
        if number in photos:
            raise bad_annotation(path, f"two images have the id {shown(number, 40)}")
        where = f"image {shown(number, 40)}"
        name = inner_name(entry.get("file_name"), path, where)
        photos[number] = CocoPhoto(name, stated_size(entry.get("width"), entry.get("height"), path, where), [])
    return photos


def _by_short_name(photos: Mapping[object, CocoPhoto], path: Path) -> dict[str, CocoPhoto]:
    by_name = {photo.name: photo for photo in photos.values()}
    if len(by_name) != len(photos):
        (double, _), *_ = Counter(photo.name for photo in photos.values()).most_common(1)
        raise bad_annotation(
            path, f"two images have the file_name {shown(double, 100)}", "keep one entry for each photo"
        )
    short = {str(PurePosixPath(name).with_suffix("")): photo for name, photo in by_name.items()}
    return short if len(short) == len(by_name) else by_name
