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
        if held_bytes(session.parent) > session.limits.disk_bytes:
            raise DataError("no room for more files now: remove photos, or try again later")
        photo = open_photo(looked.query, most_pixels=session.limits.pixels)
        coarse = found.predictor.with_tiles(photo, session.margins_at(looked, threshold))
        one = writer.write(looked.query, name, Segmented(photo=photo, coarse=coarse))
        assert isinstance(one, WrittenPrediction)
        written.append(one)
    write_json(folder / COCO_NAME, coco_document([one.coco for one in written if one.coco], (found.name,)))
    stem = file_stem(found.name)
    found.predictor.save_support(folder / f"{stem}.safetensors", found.examples)
    return Downloads(
        masks=_zipped(folder / "found", folder / f"{stem}-masks.zip", folder / COCO_NAME),
        coco=folder / COCO_NAME,
        support=folder / f"{stem}.safetensors",
    )


def _zipped(folder: Path, target: Path, *others: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # PNG and JPEG do not get smaller
        for file in [*sorted(one for one in folder.rglob("*") if one.is_file()), *others]:
            archive.write(file, file.relative_to(folder if file.is_relative_to(folder) else file.parent))
    shutil.rmtree(folder)
    return target


def file_stem(name: str) -> str:
    """A name for files of a class, from which no folder can be left.

    >>> file_stem("black cat"), file_stem("../../etc/passwd"), file_stem("...")
    ('black_cat', 'etc_passwd', 'object')
    """
    letters = "".join(letter if letter.isalnum() or letter in "-_" else " " for letter in name)
    return "_".join(letters.split()) or "object"
