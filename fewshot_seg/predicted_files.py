"""Predictions of many photos, written to a folder as they come.

`predict_folder` streams: threads decode and resize photos ahead, others run the network, others write. On a CPU several
run the network side by side with one torch thread each: layers for one photo are too small to be divided among cores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from episodes.progress import tqdm
from episodes.types import DataError, UInt8Array
from fewshot_seg.coco_results import CocoPhoto, coco_document, coco_regions
from fewshot_seg.competition import compete
from fewshot_seg.photos import Photo, open_photo, output_names
from fewshot_seg.pictures import overlay_classes, write_grey, write_mask, write_picture
from fewshot_seg.pipeline import stream
from fewshot_seg.prediction import CoarseMargins, Predictor, enlarge_labels
from fewshot_seg.runtime import write_json

COCO_NAME = "instances.json"

_LANES = 8
"""At most so many threads run the network side by side on a CPU; each needs memory for its activations."""
_GPU_BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundClass:
    """A class in one photo: `share` is its part of the photo, `confidence` the mean inside it, 0 where it is not."""

    name: str
    share: float
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPrediction:
    """Files of one query, and what is in them.

    Attributes:
        query: the photo.
        mask, overlay: what was written.
        confidence_map: of the confidence, where asked for.
        found: every class.
        shape: (H, W) of the photo and of its mask.
        worked_on: (h, w) of the copy that was worked on: less for very large photos.
        coco: the photo's part of COCO's JSON, where asked for.
    """

    query: Path
    mask: Path
    overlay: Path
    confidence_map: Path | None
    found: tuple[FoundClass, ...]
    shape: tuple[int, int]
    worked_on: tuple[int, int]
    coco: CocoPhoto | None

    @property
    def share(self) -> float:
        """Part of the photo that is of any class."""
        return sum(one.share for one in self.found)

    @property
    def confidence(self) -> float:
        """Mean inside the classes, 0 where there is none."""
        share = self.share
        return sum(one.share * one.confidence for one in self.found) / share if share else 0.0

    @property
    def reduced(self) -> bool:
        """Whether a reduced copy was worked on."""
        return self.worked_on != self.shape


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderPrediction:
    """What was written, and one line for every query that could not be read."""

    written: tuple[WrittenPrediction, ...]
    failures: tuple[str, ...]


def predict_folder(
    predictor: Predictor,
    queries: Sequence[Path],
    folder: Path,
    *,
    confidence: bool = False,
    coco: bool = False,
    batch_size: int | None = None,
    show_progress: bool = False,
) -> FolderPrediction:
    """Write ``masks/NAME.png`` (index PNG, n = class n) and ``overlays/NAME.jpg`` for every query.

    A query that cannot be read is noted, and the rest is done all the same. Results are in the order of the queries.
    At most `pipeline.most_in_flight` photos are in memory, however many queries there are. Masks are those of
    `Predictor.predict` up to rounding: networks round the last digit differently in batches of another size, so that
    a pixel exactly on the threshold may fall on the other side.

    Args:
        predictor: with its supports remembered.
        queries: photo files.
        folder: created when missing.
        confidence: write ``confidence/NAME.png`` too, grey of 8 bits: 255 times the confidence of the class that is
            furthest above its threshold, or least below it; from 128 up it is in the mask.
        coco: write ``instances.json`` too, see `coco_results.coco_document`; at the end, when all photos are done.
        batch_size: photos that go through the network together; by default 1 on a CPU, where more gain nothing, and
            8 on a GPU.
        show_progress: bar on stderr.

    Raises:
        DataError: nothing was remembered, or the folder cannot be written.
    """
    if not predictor.classes:
        raise DataError("no support to go by; call remember(images, masks) or load_support(path) first")
    named = list(zip(queries, output_names(queries), strict=True))
    writer = PhotoWriter(predictor, folder, confidence, coco)
    outcomes = stream(
        named,
        read=lambda one: _read(predictor, one[0]),
        process=lambda opened: _segment(predictor, opened),
        write=lambda one, segmented: writer.write(*one, segmented),
        batch_size=batch_size or (1 if predictor.device.type == "cpu" else _GPU_BATCH),
        lanes=lane_count(predictor.device),
    )
    bar = tqdm(outcomes, total=len(named), desc="segmenting", unit="photo", disable=not show_progress)
    with contextlib.closing(outcomes):
        done = list(bar)
    written = tuple(one for one in done if not isinstance(one, str))
    if coco:
        photos = [one.coco for one in written if one.coco is not None]
        write_json(folder / COCO_NAME, coco_document(photos, predictor.classes))
    return FolderPrediction(written=written, failures=tuple(one for one in done if isinstance(one, str)))


def lane_count(device: torch.device) -> int:
    """How many threads run the network side by side: on a CPU as many as torch has threads, at most 8; else 1."""
    return min(torch.get_num_threads(), _LANES) if device.type == "cpu" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    photo: Photo
    squares: Tensor


def _read(predictor: Predictor, query: Path) -> _Opened | str:
    try:
        photo = open_photo(query)
    except DataError as error:
        return str(error)
    return _Opened(photo=photo, squares=predictor.squares(photo.pixels))


@dataclass(frozen=True, kw_only=True, slots=True)
class Segmented:
    """A query and its margins."""

    photo: Photo
    coarse: CoarseMargins


def _segment(predictor: Predictor, opened: list[_Opened | str]) -> list[Segmented | str]:
    photos = [one for one in opened if isinstance(one, _Opened)]
    if not photos:
        return [one for one in opened if isinstance(one, str)]
    margins = predictor.coarse_margins(torch.cat([one.squares for one in photos]))
    whole = iter(margins.reshape(len(photos), -1, *margins.shape[1:]))
    return [
        one if isinstance(one, str) else Segmented(photo=one.photo, coarse=predictor.with_tiles(one.photo, next(whole)))
        for one in opened
    ]


@dataclass(frozen=True, slots=True)
class PhotoWriter:
    """Writes what was found in one photo after another; arguments as in `predict_folder`."""

    predictor: Predictor
    folder: Path
    confidence: bool
    coco: bool

    def write(self, query: Path, name: str, segmented: Segmented | str) -> WrittenPrediction | str:
        """The files of `query`, called `name`; a line that says why there is none is given back.

        Raises:
            DataError: the folder cannot be written.
        """
        if isinstance(segmented, str):
            return segmented
        photo, names = segmented.photo, self.predictor.classes
        worked_on = (photo.pixels.shape[0], photo.pixels.shape[1])
        classes, best = compete(self.predictor.margins_of(segmented.coarse, worked_on))
        found = tuple(_found(name, classes == number, best) for number, name in enumerate(names, 1))
        labels = classes.numpy()
        overlay = overlay_classes(photo.pixels, labels, names)
        if photo.reduced:
            labels = enlarge_labels(labels, photo.shape)
        written = WrittenPrediction(
            query=query,
            mask=self.folder / "masks" / f"{name}.png",
            overlay=self.folder / "overlays" / f"{name}.jpg",
            confidence_map=self.folder / "confidence" / f"{name}.png" if self.confidence else None,
            found=found,
            shape=photo.shape,
            worked_on=worked_on,
            coco=self._coco(query, labels, found) if self.coco else None,
        )
        write_mask(written.mask, labels, len(names))
        write_picture(written.overlay, overlay)
        if written.confidence_map is not None:
            write_grey(written.confidence_map, _grey(best, photo))
        return written

    @staticmethod
    def _coco(query: Path, labels: UInt8Array, found: Sequence[FoundClass]) -> CocoPhoto:
        regions = coco_regions(labels, [one.confidence for one in found])
        return CocoPhoto(file=query, shape=(labels.shape[0], labels.shape[1]), regions=regions)


def _found(name: str, inside: Tensor, best: Tensor) -> FoundClass:
    sure = best[inside]
    confidence = float(sure.sigmoid().mean()) if len(sure) else 0.0
    return FoundClass(name=name, share=len(sure) / inside.numel(), confidence=confidence)


def _grey(best: Tensor, photo: Photo) -> UInt8Array:
    # Rounded so that 128 and more is above one half, as the mask is.
    grey = (255 * best.sigmoid() - 0.5).ceil().numpy().astype(np.uint8)
    if photo.reduced:
        grey = np.asarray(cv2.resize(grey, photo.shape[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
    return grey
