"""Masks as COCO's JSON with run lengths, which annotation tools and COCO's own code read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as run_lengths

from episodes.types import UInt8Array


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoRegion:
    """A class's pixels in one photo, in COCO's words; some bytes in place of a mask.

    Attributes:
        category_id: number of the class, from 1.
        counts: COCO's compressed run lengths.
        area: pixels.
        bbox: left, top, width, height in pixels.
        score: how sure, in [0, 1].
    """

    category_id: int
    counts: str
    area: int
    bbox: tuple[float, float, float, float]
    score: float


def coco_regions(labels: UInt8Array, scores: Sequence[float]) -> tuple[CocoRegion, ...]:
    """The classes that a label map shows.

    Args:
        labels: uint8 (H, W), 0 = background, n = class n.
        scores: of every class.
    """
    regions = []
    for number, score in enumerate(scores, 1):
        shown = np.asfortranarray(labels == number, dtype=np.uint8)
        if not shown.any():
            continue
        encoded = run_lengths.encode(shown)
        left, top, width, height = (float(value) for value in run_lengths.toBbox(encoded))
        regions.append(
            CocoRegion(
                category_id=number,
                counts=encoded["counts"].decode("ascii"),
                area=int(run_lengths.area(encoded)),
                bbox=(left, top, width, height),
                score=score,
            )
        )
    return tuple(regions)


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoPhoto:
    """A photo's file, its (H, W) and what was found in it."""

    file: Path
    shape: tuple[int, int]
    regions: tuple[CocoRegion, ...]


def coco_document(photos: Sequence[CocoPhoto], class_names: Sequence[str]) -> dict[str, Any]:
    """COCO's ``instances`` JSON: one annotation for each class that a photo shows, with a ``score``.

    Numbers of images and annotations count from 1; file names are relative to the photos' common folder.
    ``COCO(file)`` reads it, and its list of annotations alone is what ``COCO.loadRes`` takes.
    """
    files = [photo.file.absolute() for photo in photos]
    common = os.path.commonpath([file.parent for file in files]) if files else ""
    annotations: list[dict[str, Any]] = []
    for image_id, photo in enumerate(photos, 1):
        height, width = photo.shape
        for region in photo.regions:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": region.category_id,
                    "segmentation": {"size": [height, width], "counts": region.counts},
                    "area": region.area,
                    "bbox": list(region.bbox),
                    "iscrowd": 0,
                    "score": region.score,
                }
            )
    return {
        "info": {"description": "predicted by fewshot-seg"},
        "images": [
            {
                "id": image_id,
                "file_name": file.relative_to(common).as_posix(),
                "width": photo.shape[1],
                "height": photo.shape[0],
            }
            for image_id, (file, photo) in enumerate(zip(files, photos, strict=True), 1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(class_names, 1)],
    }
