"""Files to take away: masks, COCO's JSON, and the support set, as ``fewshot-seg predict`` writes and reads them."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from episodes.types import DataError
from fewshot_seg.app.guard import held_bytes
from fewshot_seg.app.session import Findings, Session
from fewshot_seg.coco_results import coco_document
from fewshot_seg.photos import open_photo, output_names
from fewshot_seg.predicted_files import COCO_NAME, PhotoWriter, Segmented, WrittenPrediction
from fewshot_seg.runtime import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Downloads:
    """Files: a zip of masks, overlays and confidence; COCO's instances; the support set."""

    masks: Path
    coco: Path
    support: Path


def write_downloads(session: Session, threshold: float) -> Downloads:
    """Write what was found at a threshold to a new folder of the session; files of an earlier call are deleted.

    Masks are those of `predict_folder` with that threshold, at the photos' own size; the network is not asked again.

    Raises:
        DataError: nothing was searched yet, the folder cannot be written, or the disk's share is used up; as
            `Session.turn`.
    """
    with session.turn("making files"):
        for earlier in session.files.iterdir():
            shutil.rmtree(earlier, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=session.files))
        try:
            return _written(session, session.found(), threshold, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _written(session: Session, found: Findings, threshold: float, folder: Path) -> Downloads:
    writer = PhotoWriter(found.predictor, folder / "found", confidence=True, coco=True)
    queries = [one.query for one in found.looked]
    written = []
    for looked, name in zip(found.looked, output_names(queries), strict=True):
        session.check_open()
        _check_room(session)
        photo = open_photo(looked.query, most_pixels=session.limits.pixels)
        coarse = found.predictor.with_tiles(photo, session.margins_at(looked, threshold))
        one = writer.write(looked.query, name, Segmented(photo=photo, coarse=coarse))
        assert isinstance(one, WrittenPrediction)
        written.append(one)
    write_json(folder / COCO_NAME, coco_document([one.coco for one in written if one.coco], (found.name,)))
    stem = file_stem(found.name)
    found.predictor.save_support(folder / f"{stem}.safetensors", found.examples)
    _check_room(session, more=_zip_needs(folder / "found", folder / COCO_NAME))
    return Downloads(
        masks=_zipped(folder / "found", folder / f"{stem}-masks.zip", folder / COCO_NAME),
        coco=folder / COCO_NAME,
        support=folder / f"{stem}.safetensors",
    )


def _check_room(session: Session, *, more: int = 0) -> None:
    if held_bytes(session.parent) + more > session.limits.disk_bytes:
        raise DataError("no room for more files now: remove photos, or try again later")


_OF_AN_ENTRY = 1_000
"""Bytes that a zip holds for a file besides its content, at most: its name twice, and numbers."""


def _zip_needs(folder: Path, *others: Path) -> int:
    """Bytes that `_zipped` takes at most, besides the files that it takes in: each goes when it is in the zip."""
    inside = [one.stat().st_size for one in folder.rglob("*") if one.is_file()]
    return (
        max(inside, default=0) + sum(one.stat().st_size for one in others) + _OF_AN_ENTRY * (len(inside) + len(others))
    )


def _zipped(folder: Path, target: Path, *others: Path) -> Path:
    """A zip of all files of a folder, which is removed, and of others, which stay."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # PNG and JPEG do not get smaller
        for file in sorted(one for one in folder.rglob("*") if one.is_file()):
            archive.write(file, file.relative_to(folder))
            file.unlink()  # all files and the zip beside each other would be twice as large
        for file in others:
            archive.write(file, file.name)
    shutil.rmtree(folder)
    return target


def file_stem(name: str) -> str:
    """A name for files of a class, from which no folder can be left.

    >>> file_stem("black cat"), file_stem("../../etc/passwd"), file_stem("...")
    ('black_cat', 'etc_passwd', 'object')
    """
    letters = "".join(letter if letter.isalnum() or letter in "-_" else " " for letter in name)
    return "_".join(letters.split()) or "object"
